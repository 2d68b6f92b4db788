"""What a relay does at intervals beside its work: makes segments durable, says how it stands, keeps its log small."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from xpander_celery import __version__
from xpander_celery.journal import JournalReader
from xpander_celery.journal.notices import Notice
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.index import Index
from xpander_celery.relay.journals import STATUS
from xpander_celery.relay.launch import LOG
from xpander_celery.relay.policy import Gate
from xpander_celery.relay.rows import Phase
from xpander_celery.relay.schema import IndexFullError
from xpander_celery.relay.status import HEARTBEAT_S, Status

_SYNC_EVERY_S = 0.3  # the loop turns every 0.2 s, and 0.5 s is promised
_STATUS_EVERY_S = 1.0
_LOG_EVERY_S = 60.0
_LOG_BYTES = 1024**2
_FORGET_EVERY_S = 3600.0
_STATUS_LASTS_S = 30

logger = logging.getLogger(__name__)


class Upkeep:
    """Call `tend` in every turn of the loop."""

    def __init__(
        self,
        config: RelayConfig,
        *,
        index: Index,
        reader: JournalReader,
        gate: Gate,
        clock: Callable[[], float],
        leads: Callable[[], bool],
    ) -> None:
        self._config = config
        self._index = index
        self._reader = reader
        self._gate = gate
        self._leads = leads
        self._started_at = clock()
        self._host = socket.gethostname()
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
                except (OSError, IndexFullError) as error:
                    self._trouble.warn("The relay cannot keep its files: %s", error)

    @property
    def knows_leader(self) -> bool:
        """Whether another relay was heard of lately."""
        return self._status is not None and bool(self._status.leader)

    def write_status(self, now: float) -> None:
        """Say how things stand, if anything changed, and that the relay lives."""
        status = self._as_leader(now) if self._leads() else self._as_standby(now)
        before = self._status
        is_news = before is None or replace(status, at=before.at, oldest_waiting_s=before.oldest_waiting_s) != before
        if is_news or (before is not None and now - before.at >= HEARTBEAT_S):
            status.write(self._config.directory)
            self._reader.share(STATUS, asdict(status), lasts_s=_STATUS_LASTS_S)
            self._status = status

    def _as_leader(self, now: float) -> Status:
        since = self._index.waiting_since()
        return replace(
            self._plain(now),
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

    def _as_standby(self, now: float) -> Status:
        said = self._reader.shared(STATUS)
        leader = f"{said.get('host')} (process {said.get('pid')})" if said else ""
        return replace(self._plain(now), leads=False, leader=leader, counters=dict(self._index.counters))

    def _plain(self, now: float) -> Status:
        return Status(
            pid=os.getpid(),
            version=__version__,
            fingerprint=self._config.fingerprint,
            loaded_at=self._config.loaded_at,
            started_at=self._started_at,
            at=now,
            host=self._host,
        )

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
