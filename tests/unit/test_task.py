"""Options of tasks, and the wrapper around their bodies, in every way in which Celery calls them."""

from __future__ import annotations

import contextvars
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from celery import Celery, Task, shared_task
from celery.exceptions import Retry

import xpander_celery as xc
from xpander_celery.errors import ConfigurationError
from xpander_celery.task import options_of
from xpander_celery.testing import CapturedReports, capture_reports


@pytest.fixture
def reports_of_marked(app: Celery) -> Iterator[CapturedReports]:
    """As where nobody called `instrument()`."""
    with capture_reports() as reports:
        yield reports


class WithOwnCall(Task):
    """As applications write it: around every job, handing on to Celery's own."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return f"<{super().__call__(*args, **kwargs)}>"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"agent": "a"}, "has no option 'agent'"),
        ({"agent_id": ""}, "is no agent id"),
        ({"agent_id": 7}, "is no agent id"),
        ({"input": "yes"}, "is neither a callable nor True or False"),
        ({"result": 1}, "is neither a callable nor True or False"),
        ("agent-1", "is no mapping"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_the_remedy(written: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        xc.TaskOptions.of(written)


def test_unknown_options_of_a_task_are_refused_where_it_is_defined(app: Celery) -> None:
    with pytest.raises(ConfigurationError, match="has no option 'agnet_id'"):

        @app.task(base=xc.XpanderTask, xpander={"agnet_id": "a"}, lazy=False)
        def ask() -> None: ...


def test_the_nearest_option_wins_and_the_others_stay(app: Celery) -> None:
    class Base(xc.XpanderTask):
        abstract = True
        xpander = {"agent_id": "of the base", "input": False}

    @app.task(base=Base, xpander={"agent_id": "of the task"}, lazy=False)
    def named() -> None: ...

    @app.task(base=Base, lazy=False)
    @xc.reported(agent_id="of the decorator", result=False)
    def decorated() -> None: ...

    assert options_of(named) == (xc.TaskOptions(agent_id="of the task", input=False), True)
    assert options_of(decorated) == (xc.TaskOptions(agent_id="of the decorator", input=False, result=False), True)


def test_a_plain_task_is_not_marked(app: Celery) -> None:
    @app.task(lazy=False)
    def plain() -> None: ...

    assert options_of(plain) == (xc.TaskOptions(), False)


@pytest.mark.parametrize("bare", [True, False])
def test_the_decorator_goes_below_and_above(app: Celery, reports_of_marked: CapturedReports, bare: bool) -> None:
    decorator: Any = xc.reported if bare else xc.reported(agent_id="agent-7")

    @app.task
    @decorator
    def below(question: str) -> str:
        return question

    @decorator
    @app.task
    def above(question: str) -> str:
        return question

    @decorator
    @app.task(lazy=False)
    def above_a_real_task(question: str) -> str:
        return question

    @shared_task
    @decorator
    def shared_below(question: str) -> str:
        return question

    @decorator
    @shared_task
    def shared_above(question: str) -> str:
        return question

    for task in (below, above, above_a_real_task, shared_below, shared_above):
        task.apply(("why?",))
    assert [each.input for each in reports_of_marked] == ["why?"] * 5
    assert {each.agent_id for each in reports_of_marked} == {"test-agent" if bare else "agent-7"}


def test_a_decorator_above_leaves_the_task_unbound_until_it_is_configured(app: Celery) -> None:
    @xc.reported(agent_id="agent-7")
    @app.task
    def late() -> None: ...

    app.conf.task_acks_late = True
    app.finalize()
    assert late.acks_late
    assert options_of(app.tasks[late.name])[0].agent_id == "agent-7"


def test_all_ways_on_one_task_give_one_record(app: Celery, reports: CapturedReports) -> None:
    @xc.reported(input=False)
    @app.task(base=xc.XpanderTask, xpander={"agent_id": "agent-7"})
    @xc.reported(result=False)
    def ask(question: str) -> str:
        return question

    assert ask.apply(("why?",)).get() == "why?"
    assert [(each.agent_id, each.input) for each in reports] == [("agent-7", None)]


def test_celery_still_checks_the_arguments_of_a_decorated_task(app: Celery) -> None:
    @app.task
    @xc.reported
    def pay(card: str, *, amount: int) -> None: ...

    with pytest.raises(TypeError, match="amount"):
        pay.apply_async(("4242",))
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        pay.apply_async(("4242", 1))


@pytest.mark.parametrize("base", [Task, xc.XpanderTask])
def test_calling_a_task_directly_records_nothing(app: Celery, reports: CapturedReports, base: type) -> None:
    @app.task(base=base)
    @xc.reported
    def double(x: int) -> int:
        return 2 * x

    assert double(4) == 8
    assert len(reports) == 0


def test_an_eager_retry_keeps_its_request(app: Celery, reports: CapturedReports) -> None:
    seen = []

    @app.task(bind=True, base=xc.XpanderTask, max_retries=3)
    def again(self: Any) -> str:
        seen.append((self.request.id, self.request.retries, len(self.request_stack)))
        if self.request.retries < 2:
            raise self.retry(countdown=0)
        return "done"

    result = again.apply()
    assert result.get() == "done"
    assert seen == [(result.id, 0, 1), (result.id, 1, 1), (result.id, 2, 1)]
    assert [(each.id, each.result, each.llm_response["celery"]["attempt"]) for each in reports] == [
        (result.id, "done", 3)
    ]


def test_a_job_that_calls_itself_directly_is_one_job(app: Celery, reports: CapturedReports) -> None:
    @app.task(bind=True, base=xc.XpanderTask)
    def factorial(self: Any, n: int) -> int:
        return 1 if n < 2 else n * self(n - 1)

    assert factorial.apply((5,)).get() == 120
    assert [each.result for each in reports] == ["120"]


def test_a_job_that_applies_itself_is_a_job_each_time(app: Celery, reports: CapturedReports) -> None:
    @app.task(bind=True, base=xc.XpanderTask)
    def count_down(self: Any, n: int) -> int:
        assert list(self.request.args) == [n]
        inner = self.apply((n - 1,)).get(disable_sync_subtasks=False) if n else 0
        assert xc.current_job().id == self.request.id
        return int(inner) + 1

    assert count_down.apply((2,)).get() == 3
    assert sorted(each.result or "" for each in reports) == ["1", "2", "3"]


def test_the_users_own_call_is_respected_on_either_side(app: Celery, reports: CapturedReports) -> None:
    class Outside(WithOwnCall, xc.XpanderTask):
        abstract = True

    class Inside(xc.XpanderTask, WithOwnCall):
        abstract = True

    @app.task(bind=True, base=Outside)
    def outside(self: Any, x: int) -> int:
        assert self.request.id == xc.current_job().id
        return x

    @app.task(base=Inside)
    def inside(x: int) -> int:
        return x

    assert outside.apply((1,)).get() == "<1>"
    assert inside.apply((2,)).get() == "<2>"
    assert [each.result for each in reports] == ["<1>", "<2>"]


def test_what_the_body_sets_in_its_context_stays_but_for_opentelemetrys(app: Celery, reports: CapturedReports) -> None:
    from opentelemetry import context as otel_context

    connection: contextvars.ContextVar[str] = contextvars.ContextVar("connection")

    @app.task(base=xc.XpanderTask)
    def leaky() -> None:
        connection.set("kept open")
        otel_context.attach(otel_context.set_value("abandoned", True))

    leaky.apply()
    assert connection.get() == "kept open"
    assert otel_context.get_value("abandoned") is None


def test_a_connection_that_jobs_keep_in_their_context_is_made_once(app: Celery, reports: CapturedReports) -> None:
    """As Django's caches do, by asgiref: a body in a context of its own would make one for each job."""
    connection: contextvars.ContextVar[object] = contextvars.ContextVar("connection")
    made: list[object] = []

    @app.task
    @xc.reported
    def ask() -> None:
        if connection.get(None) is None:
            made.append(object())
            connection.set(made[-1])

    def jobs() -> None:
        for _ in range(50):
            ask.apply()

    contextvars.copy_context().run(jobs)
    assert len(made) == 1
    assert len(reports) == 50


