"""Log lines that do not flood: a lasting trouble is logged at most once a minute."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_INTERVAL_S = 60.0


class Notice:
    """One kind of trouble, logged when it begins and at most once a minute while it lasts."""

    def __init__(self, logger: logging.Logger, event: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._event = event
        self._clock = clock
        self._next_at = float("-inf")

    def warn(self, message: str, *arguments: object) -> None:
        """Log `message` unless that was done within the last minute."""
        now = self._clock()
        if now >= self._next_at:
            self._next_at = now + _INTERVAL_S
            self._logger.warning(message, *arguments, extra={"event": self._event})
