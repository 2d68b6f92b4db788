"""The one guard between our hooks and a user's jobs: what fails here is counted, logged at times, and goes no further.

Celery's signal dispatch swallows exceptions too (celery/utils/dispatch/signal.py, `Signal.send`), so a soft time limit
that lands while a hook runs would be lost. The guard lets the hook do its work once more, and has the limit raised
again as soon as the job's own code runs.
"""

from __future__ import annotations

import functools
import logging
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from enum import Enum
from types import FrameType
from typing import ParamSpec, TypeVar

from billiard.exceptions import SoftTimeLimitExceeded
from celery.utils.dispatch import Signal

from xpander_celery.recording.contained import log_quietly

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_LOGGED_EVERY_S = 60.0
_LOOKED_EVERY_S = 0.002
_RAISED_AGAIN_WITHIN_S = 60.0
_DISPATCH = Signal.send.__code__
_TRACER = "celery/app/trace.py"
_NOT_THE_USERS = ("celery.", "xpander_celery.")


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
            log_quietly(
                logger.exception,
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
            try:
                guard.note(hook.__qualname__)
            except SoftTimeLimitExceeded:
                if reraises_limit:
                    _raise_limit_again()
            return None

    return contained


def guarded_in_job(hook: Callable[P, T]) -> Callable[P, T | None]:
    """`guarded`, for what runs before or within a job's body: a soft time limit reaches that body in the end."""
    return guarded(hook, reraises_limit=True)


def _raise_limit_again() -> None:
    """Have the child's handler of soft time limits (billiard/pool.py, `soft_timeout_sighandler`) raise once more, as
    soon as its thread runs the job's own code again.
    """
    if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGUSR1)):
        threading.Thread(target=_raise_in_body, args=(threading.get_ident(),), daemon=True).start()


def _raise_in_body(job_thread: int) -> None:
    deadline = time.monotonic() + _RAISED_AGAIN_WITHIN_S
    while time.monotonic() < deadline:
        time.sleep(_LOOKED_EVERY_S)
        place = _place_of(sys._current_frames().get(job_thread))
        if place is _Place.BODY:  # it cannot leave there before the signal arrives: this thread holds the GIL
            signal.pthread_kill(job_thread, signal.SIGUSR1)
        if place is not _Place.AROUND:
            return


class _Place(Enum):
    """Where a thread is. AROUND a body is Celery's code, above all the dispatch that would swallow the limit."""

    BODY = 1
    AROUND = 2
    NO_JOB = 3


def _place_of(frame: FrameType | None) -> _Place:
    in_users_code = False
    while frame is not None:
        code = frame.f_code
        if code is _DISPATCH:
            return _Place.AROUND
        if code.co_name == "trace_task" and code.co_filename.endswith(_TRACER):
            return _Place.BODY if in_users_code else _Place.AROUND
        if not frame.f_globals.get("__name__", "").startswith(_NOT_THE_USERS):
            in_users_code = True
        frame = frame.f_back
    return _Place.NO_JOB
