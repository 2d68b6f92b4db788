"""What the platform says of a run, and waiting for its end."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest

from xpander_celery import errors
from xpander_celery.backend import Backend, Task, operations
from xpander_celery.backend.calls import Answer, Call, Pause

from .conftest import TASK, Platform, task

READ = Call("GET", "/agent-execution/job-1/status")


class Look:
    """Waits for a task without waiting: pauses advance the clock, and the platform answers what it is told."""

    def __init__(self, *answers: str | Exception, timeout_s: float = 300.0) -> None:
        self.pauses: list[float] = []
        self._now = 1000.0
        self._answers = list(answers)
        self._steps = operations.wait_for_task("job-1", timeout_s, None, now=lambda: self._now)  # type: ignore[arg-type]

    def end(self) -> Task:
        advance: Callable[[], Any] = partial(next, self._steps)
        while True:
            try:
                step = advance()
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            advance = self._pass(step.seconds) if isinstance(step, Pause) else self._look()

    def _pass(self, seconds: float) -> Callable[[], Any]:
        self.pauses.append(seconds)
        self._now += seconds
        return partial(next, self._steps)

    def _look(self) -> Callable[[], Any]:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            return partial(self._steps.throw, answer)
        return partial(self._steps.send, Answer(200, json.dumps({**TASK, "status": answer}).encode(), {}))


def test_unknown_keys_are_ignored_and_nulls_are_absent() -> None:
    answer = {**TASK, "new": 1, "input": None, "status": None, "used_tools": None, "duration": None, "agent_version": 3}
    read = Task.read(READ, {**answer, "tokens": {"prompt_tokens": 3, "cache_read_tokens": None, "total_tokens": 3}})
    assert (read.status, read.used_tools, read.duration, read.agent_version) == ("pending", [], 0.0, "3")
    assert read.tokens is not None
    assert read.tokens.prompt_tokens == 3


def test_the_least_answer_is_a_task() -> None:
    read = Task.read(READ, {"id": "job-1"})
    assert repr(read) == str(read) == "Task(id='job-1', agent_id=None, status='pending')"
    assert not read.has_ended


@pytest.mark.parametrize(
    ("status", "ended"),
    [
        ("pending", False),
        ("executing", False),
        ("paused", False),
        ("error", True),
        ("failed", True),
        ("completed", True),
        ("stopped", True),
        ("a status of tomorrow", False),
    ],
)
def test_a_task_has_ended_where_the_platform_will_not_change_it(status: str, ended: bool) -> None:
    assert Task.read(READ, {**TASK, "status": status}).has_ended is ended


async def test_both_twins_wait_until_the_end_and_update_the_task(
    backend: Backend, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "FIRST_PAUSE_S", 0.001)
    running = [task(status="pending"), task(status="executing")]
    platform.answers = [*running, task(status="completed", result="done")]
    created = await backend.aload_task("job-1")
    assert await created.await_result() is created
    assert (created.status, created.result, created.has_ended) == ("completed", "done", True)
    platform.answers = [*running, task(status="error", result="failed")]
    created = backend.load_task("job-1")
    assert created.wait() is created
    assert (created.status, created.result) == ("error", "failed")
    assert platform.paths == ["GET /agent-execution/job-1/status"] * 6


async def test_failures_reach_the_wait_through_both_drivers(
    backend: Backend, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "FIRST_PAUSE_S", 0.001)
    failures = [httpx.Response(503), httpx.ConnectError("no"), httpx.Response(429)]
    platform.answers = [*failures, task()]
    assert (await backend.await_task("job-1")).has_ended
    platform.answers = [*failures, task()]
    assert backend.wait_for_task("job-1").has_ended


def test_a_task_that_has_ended_is_not_waited_for() -> None:
    look = Look("completed")
    assert look.end().status == "completed"
    assert look.pauses == []


def test_looks_grow_rarer_and_the_deadline_is_kept() -> None:
    look = Look("executing", timeout_s=60)
    with pytest.raises(errors.TaskNotEndedError, match="'job-1' had not ended after 60 s") as caught:
        look.end()
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.task_id == "job-1"
    assert sum(look.pauses) == pytest.approx(60)
    assert look.pauses[0] <= operations.FIRST_PAUSE_S * 1.2
    assert max(look.pauses) > 5
    assert len(look.pauses) < 20


def test_the_state_at_the_deadline_counts() -> None:
    assert Look("executing", "executing", "completed", timeout_s=0.7).end().has_ended


def test_passing_failures_of_the_platform_do_not_end_the_wait() -> None:
    look = Look(errors.ServerError("503"), errors.NetworkError("no"), errors.RateLimitedError("429"), "completed")
    assert look.end().has_ended
    assert len(look.pauses) == 3


def test_retry_after_is_heeded_up_to_a_minute() -> None:
    look = Look(
        errors.RateLimitedError("429", retry_after="7"),
        errors.ServerError("503", retry_after="86400"),
        errors.RateLimitedError("429", retry_after="Wed, 21 Oct 2026 07:28:00 GMT"),
        "completed",
    )
    look.end()
    assert look.pauses[:2] == [7, 60]
    assert look.pauses[2] < 5


def test_the_last_failure_is_the_cause_of_a_missed_deadline() -> None:
    failure = errors.ServerError("503")
    with pytest.raises(errors.TaskNotEndedError) as caught:
        Look("executing", failure, timeout_s=5).end()
    assert caught.value.__cause__ is failure


@pytest.mark.parametrize("refusal", [errors.AuthenticationError("401"), errors.NotFoundError("404")])
def test_a_lasting_refusal_ends_the_wait(refusal: Exception) -> None:
    look = Look("executing", refusal)
    with pytest.raises(type(refusal)):
        look.end()
    assert len(look.pauses) == 1


def test_a_task_of_no_backend_says_how_to_get_one() -> None:
    with pytest.raises(errors.ConfigurationError, match="load_task"):
        Task(id="job-1").wait()


def test_a_task_is_copied_with_its_backend_and_pickled_without(backend: Backend, platform: Platform) -> None:
    platform.answers = [task(), task()]
    loaded = backend.load_task("job-1")
    assert copy.deepcopy(loaded).wait() == loaded
    unpickled = pickle.loads(pickle.dumps(loaded))
    assert unpickled.id == "job-1"
    with pytest.raises(errors.ConfigurationError, match="load_task"):
        unpickled.wait()
