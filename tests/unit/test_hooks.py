"""Signals to recordings: eager jobs, published messages, and ends that only some signals tell of."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from celery import Celery, signals
from celery.app.task import Context
from celery.app.trace import build_tracer
from celery.exceptions import Ignore, Reject

import xpander_celery as xc
from xpander_celery import hooks, messages
from xpander_celery.events import Finished, request_id_of
from xpander_celery.journal.memory import MemoryJournal
from xpander_celery.recording.recording import Recording
from xpander_celery.report import Tokens
from xpander_celery.runtime import recording_into
from xpander_celery.testing import CapturedReports, capture_reports

SPENT = Tokens(prompt_tokens=10, completion_tokens=1)


def run(task: Any, *args: Any, **message: Any) -> Any:
    """Run a job as a worker's child does."""
    request = {
        "id": "job-1",
        "task": task.name,
        "is_eager": False,
        "delivery_info": {"exchange": "", "routing_key": "fast", "redelivered": False},
        "hostname": "worker@host",
        **message,
    }
    return build_tracer(task.name, task, app=task.app)(request["id"], list(args), {}, request)


def publish(app: Celery, **headers: Any) -> dict[str, Any]:
    """The headers of a message as it is published."""
    sent: dict[str, Any] = {"id": "job-2", "task": "shop.other", **headers}
    signals.before_task_publish.send(sender="shop.other", body=((), {}, {}), headers=sent)
    return sent


def test_an_eager_job_is_reported(app: Celery, reports: CapturedReports) -> None:
    @app.task(name="shop.add")
    def add(x: int, y: int = 1) -> int:
        return x + y

    result = add.apply((1,), {"y": 2})
    assert result.get() == 3
    [report] = reports
    assert (report.id, report.input, report.result, report.is_success) == (result.id, '{"x":1,"y":2}', "3", True)
    assert reports.of(result.id) == report


@pytest.mark.parametrize("kind", ["map", "starmap", "chunks"])
def test_many_calls_in_one_job_are_one_record_of_celerys_own_task_where_that_is_named(app: Celery, kind: str) -> None:
    app.conf.task_always_eager = True

    @app.task(name="shop.ask")
    def ask(x: int) -> int:
        xc.current_job().add_usage(SPENT)
        return 2 * x

    signature = {
        "map": lambda: ask.map([1, 2]),
        "starmap": lambda: ask.starmap([(1,), (2,)]),
        "chunks": lambda: ask.chunks([(1,), (2,)], 2),
    }[kind]
    with capture_reports(app) as reports:
        signature().apply_async()
        assert len(reports) == 0
    with capture_reports(app, tasks=["*", "celery.map", "celery.starmap"]) as reports:
        signature().apply_async()
        [report] = reports
        assert (report.result, report.tokens) == ("[2,4]", SPENT + SPENT)
        assert report.llm_response["celery"]["task"] == ("celery.map" if kind == "map" else "celery.starmap")


def test_always_eager(app: Celery, reports: CapturedReports) -> None:
    app.conf.task_always_eager = True

    @app.task(name="shop.add")
    def add(x: int, y: int) -> int:
        return x + y

    assert (add.s(1, 1) | add.s(10)).apply_async().get() == 12
    assert add.apply_async((1, 1), headers={"xpander_agent_id": "called"}).get() == 2
    assert [(each.result, each.agent_id) for each in reports] == [
        ("2", "test-agent"),
        ("12", "test-agent"),
        ("2", "called"),
    ]


def test_an_error_that_is_propagated_to_the_caller_is_a_failure(app: Celery, reports: CapturedReports) -> None:
    app.conf.task_eager_propagates = True

    @app.task
    def fail() -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError):
        fail.apply()
    [report] = reports
    assert not report.is_success
    assert (report.result or "").startswith("KeyError: 'gone'\n\nTraceback")


def test_what_the_caller_handles_is_not_the_jobs_error(app: Celery, reports: CapturedReports) -> None:
    @app.task
    def fine() -> str:
        return "fine"

    try:
        raise ValueError("of the caller")
    except ValueError:
        fine.apply()
    assert [(each.is_success, each.result) for each in reports] == [(True, "fine")]


