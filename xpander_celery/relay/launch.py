"""Starts the relay from a worker, and asks it to flush. Light: neither HTTP client nor SQLite.

The relay is executed, never forked: a worker's memory, locks and threads are no place to deliver from.
"""

from __future__ import annotations

import logging
import os
import site
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.journals import ask
from xpander_celery.relay.mailbox import tell
from xpander_celery.relay.status import EXIT_LEFT, EXIT_TAKEN, Status, is_outdated, is_running

MODULE = "xpander_celery.relay"
LOG = "relay.log"
_STARTS_WITHIN_S = 10.0  # from execution to lock
_MAX_RESTART_WAIT_S = 300.0
_LONG_LIFE_S = 60.0
_LEAVES_WITHIN_S = 40.0  # it ends what it has begun to send
_ASK_AGAIN_S = 0.2
_MARGIN_S = 0.1  # for a relay that runs once to say how it went, so that whoever flushes gets its answer in time

logger = logging.getLogger(__name__)


class Launcher:
    """Keeps one relay running for a destination. Belongs to a worker's main process; not thread-safe.

    Nothing here raises for what may go wrong with a process; it is logged, and tried again with growing waits.
    """

    def __init__(
        self,
        config: RelayConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        command: Sequence[str] = (sys.executable, "-P", "-m", MODULE),
    ) -> None:
        self._config = config
        self._clock = clock
        self._now = now
        self._command = tuple(command)
        self._child: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._not_before = 0.0
        self._failures = 0
        self._told = ""
        self._ask_not_before = 0.0

    def tick(self) -> None:
        """Start a relay unless one runs; call it every few seconds. Takes microseconds where one runs."""
        try:
            self._reap()
            if is_running(self._config.directory):
                self._look_at_status()
            elif self._child is not None and self._clock() - self._started_at < _STARTS_WITHIN_S:
                return  # on its way to the lock
            elif self._clock() >= self._not_before and not self._is_outdated():
                self._start()
        except OSError as error:
            self._failed(f"cannot be started: {error}")

    def flush(self, timeout_s: float, *, foreground: bool = True) -> bool:
        """Whether everything that is written by now was delivered within `timeout_s`.

        Asks the relay; where none runs, one is run here in the foreground, unless `foreground` is False. What is not
        delivered in time is not lost: the next relay goes on.
        """
        deadline = self._clock() + timeout_s
        try:
            while (left_s := deadline - self._clock()) > 0:
                answer = ask(self._config, "flush", timeout_s=left_s)
                if answer is not None:
                    return bool(answer["drained"])
                if is_running(self._config.directory):
                    time.sleep(min(_ASK_AGAIN_S, max(0.0, deadline - self._clock())))  # it is about to lead
                    continue
                code = self._drain(deadline - self._clock()) if foreground else EXIT_LEFT
                if code != EXIT_TAKEN:
                    return code == 0
        except OSError as error:
            self._failed(f"cannot flush: {error}")
        return False

    def _drain(self, timeout_s: float) -> int:
        """Run a relay until everything is delivered; returns its exit code. Takes no longer, also where it does."""
        deadline = self._clock() + timeout_s
        child = self._execute("--once", "--for", f"{max(0.0, timeout_s - _MARGIN_S):.1f}")
        try:
            return child.wait(max(0.0, deadline - self._clock()))
        except subprocess.TimeoutExpired:
            child.terminate()
            _leave_running(child)
            return EXIT_LEFT

    def close(self) -> None:
        """Leave the relay to itself: it ends when it is drained and no worker is left."""
        self._reap()
        if self._child is not None:
            _leave_running(self._child)
            self._child = None

    def _start(self) -> None:
        self._reap()
        if self._child is not None:
            _leave_running(self._child)  # it runs, but not as the relay of this directory
        self._child = self._execute()
        self._started_at = self._clock()
        logger.info("relay started", extra={"event": "relay_started", "relay_pid": self._child.pid})

    def _execute(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Everything it says goes to its log: a pipe of the worker's would keep whoever reads that waiting."""
        if getattr(sys, "frozen", False):  # its executable is the user's program, which would start itself
            raise OSError("a frozen program has no interpreter; set relay='external' and run `xpander-celery relay`")
        self._config.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = os.open(self._config.directory / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return subprocess.Popen(
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                close_fds=True,
                start_new_session=True,
                env=dict(os.environ) | _import_path() | self._config.to_environ(),
            )
        finally:
            os.close(log)

    def _reap(self) -> None:
        """Without this an ended relay stays a zombie. `poll` accepts that somebody else reaped it (ECHILD)."""
        if self._child is None or self._child.poll() is None:
            return
        code, lived_s = self._child.returncode, self._clock() - self._started_at
        self._child = None
        if code == 0:
            self._failures = 0
        else:
            self._failures = 0 if lived_s > _LONG_LIFE_S else self._failures
            self._failed(f"ended with exit code {code}; {self._config.directory / LOG} says why")

    def _failed(self, what: str) -> None:
        self._failures += 1
        wait_s = min(_MAX_RESTART_WAIT_S, 2.0 ** min(self._failures, 16))
        self._not_before = self._clock() + wait_s
        logger.warning("relay %s", what, extra={"event": "relay_failed", "retry_in_s": wait_s})

    def _look_at_status(self) -> None:
        """Pass on why delivery is paused, and replace a relay whose settings are older than ours."""
        status = Status.read(self._config.directory)
        if status is None:
            return
        if status.reason != self._told:
            self._told = status.reason
            if status.reason:
                logger.warning("delivery is %s: %s", status.flow, status.reason, extra={"event": "delivery_paused"})
            else:
                logger.info("delivery goes on", extra={"event": "delivery_resumed"})
        is_older = status.fingerprint != self._config.fingerprint and status.loaded_at < self._config.loaded_at
        if is_older and not self._is_outdated() and self._clock() >= self._ask_not_before:
            self._ask_not_before = self._clock() + _LEAVES_WITHIN_S
            tell(self._config.directory, "leave", within_s=_LEAVES_WITHIN_S, fingerprint=status.fingerprint)

    def _is_outdated(self) -> bool:
        config = self._config
        return is_outdated(
            config.directory, fingerprint=config.fingerprint, loaded_at=config.loaded_at, now=self._now()
        )


def _import_path() -> dict[str, str]:
    """The variable that lets a fresh interpreter find this package where a program looks for it in places of its own (a
    vendored directory, a PEX). The working directory stays out, as by `-P`, unless the package lies there.
    """
    home = str(Path(__file__).parents[2])
    if home in (*site.getsitepackages(), site.getusersitepackages()):
        return {}
    here = os.path.realpath("")
    places = map(str, sys.path)  # somebody may have added a `Path`
    entries = [place for place in places if place == home or (place and os.path.realpath(place) != here)]
    return {"PYTHONPATH": os.pathsep.join(entries)}


def _leave_running(child: subprocess.Popen[bytes]) -> None:
    """Tell `Popen` that nobody will wait for this process: its destructor warns otherwise (subprocess.py, 3.11)."""
    if child.poll() is None:
        child.returncode = 0
