"""The journal: the append-only, crash-safe place that events are written to. Layer 2.

Workers write (`Journal`), one relay reads (`JournalReader`). This module holds only what both sides and every kind of
journal agree on. A journal knows events and where they lie; it knows nothing of jobs, Celery or the platform.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    journal that may have to keep events until what they led to is delivered. `is_whole`: False where the journal could
    not be asked, so that more may be written.
    """

    events: list[Event] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)
    corrupt: int = 0
    dropped: int = 0
    size: int = 0
    finished: frozenset[str] = frozenset()
    receipts: tuple[str, ...] = ()
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class Term:
    """The right to read and to deliver, which one relay of a destination has at a time. It ends at `until`, of the
    reader's clock.

    Each term of a reader has another `number`. `is_continued` says that no other relay had a term since this one's
    index was written to, so that the index holds what is true.
    """

    number: int = 0
    until: float = float("inf")
    is_continued: bool = True


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

    def lead(self) -> Term | None:
        """Take or keep the right to read and to deliver; None while another relay has it. Call it in every turn."""

    def resume(self, positions: Mapping[str, int]) -> None:
        """Go on where the index says that reading had come to."""

    def poll(self, limit: int) -> Batch:
        """At most `limit` events beyond what was settled; the same ones again until `settle` is called."""

    def settle(self, batch: Batch) -> None:
        """Forget what `batch` read: call it once the index has committed its events and positions."""

    def acknowledge(self, receipts: Sequence[str]) -> bool:
        """Forget the events of these receipts, since what they led to is delivered; False: ask again later."""

    def share(self, name: str, value: Mapping[str, Any], *, lasts_s: int) -> None:
        """Tell the other relays of this destination, also the one that follows. May fail, and is logged then."""

    def shared(self, name: str) -> Mapping[str, Any] | None:
        """What the relay that leads, or led, said under this name."""

    def is_alive(self, process_id: str) -> bool:
        """False once the process is dead, or was never seen."""

    def backlog_bytes(self) -> int:
        """What is written and not yet settled."""

    def sync(self) -> None:
        """Make what is written and not yet settled survive a crash of the host."""

    def close(self) -> None:
        """Let another relay lead."""


class SoleReader:
    """The part of a reader that is nothing to do where there is but one relay: the lock of its directory says so."""

    def lead(self) -> Term | None:
        """Always."""
        return _ALWAYS

    def acknowledge(self, receipts: Sequence[str]) -> bool:
        """It gives no receipts."""
        return True

    def share(self, name: str, value: Mapping[str, Any], *, lasts_s: int) -> None:
        """There is nobody to tell."""

    def shared(self, name: str) -> Mapping[str, Any] | None:
        """Nobody said anything."""
        return None

    def close(self) -> None:
        """The lock is not this object's."""


_ALWAYS = Term()
