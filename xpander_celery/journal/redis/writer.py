"""The writing side of the Redis journal: appends to a stream, and to file segments while Redis is not to be had.

A job waits for Redis at most once `TIMEOUT_S`; after a failure the process writes to files for `SPILL_S` and then tries
again. The worker's main process brings the files over (`tend`), and sends heartbeats for every process of its host
whose liveness file is locked, since a child has no timer of its own.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable
from typing import Any

from xpander_celery.errors import JournalError
from xpander_celery.journal import Appended, Counters, liveness
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.notices import Notice
from xpander_celery.journal.redis import checks
from xpander_celery.journal.redis.client import Client, Command, Refusal, RefusedError
from xpander_celery.journal.redis.keys import (
    ADD,
    ALIVE,
    EVENT_FIELD,
    GONE,
    GONE_FOR_S,
    Keys,
    add_command,
    max_entries_of,
)
from xpander_celery.journal.redis.spool import Spool
from xpander_celery.journal.trimming import record_text
from xpander_celery.redis_address import Address

TIMEOUT_S = 0.25
SPILL_S = 30.0
TEND_AGAIN_S = 10.0  # sooner than jobs do: no job waits for the timer
HEARTBEAT_S = 60  # how long one counts, where a timer sends the next
LONG_HEARTBEAT_S = 3600  # where none can be relied on: a script, or a worker whose jobs keep its timer from running

_NEVER = float("-inf")
_logger = logging.getLogger(__name__)


class RedisJournal:
    """Appends the events of this process to the stream of `destination`, and to `spill` when that fails.

    In a forked child it starts anew by itself, with another `process_id`.
    """

    def __init__(
        self,
        url: str,
        destination: str,
        *,
        spill: FileJournal,
        max_bytes: int = 1024**3,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = Client(Address.parse(url), timeout_s=TIMEOUT_S)
        self._keys = Keys(destination)
        self._spill = spill
        self._max_entries = max_entries_of(max_bytes)
        self._spool = Spool(spill.directory, self._keys, self._max_entries, clock)
        self._clock = clock
        self._is_main = False  # of a worker: its timer calls `tend`
        self._is_child = False  # of such a process, which beats for it
        self._spill_until = self._tend_at = _NEVER
        self._begin()
        _renew_in_children(weakref.ref(self))

    def _begin(self) -> None:
        self._durable = self._trimmed = 0
        self._open_attempts = 0
        self._is_timer_free = False  # it was seen to run while a job did
        self._beat_at = _NEVER
        self._trouble = Notice(_logger, "journal_spills", clock=self._clock)

    @property
    def process_id(self) -> str:
        """The liveness id of this process, another one in each forked child."""
        return self._spill.process_id

    @property
    def counters(self) -> Counters:
        """What this process appended, to Redis and to files."""
        spilled = self._spill.counters
        return Counters(
            durable=self._durable + spilled.durable,
            buffered=spilled.buffered,
            dropped=spilled.dropped,
            trimmed=self._trimmed + spilled.trimmed,
        )

    def open(self) -> None:
        """Become alive, as a worker's main process; raises `JournalError` for a Redis that would lose or refuse events.

        One that cannot be reached is no error: files take its place until it can.
        """
        self._spill.open()
        self._is_main = True
        try:
            self._client.resolve()
            checks.check(self._client)
            self._beat_for_host()
        except PermissionError as error:
            raise JournalError(f"{self._client.address}: {error}") from error
        except (OSError, RefusedError) as error:
            self._turn_to_files(error)

    def append(self, event: dict[str, Any]) -> Appended:
        """Keep one event; waits for Redis at most `TIMEOUT_S`, and for nothing during the `SPILL_S` after that."""
        self._count_attempts(event)
        if self._clock() < self._spill_until:
            return self._spill.append(event)
        text, is_trimmed = record_text(event)
        if text is None:
            return self._spill.append(event)  # which refuses and counts it
        try:
            self._add(text)
        except (OSError, RefusedError) as error:
            self._turn_to_files(error)
            return self._spill.append(event)
        self._durable += 1
        self._trimmed += is_trimmed
        return Appended.DURABLE

    def tend(self) -> None:
        """Beat for the processes of this host, and bring over what was spilled: for a timer, every few seconds."""
        self._spill.tend()
        self._is_timer_free |= self._open_attempts > 0
        if self._clock() < min(self._tend_at, self._spill_until):
            return
        try:
            if self._spill_until != _NEVER:
                self._client.resolve()  # its name may mean another place by now
            self._beat_for_host()
            self._spool.drain(self._client)
            self._spill_until = _NEVER
        except (OSError, RefusedError) as error:
            self._turn_to_files(error)

    def close(self) -> None:
        """Give up the liveness of this process."""
        self._spill.close()
        self._spool.let_go()
        if self._beat_at != _NEVER and self._clock() >= self._spill_until:
            try:
                self._client.ask("SET", self._keys.alive(self.process_id), GONE, "EX", GONE_FOR_S)
            except (OSError, RefusedError) as error:
                self._turn_to_files(error)
        self._beat_at = _NEVER
        self._client.forget()

    def _turn_to_files(self, trouble: Exception) -> None:
        self._spill_until = self._clock() + SPILL_S
        self._tend_at = self._clock() + TEND_AGAIN_S
        self._trouble.warn(
            "Redis at %s does not take events, for %d s they go to files in %s: %s",
            self._client.address, SPILL_S, self._spill.directory, trouble,
        )  # fmt: skip

    def _add(self, text: bytes) -> None:
        now = self._clock()
        beats = [self._own_beat()] if now >= self._beat_at else []
        reply = self._client.call([*beats, add_command(self._keys, self._max_entries, EVENT_FIELD, text)])[-1]
        if isinstance(reply, Refusal):
            if reply.code != "NOSCRIPT":
                raise RefusedError(reply)
            self._client.ask("SCRIPT", "LOAD", ADD)
            self._client.ask(*add_command(self._keys, self._max_entries, EVENT_FIELD, text))
        if beats:
            self._beat_at = now + self._heartbeat_s / 3

    @property
    def _is_beaten_for(self) -> bool:
        """Whether a timer sends heartbeats for this process while it runs jobs."""
        return self._is_child or (self._is_main and self._is_timer_free)

    @property
    def _heartbeat_s(self) -> int:
        return HEARTBEAT_S if self._is_beaten_for else LONG_HEARTBEAT_S

    def _count_attempts(self, event: dict[str, Any]) -> None:
        kind = event.get("kind")
        if kind == "started":
            self._open_attempts += 1
            if not self._is_beaten_for:
                self._beat_at = min(self._beat_at, 0.0)  # the timer, if there is one, may stand still from now on
        elif kind == "finished":
            self._open_attempts = max(0, self._open_attempts - 1)

    def _own_beat(self) -> Command:
        try:
            self._spill.announce()
        except (OSError, JournalError) as error:
            self._trouble.warn("There is no liveness file in %s: %s", self._spill.directory, error)
        return ["SET", self._keys.alive(self.process_id), ALIVE, "EX", self._heartbeat_s]

    def _beat_for_host(self) -> None:
        """Say of each process that has a liveness file here whether it lives."""
        beats: list[Command] = []
        for process_id in liveness.processes_in(self._spill.directory):
            is_alive = liveness.is_alive(self._spill.directory, process_id)
            word, lasts_s = (ALIVE, HEARTBEAT_S) if is_alive else (GONE, GONE_FOR_S)
            beats.append(["SET", self._keys.alive(process_id), word, "EX", lasts_s])
        if beats:
            self._client.tell(beats)
            self._beat_at = max(self._beat_at, 0.0)

    def _start_anew(self) -> None:
        self._client.forget()
        self._spool.forget()
        self._is_child, self._is_main = self._is_child or self._is_main, False
        self._begin()


def _renew_in_children(journal: weakref.ref[RedisJournal]) -> None:
    """Let the journal start anew in each forked child, for as long as it lives."""

    def renew() -> None:
        inherited = journal()
        if inherited is not None:
            inherited._start_anew()

    os.register_at_fork(after_in_child=renew)
