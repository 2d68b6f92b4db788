"""What the worker's main process sees of the end of a job, told from what Celery's own `Request` did about it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery import Celery, Signature
from celery.worker import state
from celery.worker.request import Request

from xpander_celery.events import Ended, Event, decode, encode
from xpander_celery.guard import Guard
from xpander_celery.messages import SHOWN
from xpander_celery.plans import Plans
from xpander_celery.recording.recording import Recorder
from xpander_celery.recording.spans import Tracing
from xpander_celery.report import Outcome
from xpander_celery.requests import ParentView, observe
from xpander_celery.session import Session
from xpander_celery.settings import Settings


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def view(app: Celery, told: list[Event]) -> ParentView:
    recorder = Recorder(emit=lambda event: told.append(decode(encode(event))))
    plans = Plans(Settings(agent_id="agent"), [app])
    return ParentView(Session(plans, recorder, Tracing(), lambda: "owner"), Guard())


@pytest.fixture
def request_for(app: Celery, view: ParentView) -> Iterator[Callable[..., Any]]:
    """Makes the request of a job of a task with the given options, as the worker's strategy does."""
    restores = []

    def make(accepted: bool = True, **options: Any) -> Any:
        @app.task(name=f"shop.task-{len(restores)}", **options)
        def ask(question: str) -> None: ...

        task = app.tasks[ask.name]
        restores.append(observe([task], view))
        headers = {"id": str(uuid.uuid4()), "task": task.name, "root_id": "root-1", "retries": 1}
        payload = (["why?"], {}, {})
        message = SimpleNamespace(
            headers=headers,
            body=payload,
            payload=payload,
            content_type="json",
            content_encoding="utf-8",
            delivery_info={"exchange": "", "routing_key": "fast"},
            properties={},
        )
        request = task.Request(
            message, app=app, task=task, hostname="worker@host", on_ack=nothing, on_reject=nothing, decoded=True
        )
        if accepted:
            request.on_accepted(1, 0.0)
        return request

    yield make
    for restore in restores:
        restore()
    state.reset_state()


def nothing(*_: Any) -> None: ...


def failure(error: BaseException) -> ExceptionInfo:
    try:
        raise error
    except BaseException:
        return ExceptionInfo()


def seen(told: list[Event]) -> list[tuple[str, bool]]:
    return [(event.outcome, event.continues) for event in told if isinstance(event, Ended)]


LOST = WorkerLostError("Worker exited prematurely: signal 9 (SIGKILL) Job: 3.")


@pytest.mark.parametrize(
    ("options", "error", "end"),
    [
        ({}, LOST, (Outcome.LOST, False)),
        ({"acks_late": True}, LOST, (Outcome.LOST, False)),
        ({"acks_late": True, "reject_on_worker_lost": True}, LOST, (Outcome.REQUEUED, True)),
        ({}, TimeLimitExceeded(30), (Outcome.TIMED_OUT, False)),
        ({"acks_late": True}, TimeLimitExceeded(30), (Outcome.TIMED_OUT, False)),
        pytest.param(
            {},
            SystemExit(3),
            (Outcome.LOST, False),
            marks=pytest.mark.skipif(
                not hasattr(Request, "_worker_lost_info"), reason="this Celery cannot encode SystemExit"
            ),
        ),
        ({}, ValueError("could not be pickled"), (Outcome.FAILED, False)),
    ],
)
def test_a_failure_is_classified_by_what_was_done_about_it(
    request_for: Callable[..., Any], told: list[Event], options: Any, error: BaseException, end: tuple[str, bool]
) -> None:
    request_for(**options).on_failure(failure(error))
    assert seen(told) == [end]


@pytest.mark.skipif(not hasattr(Request, "_retry_worker_lost"), reason="this Celery does not retry such jobs")
@pytest.mark.parametrize("shown", ["('****',)", None])
def test_a_retry_that_the_worker_publishes_keeps_hidden_what_the_author_hid(
    request_for: Callable[..., Any], told: list[Event], monkeypatch: pytest.MonkeyPatch, shown: str | None
) -> None:
    request = request_for(retry_on_worker_lost=True, acks_late=True)
    if shown is not None:
        request._request_dict["argsrepr"] = shown
    sent: list[Any] = []
    monkeypatch.setattr(Signature, "apply_async", lambda self: sent.append(self.options["headers"]))
    request.on_failure(failure(LOST))
    assert seen(told) == [(Outcome.RETRIED, True)]
    assert [(headers or {}).get(SHOWN) for headers in sent] == [shown and [request.id, shown]]


@pytest.mark.skipif(not hasattr(Request, "_success_was_stored"), reason="this Celery does not look")
def test_a_child_that_died_after_it_stored_its_result_succeeded(
    app: Celery, request_for: Callable[..., Any], told: list[Event]
) -> None:
    request = request_for(ignore_result=False)
    app.backend.store_result(request.id, "fine", "SUCCESS")
    request.on_failure(failure(LOST))
    assert seen(told) == [(Outcome.SUCCEEDED, False)]


