"""What the scripted model served, call by call and summed: the numbers that every report must agree with."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Counts(NamedTuple):
    """The tokens of one call in the provider's own semantics."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `api` is the path, `status` the HTTP status; a failed call counts no tokens."""

    api: str
    id: str
    model: str
    stream: bool
    status: int
    tools: tuple[str, ...] = ()
    counts: Counts = field(default_factory=Counts)


class Served:
    """All calls of one sandbox in the order of their answers; beyond `keep` the oldest go, the sum stays."""

    def __init__(self, keep: int) -> None:
        self._calls: deque[Call] = deque(maxlen=keep)
        self._total = Counts()

    def clear(self) -> None:
        self._calls.clear()
        self._total = Counts()

    def add(self, call: Call) -> None:
        self._calls.append(call)
        self._total = Counts(*map(sum, zip(self._total, call.counts, strict=True)))

    def as_json(self) -> dict[str, Any]:
        return {"calls": [_as_json(call) for call in self._calls], "total": self._total._asdict()}


def _as_json(call: Call) -> dict[str, Any]:
    fields = asdict(call)
    del fields["counts"]
    return {**fields, **call.counts._asdict()}
