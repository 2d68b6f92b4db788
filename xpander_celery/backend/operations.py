"""What the platform can be asked to do, each as `Steps`: which calls in which order, and what their answers mean."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from xpander_celery.backend.arguments import agent_of, report_of, segment
from xpander_celery.backend.calls import Call, Pause, Steps, ask
from xpander_celery.backend.invocation import body_of, named_task, version_header
from xpander_celery.backend.task import Task, Waiter
from xpander_celery.errors import (
    BackendError,
    NetworkError,
    RateLimitedError,
    ServerError,
    TaskNotEndedError,
)
from xpander_celery.report import TaskReport

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0
LONGEST_RETRY_AFTER_S = 60.0
_PAUSE_GROWTH = 1.5
_SHORTEST_LOOK_S = 1.0


def report_task(report: TaskReport, waiter: Waiter) -> Steps[Task]:
    """Report a run; the task as the platform recorded it."""
    call = report_call(report)
    return Task.read(call, (yield from ask(call)), waiter)


def load_task(task_id: Any, waiter: Waiter, within_s: float | None = None) -> Steps[Task]:
    """Read a task."""
    call = Call("GET", f"/agent-execution/{segment('task_id', task_id)}/status", within_s=within_s)
    return Task.read(call, (yield from ask(call)), waiter)


def invoke_agent(
    agent_id: Any, default_agent_id: str | None, prompt: Any, agent_version: Any, waiter: Waiter, **arguments: Any
) -> Steps[Task]:
    """Create a task of an agent, which is looked up first; or load the one that the prompt names."""
    if (existing := named_task(prompt)) is not None:
        return (yield from load_task(existing, waiter))
    look_up = Call("GET", f"/agents/{segment('agent_id', agent_of(agent_id, default=default_agent_id))}")
    body, headers = body_of(prompt=prompt, **arguments), version_header(agent_version)
    agent = yield from ask(look_up)
    call = Call("POST", f"/agent-execution/{segment('id', agent['id'])}", body, headers)
    return Task.read(call, (yield from ask(call)), waiter)


def wait_for_task(
    task_id: Any, timeout_s: float, waiter: Waiter, *, now: Callable[[], float] = time.monotonic
) -> Steps[Task]:
    """Read a task until it has ended, at growing intervals, through passing failures of the platform."""
    deadline = now() + timeout_s
    pause_s = FIRST_PAUSE_S
    failure: BackendError | None = None
    while True:
        wait_s = pause_s * random.uniform(0.8, 1.2)
        try:
            task = yield from load_task(task_id, waiter, within_s=max(_SHORTEST_LOOK_S, deadline - now()))
            if task.has_ended:
                return task
            failure = None
        except (RateLimitedError, ServerError) as error:
            failure, wait_s = error, max(wait_s, _asked_for(error.retry_after))
        except NetworkError as error:
            failure = error
        remaining_s = deadline - now()
        if remaining_s <= 0:
            raise TaskNotEndedError(str(task_id), timeout_s) from failure
        yield Pause(min(wait_s, remaining_s))
        pause_s = min(pause_s * _PAUSE_GROWTH, LONGEST_PAUSE_S)


def report_call(report: TaskReport) -> Call:
    """The request for a report."""
    path = f"/agent-execution/{segment('agent_id', report.agent_id)}/report_task"
    try:
        body = report.to_wire()
    except Exception:  # noqa: BLE001 - a hook on reports may have put anything into it
        body = report_of(**dict(report)).to_wire()
    return Call("POST", path, body)


def _asked_for(retry_after: str | None) -> float:
    """The pause that a Retry-After in seconds asks for; a date, or garbage, asks for none beyond the usual."""
    if retry_after is None or not retry_after.strip().isdecimal():
        return 0.0
    return min(float(retry_after), LONGEST_RETRY_AFTER_S)