def test_a_base_of_ours_and_of_the_app_keeps_what_both_give(
    app: Celery, reports: CapturedReports, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed: list[Callable[[], object]] = []
    database = ModuleType("django.db")
    database.transaction = SimpleNamespace(on_commit=committed.append)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "django", ModuleType("django"))
    monkeypatch.setitem(sys.modules, "django.db", database)
    monkeypatch.delitem(sys.modules, "celery.contrib.django.task", raising=False)
    from celery.contrib.django.task import DjangoTask

    monkeypatch.delitem(sys.modules, "celery.contrib.django.task")
    app.conf.task_always_eager = True

    class Base(xc.XpanderTask, DjangoTask):  # type: ignore[misc]
        abstract = True

    @app.task(base=Base, bind=True, xpander={"agent_id": "agent-7"})
    def ask(self: Any, question: str) -> str:
        return f"{self.request.id is not None}: {question}"

    ask.delay_on_commit("why?")
    assert len(reports) == 0
    [commit] = committed
    commit()
    assert [(each.agent_id, each.input, each.result) for each in reports] == [("agent-7", "why?", "True: why?")]


def test_tasks_that_are_discovered_later_are_reported(
    app: Celery, reports: CapturedReports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "discovered_later"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "tasks.py").write_text(
        "from celery import shared_task\n\n@shared_task(name='discovered.ask')\ndef ask():\n    return 42\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    app.autodiscover_tasks(["discovered_later"])
    app.loader.import_default_modules()
    app.tasks["discovered.ask"].apply()
    assert [each.result for each in reports] == ["42"]
    for name in ("discovered_later", "discovered_later.tasks"):
        monkeypatch.delitem(sys.modules, name)


def test_exceptions_and_results_are_the_users_own(app: Celery, reports: CapturedReports) -> None:
    value, error = object(), KeyError("mine")

    @app.task(base=xc.XpanderTask)
    def give() -> object:
        return value

    @app.task(base=xc.XpanderTask)
    def refuse() -> None:
        raise error

    assert give.apply().result is value
    assert refuse.apply().result is error


def test_an_async_task_is_warned_of_once_where_it_is_defined(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "xpander_celery.task")

    @app.task(base=xc.XpanderTask, lazy=False)
    @xc.reported
    async def later() -> None: ...

    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "asyncio.run" in warnings[0]


def test_marking_does_not_need_instrument(app: Celery, reports_of_marked: CapturedReports) -> None:
    @app.task(base=xc.XpanderTask)
    def marked() -> None: ...

    @app.task
    def plain() -> None: ...

    marked.apply()
    plain.apply()
    assert [each.llm_response["celery"]["task"] for each in reports_of_marked] == [marked.name]


def test_a_retry_that_reaches_the_caller_is_not_swallowed(app: Celery, reports: CapturedReports) -> None:
    app.conf.task_eager_propagates = True

    @app.task(bind=True, base=xc.XpanderTask)
    def again(self: Any) -> None:
        raise self.retry(countdown=0)

    with pytest.raises(Retry):
        again.apply()
    assert [each.is_success for each in reports] == [False]