def test_an_end_has_all_that_is_known_of_the_job(request_for: Callable[..., Any], told: list[Event]) -> None:
    request = request_for()
    request.on_failure(failure(LOST))
    [event] = told
    assert isinstance(event, Ended)
    assert (event.job_id, event.owner, event.result) == (
        request.id,
        "owner",
        "WorkerLostError: Worker exited prematurely: signal 9 (SIGKILL)",
    )
    assert event.attempt_id == request.request_dict["xpander_attempt"][0]
    facts = event.facts
    assert (facts.task, facts.agent_id, facts.input) == ("shop.task-0", "agent", "why?")
    assert (facts.queue, facts.worker, facts.root_id, facts.retries) == ("fast", "worker@host", "root-1", 1)


def test_each_delivery_is_an_attempt_of_its_own(request_for: Callable[..., Any]) -> None:
    attempts = [request_for().request_dict["xpander_attempt"] for _ in range(2)]
    assert attempts[0] != attempts[1]
    assert {owner for _, owner in attempts} == {"owner"}


def test_what_the_child_reported_is_left_to_the_child(request_for: Callable[..., Any], told: list[Event]) -> None:
    request_for().on_failure(failure(ValueError("of the body")), return_ok=True)
    assert told == []


def test_a_hard_time_limit_is_told_once(request_for: Callable[..., Any], told: list[Event]) -> None:
    request = request_for()
    request.on_timeout(True, 1)
    request.on_timeout(False, 30)
    request.on_failure(failure(TimeLimitExceeded(30)))
    request.on_failure(failure(LOST))
    assert [(event.outcome, event.result) for event in told if isinstance(event, Ended)] == [
        (Outcome.TIMED_OUT, "TimeLimitExceeded(30)")
    ]


def test_of_two_ends_the_stronger_one_is_told_too(request_for: Callable[..., Any], told: list[Event]) -> None:
    request = request_for()
    request.on_failure(failure(LOST))
    request.on_timeout(False, 2.5)
    assert seen(told) == [(Outcome.LOST, False), (Outcome.TIMED_OUT, False)]


def test_termination_is_told_by_the_signal_of_revocation(request_for: Callable[..., Any], told: list[Event]) -> None:
    request_for().on_failure(failure(Terminated(15)))
    assert told == []


def test_a_cold_stop_loses_what_was_acknowledged(request_for: Callable[..., Any], told: list[Event]) -> None:
    request_for()._announce_cancelled()
    request_for(acks_late=True)._announce_cancelled()
    assert seen(told) == [(Outcome.LOST, False), (Outcome.REQUEUED, True)]


class GreenPool:
    """As gevent's and eventlet's pools of Celery 5.5 and newer: a job that they kill comes out as a success."""

    is_green = True

    def __init__(self, *, gives_out: bool) -> None:
        self.gives_out = gives_out

    def terminate_job(self, pid: int, signal: int) -> None: ...

    def wait(self, request: Any) -> None:
        if self.gives_out:
            request.on_success((False, None, None))


@pytest.mark.parametrize(
    ("gives_out", "ends"),
    [(True, [(Outcome.LOST, False)]), (False, [])],  # nothing, where the message is still the broker's: it comes again
)
def test_a_cold_stop_of_a_green_pool_loses_what_is_acknowledged_after_all(
    request_for: Callable[..., Any], told: list[Event], gives_out: bool, ends: Any
) -> None:
    request, pool = request_for(acks_late=True), GreenPool(gives_out=gives_out)
    request.cancel(pool)
    assert told == []
    pool.wait(request)
    assert request.acknowledged is gives_out
    assert seen(told) == ends


def test_jobs_that_are_not_reported_are_not_told_of(
    app: Celery, request_for: Callable[..., Any], view: ParentView, told: list[Event]
) -> None:
    view.session.plans._settings = Settings(exclude=("shop.*",))  # type: ignore[misc]
    request_for().on_failure(failure(LOST))
    assert told == []


class OwnRequest(Request):
    """As an application writes it."""

    failures: list[Any] = []

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        self.failures.append(exc_info)


def test_a_tasks_own_request_class_keeps_working(request_for: Callable[..., Any], told: list[Event]) -> None:
    request = request_for(Request=OwnRequest)
    assert isinstance(request, OwnRequest)
    request.on_failure(failure(LOST))
    assert len(OwnRequest.failures) == 1
    assert seen(told) == [(Outcome.LOST, False)]


def test_a_request_that_raises_is_told_of_and_raises(request_for: Callable[..., Any], told: list[Event]) -> None:
    with pytest.raises(MemoryError):
        request_for().on_failure(failure(MemoryError("full")))
    assert seen(told) == [(Outcome.FAILED, False)]


def test_observing_is_taken_back_and_not_done_twice(app: Celery, view: ParentView) -> None:
    @app.task(Request=OwnRequest, lazy=False)
    def own() -> None: ...

    @app.task(lazy=False)
    def plain() -> None: ...

    before = own.Request, plain.Request
    restore = observe([own, plain], view)
    observed = own.Request, plain.Request
    observe([own, plain], view)()
    assert (own.Request, plain.Request) == observed
    restore()
    assert (own.Request, plain.Request) == before
    assert "Request" not in vars(plain)
