"""Time as the relay sees it: given to everything that needs it, so that hours are tested in milliseconds."""

from __future__ import annotations

import time


class Clock:
    """Seconds since the epoch that never jump: the time of day is read once and then goes on steadily."""

    def __init__(self) -> None:
        # Linux's clock that goes on while the host sleeps; elsewhere the monotonic one is what there is
        self._source = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        self._offset = time.time() - time.clock_gettime(self._source)

    def now(self) -> float:
        """The relay's time."""
        return time.clock_gettime(self._source) + self._offset

    def wall(self) -> float:
        """The time of day as it is set now, to compare with what other hosts say."""
        return time.time()
