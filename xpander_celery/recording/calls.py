"""Calls to models, as what a job holds in its hands states them. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from xpander_celery.report import Tokens

_SECOND = 1_000_000_000


@dataclass(frozen=True)
class Call:
    """One call to a model (or the sum of several) as a response states it; `prompt` and `beside` as in `SpanFacts`."""

    prompt: int
    completion: int
    cache_read: int = 0
    cache_write: int = 0
    beside: bool = False
    model: str | None = None
    response_id: str | None = None
    created: int | None = None  # nanoseconds since the epoch, as the provider says
    run_id: str | None = None  # of the agent's run that made it
    began: int | None = None  # nanoseconds since the epoch, as the agent says


@dataclass(frozen=True)
class Returned:
    """What a response or a run output says of itself. `content` is an Agno run's answer, as the agent gave it."""

    calls: tuple[Call, ...] = ()
    used_tools: tuple[str, ...] = ()
    content: Any = None
    failed: bool = False  # an Agno run of status error: it swallows the model's errors, and its content is the error


@dataclass(frozen=True)
class Added:
    """Something that `add_usage` got, and when (nanoseconds since the epoch). Plain `Tokens` are never a duplicate."""

    what: Tokens | Returned
    at: int


def without_earlier(returned: Returned, began: int) -> Returned:
    """What was spent since a job `began` (nanoseconds since the epoch), where an agent says so of its calls.

    A run of Agno that was paused may be continued by another job, and an agent of Strands may serve several: both state
    all of their calls again. An output of which no call is of this job was made before, and is told as a whole.
    """
    is_of_job = [call.began is not None and _is_since(began, call.began) for call in returned.calls]
    if not any(is_of_job):
        return returned
    own = zip(returned.calls, is_of_job, strict=True)
    return replace(returned, calls=tuple(call for call, is_own in own if is_own or call.began is None))


def _is_since(began: int, time: int) -> bool:
    """Agno tells whole seconds, so that the one in which the job began may be its own."""
    return time >= (began if time % _SECOND else began - began % _SECOND)