def test_a_nested_job_gives_the_outer_one_back(app: Celery, reports: CapturedReports) -> None:
    @app.task
    def inner() -> None:
        xc.current_job().add_usage(SPENT)
        raise ValueError("inner")

    @app.task(bind=True)
    def outer(self: Any) -> None:
        inner.apply()
        assert xc.current_job().id == self.request.id
        xc.current_job().result = "outer"

    outer.apply()
    outer_report, inner_report = reports
    assert (outer_report.result, outer_report.tokens) == ("outer", None)
    assert (inner_report.is_success, inner_report.tokens) == (False, SPENT)
    assert inner_report.llm_response["celery"]["parent_id"] == outer_report.id
    assert xc.current_job().id is None


def test_a_job_says_more_of_itself(app: Celery, reports: CapturedReports) -> None:
    @app.task
    def ask(question: str) -> str:
        job = xc.current_job()
        job.input = {"question": question, "api_key": "sk-12345678"}
        job.result = {"answer": 42}
        job.llm_response = {"raw": True}
        job.agent_id = "chosen"
        return "returned"

    ask.apply(("why?",))
    [report] = reports
    assert report.input == '{"question":"why?","api_key":"[redacted]"}'
    assert (report.result, report.agent_id) == ('{"answer":42}', "chosen")
    assert report.llm_response["response"] == {"raw": True}


def test_options_of_a_task_shape_what_is_sent(app: Celery, reports: CapturedReports) -> None:
    @app.task(xpander={"input": lambda question: {"asked": question, "n": 1}, "result": len})
    def ask(question: str) -> str:
        return question

    @app.task(xpander={"input": lambda: 1 / 0, "result": lambda value: value.missing})
    def broken() -> str:
        return "x"

    @app.task(xpander={"result": False})
    def secret() -> None:
        raise ValueError("4242")

    ask.apply(("why?",))
    broken.apply()
    secret.apply()
    assert [(each.input, each.result) for each in reports] == [
        ('{"asked":"why?","n":1}', "4"),
        (
            "(the function for the input failed: ZeroDivisionError: division by zero)",
            "(the function for the result failed: AttributeError: 'str' object has no attribute 'missing')",
        ),
        ("{}", "ValueError"),
    ]


def test_a_message_says_attempt_queue_and_wait(app: Celery, reports: CapturedReports) -> None:
    @app.task
    def ask() -> None: ...

    run(ask, xpander_attempt=("attempt-7", "owner-1"), xpander_published_at=0.0, retries=2, group="group-1")
    [report] = reports
    facts = report.llm_response["celery"]
    assert {key: facts[key] for key in ("queue", "worker", "retries", "group_id", "outcome")} == {
        "queue": "fast",
        "worker": "worker@host",
        "retries": 2,
        "group_id": "group-1",
        "outcome": "succeeded",
    }
    assert facts["queue_wait_s"] > 1e9


def test_carried_usage_is_added(app: Celery, reports: CapturedReports) -> None:
    @app.task
    def ask() -> None:
        xc.current_job().add_usage(SPENT)

    carried = [{"job_id": "job-1", "attempt_id": "a-0", "tokens": SPENT.model_dump(), "duration_s": 100.0}]
    run(ask, retries=1, xpander_carried=carried)
    [report] = reports
    assert report.tokens == SPENT + SPENT
    assert report.duration > 100


@pytest.mark.parametrize(
    ("error", "is_success"),
    [(Ignore("no"), True), (Reject("no", requeue=False), False), (Reject("acknowledged", requeue=True), False)],
)
def test_jobs_that_are_ignored_or_rejected_are_over(
    app: Celery, reports: CapturedReports, error: Exception, is_success: bool
) -> None:
    @app.task
    def refuse() -> None:
        raise error

    run(refuse)
    assert [each.is_success for each in reports] == [is_success]


