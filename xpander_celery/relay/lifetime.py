"""When a relay ends. Pure: what it sees is given."""

from __future__ import annotations

from enum import StrEnum

LINGER_S = 30.0


class Mode(StrEnum):
    """Why a relay runs."""

    WITH_WORKERS = "with workers"  # as long as any worker, and until it is drained
    STAY = "stay"  # until it is told to end
    ONCE = "once"  # until it is drained


class Lifetime:
    """Decides whether to go on. Times are in seconds, of any steady clock."""

    def __init__(self, mode: Mode, now: float, *, at_most_s: float | None = None) -> None:
        self.mode = mode
        self._deadline = now + at_most_s if at_most_s is not None else float("inf")
        self._worker_seen_at = now
        self._terminated_at: float | None = None
        self._is_relieved = False
        self.is_hurried = False  # not even what was begun is waited for

    def terminate(self, now: float) -> None:
        """A signal to end: the first lets what workers that end too have to say be delivered, the second ends it."""
        self.is_hurried = self._terminated_at is not None
        self._terminated_at = now

    def relieve(self) -> None:
        """Another relay is to take over."""
        self._is_relieved = True

    def is_over(self, now: float, *, has_workers: bool, is_quiet: bool, is_drained: bool) -> bool:
        """Whether to end now. Quiet: nothing can be done now. Drained: nothing is left to be delivered."""
        if has_workers:
            self._worker_seen_at = now
        if self.is_hurried or self._is_relieved or now >= self._deadline:
            return True
        if self.mode is Mode.ONCE:
            return is_drained or self._terminated_at is not None
        if self._terminated_at is not None:
            return (is_quiet and not has_workers) or now - self._terminated_at >= LINGER_S
        if self.mode is Mode.STAY or has_workers:
            return False
        return is_drained or now - self._worker_seen_at >= LINGER_S
