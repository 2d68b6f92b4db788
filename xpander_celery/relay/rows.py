"""What a row of the index holds, and what may be asked of it. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from xpander_celery.relay.policy import Fate


class Phase(IntEnum):
    """Where a job stands. A row's `at` means: open: look again; due: send; held, settled and dead: since when."""

    OPEN = 0
    DUE = 1
    HELD = 2  # its agent is not known at the platform
    SETTLED = 3
    DEAD = 4

    @property
    def is_waiting(self) -> bool:
        """Whether there is a report that was not delivered yet."""
        return self in (Phase.DUE, Phase.HELD)


@dataclass(frozen=True, slots=True)
class Job:
    """One row. `since`: from when on it waits to be delivered.

    `digest` is that of the report which the platform has: empty where it may have another one, None where it has none
    for all that is known.
    """

    row: int
    job_id: str
    revision: int
    phase: Phase
    at: float
    since: float
    agent_id: str | None
    tries: int
    attempts: int
    crashes: int
    trimmed: bool
    size: int
    digest: bytes | None
    reason: str | None
    state: str


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be stored of a job. `state` None: as it was. `watch`: look again when one of these processes dies.

    `receipts` are of the events that led to this; the journal keeps those until the job is settled.
    """

    job_id: str
    phase: Phase
    at: float
    before: Job | None = None
    state: str | None = None
    agent_id: str | None = None
    watch: frozenset[str] = frozenset()
    reason: str | None = None
    receipts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one revision of a report. `at`: when it is due again. `digest` None: nothing was delivered."""

    row: int
    revision: int
    phase: Phase  # that it was in
    size: int
    fate: Fate
    at: float = 0.0
    counts: bool = False
    digest: bytes | None = None
    reason: str | None = None