def test_what_the_author_shows_of_the_arguments_goes_with_a_retry_and_with_nothing_else(
    app: Celery, reports: CapturedReports
) -> None:
    sent: list[dict[str, Any]] = []

    @app.task(bind=True)
    def charge(self: Any, card: str) -> None:
        sent.append(publish(app, id=self.request.id))
        sent.append(publish(app, xpander_shown=[self.request.id, "('****',)"]))

    run(charge, "4111-1111", argsrepr="('****',)")
    assert sent[0][messages.SHOWN] == ["job-1", "('****',)"]
    assert messages.SHOWN not in sent[1]
    run(charge, "4111-1111", argsrepr="('4111-1111',)", xpander_shown=sent[0][messages.SHOWN])
    assert [each.input for each in reports] == ["('****',)"]
    assert sent[2][messages.SHOWN] == ["job-1", "('****',)"]
    run(charge, "4111-1111", argsrepr="('4111-1111',)", id="job-3", xpander_shown=sent[0][messages.SHOWN])
    assert reports.of("job-3").input == "4111-1111"


def test_a_job_that_will_come_again_is_not_over(app: Celery, reports: CapturedReports) -> None:
    @app.task(acks_late=True)
    def requeue() -> None:
        raise Reject("later", requeue=True)

    run(requeue)
    assert len(reports) == 0


