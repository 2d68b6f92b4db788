"""What a relay does at intervals beside its work: makes segments durable, says how it stands, keeps its log small."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from xpander_celery import __version__
from xpander_celery.journal import JournalReader
from xpander_celery.journal.notices import Notice
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.index import Index
from xpander_celery.relay.launch import LOG
from xpander_celery.relay.policy import Gate
from xpander_celery.relay.rows import Phase
from xpander_celery.relay.status import HEARTBEAT_S, Status

_SYNC_EVERY_S = 0.3  # the loop turns every 0.2 s, and 0.5 s is promised
_STATUS_EVERY_S = 1.0
_LOG_EVERY_S = 60.0
_LOG_BYTES = 1024**2
_FORGET_EVERY_S = 3600.0

logger = logging.getLogger(__name__)


class Upkeep:
    """Call `tend` in every turn of the loop."""

    def __init__(
        self, config: RelayConfig, *, index: Index, reader: JournalReader, gate: Gate, clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._index = index
        self._reader = reader
        self._gate = gate
        self._started_at = clock()
        self._status: Status | None = None
        self._rounds = (
            (self._sync, _SYNC_EVERY_S),
            (self.write_status, _STATUS_EVERY_S),
            (self._cut_log, _LOG_EVERY_S),
            (self._forget, _FORGET_EVERY_S),
        )
        self._due_at = [self._started_at] * len(self._rounds)
        self._trouble = Notice(logger, "relay_upkeep", clock=clock)

    def tend(self, now: float) -> None:
        """Do what is due."""
        for number, (task, interval_s) in enumerate(self._rounds):
            if now >= self._due_at[number]:
                self._due_at[number] = now + interval_s
                try:
                    task(now)
                except OSError as error:
                    self._trouble.warn("The relay cannot keep its files: %s", error)

    def write_status(self, now: float) -> None:
        """Say how things stand, if anything changed, and that the relay lives."""
        since = self._index.waiting_since()
        status = Status(
            pid=os.getpid(),
            version=__version__,
            fingerprint=self._config.fingerprint,
            loaded_at=self._config.loaded_at,
            started_at=self._started_at,
            at=now,
            flow=self._gate.flow.value,
            reason=self._gate.reason,
            held_agents=self._gate.held_agents(),
            waiting=self._index.count(Phase.DUE),
            held=self._index.count(Phase.HELD),
            running=self._index.count(Phase.OPEN),
            dead=self._index.count(Phase.DEAD),
            oldest_waiting_s=0.0 if since is None else max(0.0, round(now - since, 1)),
            backlog_bytes=self._reader.backlog_bytes(),
            counters=dict(self._index.counters),
        )
        before = self._status
        is_news = before is None or replace(status, at=before.at, oldest_waiting_s=before.oldest_waiting_s) != before
        if is_news or (before is not None and now - before.at >= HEARTBEAT_S):
            status.write(self._config.directory)
            self._status = status

    def _sync(self, now: float) -> None:
        self._reader.sync()

    def _forget(self, now: float) -> None:
        self._index.forget_gone(now - self._config.max_age_s)

    def _cut_log(self, now: float) -> None:
        """Begin a new log file, where output goes to one that has grown."""
        path = self._config.directory / LOG
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size > _LOG_BYTES and _is_open_as(path, 2):
                path.rename(path.with_suffix(".log.1"))
                fresh = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                os.dup2(fresh, 1)
                os.dup2(fresh, 2)
                os.close(fresh)


def _is_open_as(path: Path, descriptor: int) -> bool:
    """Whether this descriptor is open on this file."""
    mine, there = os.fstat(descriptor), path.stat()
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
