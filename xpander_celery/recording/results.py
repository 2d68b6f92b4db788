"""Usage from what a job holds in its hands: responses and run outputs. It imports no provider's library.

Objects are recognized by the module and name of their class and by their attributes; nothing here ever raises.
"""

from __future__ import annotations

from dataclasses import dataclass

from xpander_celery.report import Tokens


@dataclass(frozen=True)
class Call:
    """One call to a model as a response states it. Prompts include cache; `beside` as in `SpanFacts`."""

    prompt: int
    completion: int
    cache_read: int = 0
    cache_write: int = 0
    beside: bool = False
    model: str | None = None
    response_id: str | None = None
    created: int | None = None  # nanoseconds since the epoch


@dataclass(frozen=True)
class Returned:
    """What a response or a run output says of itself."""

    calls: tuple[Call, ...] = ()
    used_tools: tuple[str, ...] = ()
    content: str | None = None  # the text of the answer
    failed: bool = False  # an Agno run of status error: it swallows the model's errors


@dataclass(frozen=True)
class Added:
    """Something that `add_usage` got, and when (nanoseconds since the epoch). Plain `Tokens` are never a duplicate."""

    what: Tokens | Returned
    at: int


def read_result(value: object) -> Returned | None:
    """What `value` says about usage, tools, content and failure; None if it is no response that is known here."""
    return None
