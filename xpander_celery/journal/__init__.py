"""The journal: the append-only, crash-safe place that events are written to. Layer 2.

Workers write (`Journal`), one relay reads (`JournalReader`). This module holds only what both sides and every kind of
journal agree on. A journal knows events and where they lie; it knows nothing of jobs, Celery or the platform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from xpander_celery.events import Event


class Appended(StrEnum):
    """What became of an event: the promise that `append` makes."""

    DURABLE = "durable"  # survives the death of every process of ours
    BUFFERED = "buffered"  # in this process's memory, tried again by later appends
    DROPPED = "dropped"  # gone, and counted


@dataclass(slots=True)
class Counters:
    """What one process appended. Exact in one thread; threads that append at the same instant may be counted once."""

    durable: int = 0
    buffered: int = 0
    dropped: int = 0
    trimmed: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """What one `poll` found. `positions` replaces what the index stored: a segment without an entry is unread.

    `dropped` sums what writers say that they had to drop. `finished` names the segments that nobody will write to
    again and that this batch reads to the end: `settle` removes them. `receipts`, one for each event, are given by a
    journal that may have to keep events until what they led to is delivered.
    """

    events: list[Event] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    corrupt: int = 0
    dropped: int = 0
    size: int = 0
    finished: frozenset[str] = frozenset()
    receipts: tuple[str, ...] = ()


class Journal(Protocol):
    """The writing side, one object in each process of a worker."""

    @property
    def counters(self) -> Counters:
        """What this process appended."""

    @property
    def process_id(self) -> str:
        """The liveness id of this process, another one in each forked child."""

    def append(self, event: dict[str, Any]) -> Appended:
        """Keep one event. Never raises and never waits; signal handlers and threads may call it at any time."""

    def open(self) -> None:
        """Take hold of the place; raises `JournalError` where it was asked for by name and cannot be used."""

    def tend(self) -> None:
        """Try again what is held back, and see that this process counts as alive: for a timer, every few seconds."""

    def close(self) -> None:
        """Give up the place and the liveness of this process."""


class JournalReader(Protocol):
    """The reading side, one object in one relay. Not thread-safe."""

    def resume(self, positions: Mapping[str, int]) -> None:
        """Go on where the index says that reading had come to."""

    def poll(self, limit: int) -> Batch:
        """At most `limit` events beyond what was settled; the same ones again until `settle` is called."""

    def settle(self, batch: Batch) -> None:
        """Forget what `batch` read: call it once the index has committed its events and positions."""

    def is_alive(self, process_id: str) -> bool:
        """False once the process is dead, or was never seen."""

    def backlog_bytes(self) -> int:
        """What is written and not yet settled."""

    def sync(self) -> None:
        """Make what is written and not yet settled survive a crash of the host."""
