"""Contain what a user's values raise when they are read: anything. A soft time limit passes, since it is the job's.

It is told by its name (billiard/exceptions.py, `SoftTimeLimitExceeded`), for `recording` knows neither Celery nor its
pools.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from logging import Logger
from typing import Any

_LIMIT = "SoftTimeLimitExceeded"


def pass_limit(error: Exception) -> None:
    """Raise `error` again if it is a soft time limit. First thing in every `except Exception` of this package."""
    if any(kind.__name__ == _LIMIT for kind in type(error).__mro__):
        raise error


def text_of(value: Any) -> str | None:
    """An id as text; None where there is none or it cannot be read."""
    if value is None or type(value) is str:
        return value
    try:
        return str(value)
    except Exception as failure:  # noqa: BLE001 - the user's own `__str__`
        pass_limit(failure)
        return None


def log_quietly(log: Callable[..., None], *args: Any, **more: Any) -> None:
    """Log from within a job: a handler of the user may raise (`logging.Handler.handle` contains nothing)."""
    try:
        log(*args, **more)
    except Exception as failure:  # noqa: BLE001 - the user's own handler, and nowhere left to say so
        pass_limit(failure)


class Failures:
    """Counts what failed, by event, and logs each event the first time. Never raises into a job."""

    def __init__(self, logger: Logger) -> None:
        self.counts: Counter[str] = Counter()
        self._logger = logger

    def note(self, event: str, message: str, *args: object, job_id: str | None = None, exc_info: bool = True) -> None:
        """`message` with its `args` is logged as it is."""
        self.counts[event] += 1
        if self.counts[event] == 1:
            extra = {"event": event, "job_id": job_id}
            log_quietly(self._logger.warning, message, *args, exc_info=exc_info, extra=extra)
