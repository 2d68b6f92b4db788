"""The one guard between our hooks and a user's jobs: what fails here is counted, logged at times, and goes no further.

Celery's signal dispatch swallows exceptions too (celery/utils/dispatch/signal.py, `Signal.send`), so a soft time limit
that lands while a hook runs would be lost. The guard lets the hook do its work once more, and has the limit raised
again a moment later, in the job.
"""

from __future__ import annotations

import functools
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_LOGGED_EVERY_S = 60.0
_RAISED_AGAIN_AFTER_S = 0.05


class Guard:
    """Counts what failed, by hook, and logs each hook's failures at most once a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures: Counter[str] = Counter()
        self._clock = clock
        self._logged_at: dict[str, float] = {}

    def note(self, hook: str) -> None:
        """Called while the exception is handled."""
        self.failures[hook] += 1
        now = self._clock()
        if now - self._logged_at.get(hook, -_LOGGED_EVERY_S) >= _LOGGED_EVERY_S:
            self._logged_at[hook] = now
            logger.exception(
                "%s failed, %d times so far; the job goes on",
                hook,
                self.failures[hook],
                extra={"event": "hook_failed", "hook": hook},
            )


def guarded(hook: Callable[P, T], *, reraises_limit: bool = False) -> Callable[P, T | None]:
    """A method of an object with a `guard`, that never raises; it returns None where it failed.

    Interrupted by a soft time limit it is called a second time, so it must bear that. `reraises_limit`: for hooks that
    run before or within a job's body.
    """

    @functools.wraps(hook)
    def contained(*args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            try:
                return hook(*args, **kwargs)
            except SoftTimeLimitExceeded:
                if reraises_limit:
                    _raise_limit_again()
                return hook(*args, **kwargs)
        except Exception:  # noqa: BLE001 - the guard
            guard: Guard = args[0].guard  # type: ignore[attr-defined]
            guard.note(hook.__qualname__)
            return None

    return contained


def guarded_in_job(hook: Callable[P, T]) -> Callable[P, T | None]:
    """`guarded`, for what runs before or within a job's body: a soft time limit reaches that body in the end."""
    return guarded(hook, reraises_limit=True)


def _raise_limit_again() -> None:
    """Have the child's handler of soft time limits (billiard/pool.py, `soft_timeout_sighandler`) raise once more."""
    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGUSR1)
    if not callable(handler):
        return
    job_thread = threading.get_ident()
    again = threading.Timer(_RAISED_AGAIN_AFTER_S, signal.pthread_kill, (job_thread, signal.SIGUSR1))
    again.daemon = True
    again.start()