def test_a_result_that_cannot_be_stored_makes_a_failure_of_a_success(
    app: Celery, reports: CapturedReports, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task
    def ask() -> str:
        return "fine"

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("back-end is gone")

    monkeypatch.setattr(type(app.backend), "mark_as_done", refuse)
    with pytest.warns(RuntimeWarning, match="outside body"):
        run(ask)
    [report] = reports
    assert not report.is_success
    assert (report.result or "").startswith("ConnectionError: back-end is gone")


def test_a_job_whose_arguments_are_no_arguments_fails(app: Celery, reports: CapturedReports) -> None:
    @app.task
    def ask() -> None: ...

    tracer = build_tracer(ask.name, ask, app=app)
    with pytest.warns(RuntimeWarning, match="outside body"):
        tracer("job-1", [], None, {"id": "job-1", "task": ask.name, "is_eager": False})
    assert [each.is_success for each in reports] == [False]


@pytest.mark.parametrize(("error", "result"), [(SystemExit(3), "SystemExit: 3"), (KeyboardInterrupt(), "Keyb")])
def test_leaving_the_process_is_a_failure_where_nobody_else_sees_it(
    app: Celery, reports: CapturedReports, error: BaseException, result: str
) -> None:
    @app.task
    def leave() -> None:
        raise error

    with pytest.raises(type(error)):
        run(leave)
    [report] = reports
    assert not report.is_success
    assert (report.result or "").startswith(result)


def test_a_child_leaves_it_to_its_parent_to_say_what_happened(app: Celery, reports: CapturedReports) -> None:
    @app.task
    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        run(leave, xpander_attempt=("attempt-7", "another-process"))
    assert len(reports) == 0


def test_what_was_revoked_or_expired_is_reported(app: Celery, reports: CapturedReports) -> None:
    @app.task
    def ask(question: str) -> None: ...

    def revoke(job_id: str, **more: Any) -> None:
        request = Context({"id": job_id, "task": ask.name}, args=["why?"], kwargs={})
        signals.task_revoked.send(sender=app.tasks[ask.name], request=request, **more)

    revoke("job-1", terminated=True, signum=15, expired=False)
    revoke("job-2", terminated=False, signum=None, expired=True)
    revoke("job-3", terminated=True, signum="signal 9", expired=False)
    assert [(each.input, each.result) for each in reports.wait_for(3)] == [
        ("why?", "revoked: terminated by SIGTERM"),
        ("why?", "expired before it was run"),
        ("why?", "revoked: terminated by signal 9"),
    ]


def test_a_message_that_is_published_says_when_and_no_attempt(app: Celery, reports: CapturedReports) -> None:
    sent = publish(app, xpander_attempt=("stale", "stale"), mine="untouched")
    assert sent[messages.PUBLISHED_AT] > 0
    assert sent["mine"] == "untouched"
    assert messages.ATTEMPT not in sent


def test_headers_copied_from_the_running_job_do_not_leak_into_another_one(
    app: Celery, reports: CapturedReports
) -> None:
    carried = [{"job_id": "job-1", "attempt_id": "a-0"}]

    @app.task(bind=True)
    def ask(self: Any) -> dict[str, Any]:
        return publish(app, **self.request.headers)

    sent = run(ask, xpander_carried=carried, xpander_earlier="00-1-1-01", traceparent=f"00-{7:032x}-{7:016x}-01").retval
    assert messages.CARRIED not in sent
    assert messages.EARLIER not in sent
    assert sent["traceparent"].split("-")[2] != f"{7:016x}"


def test_a_retry_carries_the_history_and_keeps_its_place_in_the_trace(app: Celery, reports: CapturedReports) -> None:
    traceparent = f"00-{7:032x}-{7:016x}-01"

    @app.task(bind=True)
    def ask(self: Any) -> dict[str, Any]:
        xc.current_job().add_usage(SPENT)
        with xc.tool_call("search"):
            return publish(app, **{**self.request.headers, "id": "job-1"})

    carried = [{"job_id": "job-1", "attempt_id": "a-0"}]
    sent = run(ask, xpander_attempt=("a-1", "owner"), xpander_carried=carried, traceparent=traceparent).retval
    assert [request_id_of(entry["attempt_id"]) for entry in sent[messages.CARRIED]] == ["a-0", "a-1"]
    assert sent[messages.CARRIED][1]["tokens"]["prompt_tokens"] == 10
    assert sent[messages.CARRIED][1]["used_tools"] == ["search"]
    assert sent["traceparent"] == traceparent
    assert sent[messages.EARLIER].split("-")[1] == f"{7:032x}"


def test_the_parent_publishes_the_history_on(app: Celery, reports: CapturedReports) -> None:
    carried = [{"job_id": "job-2", "attempt_id": "a-0"}]
    assert publish(app, xpander_carried=carried)[messages.CARRIED] == carried


def test_a_retry_that_does_not_end_the_attempt_continues_the_job(app: Celery, reports: CapturedReports) -> None:
    @app.task
    def ask() -> None:
        headers = publish(app, id="job-1")
        signals.after_task_publish.send(sender="shop.other", body=(), headers=headers)

    @app.task
    def ask_in_vain() -> None:
        publish(app, id="job-9")  # and the broker refuses it

    run(ask)
    run(ask_in_vain, id="job-9")
    assert [each.id for each in reports] == ["job-9"]


def test_an_attempt_that_goes_on_says_when_the_next_one_is_due(app: Celery) -> None:
    due = {"eta": "2100-01-01T01:00:00+01:00"}

    def publish_next(self: Any, **headers: Any) -> None:
        signals.after_task_publish.send(sender="shop.other", body=(), headers={"id": self.request.id, **headers})

    def publish_next_by_the_old_protocol(self: Any) -> None:
        signals.after_task_publish.send(sender="shop.other", body={"id": self.request.id, **due}, headers={})

    @app.task(bind=True)
    def ask(self: Any, how: Any) -> None:
        how(self)

    journal = MemoryJournal()
    with recording_into(journal, app, {}, agent_id="agent"):
        run(ask, partial(publish_next, **due))
        run(ask, publish_next_by_the_old_protocol)
        run(ask, publish_next)
        run(ask, lambda self: None)
    ends = [event for event in journal.poll(100).events if isinstance(event, Finished)]
    assert [(end.continues, end.goes_on_at) for end in ends] == [
        (True, 4102444800.0),
        (True, 4102444800.0),
        (True, None),
        (False, None),
    ]


def test_a_call_for_several_messages_is_one_job(app: Celery, reports: CapturedReports) -> None:
    """As celery-batches makes it: with an id of its own, and a request that has none."""

    @app.task
    def ask_all(questions: list[str]) -> None: ...

    ask_all.request_stack.push(Context(loglevel=0))
    try:
        given = {"sender": ask_all, "task_id": "batch-1", "task": ask_all, "args": (["why?"],), "kwargs": {}}
        signals.task_prerun.send(**given)
        xc.current_job().add_usage(SPENT)
        signals.task_postrun.send(**given, retval=2, state="SUCCESS")
    finally:
        ask_all.request_stack.pop()
    [report] = reports
    assert (report.id, report.is_success, report.result, report.tokens) == ("batch-1", True, "2", SPENT)


def test_the_old_message_protocol(app: Celery, reports: CapturedReports) -> None:
    @app.task
    def ask() -> Any:
        headers: dict[str, Any] = {}
        signals.before_task_publish.send(sender="shop.other", body={"id": "job-1", "task": "x"}, headers=headers)
        return headers

    assert messages.CARRIED in run(ask).retval


def test_what_is_excluded_is_not_recorded_nor_taken_for_the_outer_job(app: Celery) -> None:
    @app.task(name="shop.quiet")
    def quiet() -> None:
        xc.current_job().add_usage(SPENT)

    with capture_reports(app, exclude=["shop.quiet"]) as reports:
        quiet.apply()
        assert len(reports) == 0


def test_every_handler_bears_to_be_called_with_nothing(app: Celery, reports: CapturedReports) -> None:
    for signal in (
        signals.before_task_publish,
        signals.after_task_publish,
        signals.task_revoked,
        signals.task_rejected,
    ):
        responses = signal.send(sender=None)
        assert [error for _, error in responses if isinstance(error, Exception)] == []


class Array:
    """Compares as an array does."""

    def __eq__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise ValueError("ambiguous")

    __hash__ = None  # type: ignore[assignment]


def test_a_job_whose_result_cannot_be_compared_is_reported_as_itself(app: Celery, reports: CapturedReports) -> None:
    @app.task(name="shop.detect")
    def detect() -> Any:
        return {"object": Array()}

    @app.task(name="shop.add")
    def add(x: int) -> int:
        return x + 1

    detect.apply()
    for x in range(4):
        add.apply((x,))
    told = [(report.llm_response["celery"]["task"], report.is_success) for report in reports]
    assert told == [("shop.detect", True), *[("shop.add", True)] * 4]
    assert [report.result for report in reports][1:] == ["1", "2", "3", "4"]


def test_a_request_at_the_place_of_another_one_has_its_own_recording(
    app: Celery, reports: CapturedReports, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task
    def ask(x: int) -> int:
        return x

    finish = Recording.finish

    def fail(self: Recording, *_: Any, **__: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(hooks, "id", lambda _: 1, raising=False)
    monkeypatch.setattr(Recording, "finish", fail)
    ask.apply((1,), task_id="lost")
    monkeypatch.setattr(Recording, "finish", finish)
    ask.apply((2,), task_id="told")
    assert [(report.id, report.result) for report in reports] == [("told", "2")]


@pytest.mark.parametrize("given", [77, UUID(int=77)])
def test_ids_of_any_kind_are_text(app: Celery, reports: CapturedReports, given: Any) -> None:
    @app.task(ignore_result=True)
    def inner() -> None: ...

    @app.task(ignore_result=True)
    def outer() -> dict[str, Any]:
        inner.apply()
        return publish(app, id=given)

    sent = run(outer, id=given, root_id=given).retval
    assert messages.CARRIED in sent
    report, below = reports
    assert (report.id, report.is_success) == (str(given), True)
    assert below.llm_response["celery"]["parent_id"] == str(given)


def test_an_end_that_only_the_parent_sees_has_text_for_an_id(app: Celery, reports: CapturedReports) -> None:
    @app.task(name="shop.ask")
    def ask() -> None: ...

    request = Context({"id": 77, "task": ask.name, "root_id": 77}, args=[], kwargs={})
    signals.task_revoked.send(sender=app.tasks[ask.name], request=request, terminated=False, signum=None, expired=True)
    assert [report.id for report in reports.wait_for(1)] == ["77"]


def test_an_exception_that_cannot_be_shown_is_a_failure(
    app: Celery, reports: CapturedReports, monkeypatch: pytest.MonkeyPatch
) -> None:
    @app.task
    def ask() -> None:
        raise ValueError("no")

    def fail(*_: Any) -> None:
        raise LookupError("notes")

    monkeypatch.setattr(hooks, "tracebacks", SimpleNamespace(format_exception=fail))
    ask.apply()
    assert [(report.is_success, report.result) for report in reports] == [(False, "ValueError: no")]


def test_a_job_that_ended_is_kept_without_what_it_set(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Recording] = []
    monkeypatch.setattr(Recording, "forget_values", lambda self: kept.append(self))

    @app.task
    def ask() -> None: ...

    with capture_reports(app):
        ask.apply()
    assert len(kept) == 1
