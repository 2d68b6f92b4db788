"""Brings what was spilled to the file segments of this host over to Redis. It judges no event and decodes none."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from xpander_celery.events import Event
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.reader import FileReader
from xpander_celery.journal.redis.client import Client, Command, RefusedError
from xpander_celery.journal.redis.keys import ADD, DROPPED_FIELD, EVENT_FIELD, GONE, GONE_FOR_S, Keys, add_command

_LOCK = "spool.lock"
_EVENTS = 100
_CALL_BYTES = 256 * 1024
_AT_ONCE_S = 0.2  # of one tick of the worker's timer
_logger = logging.getLogger(__name__)


class Spill(FileJournal):
    """Where events go while Redis cannot be reached. Without a place for it, they are dropped then, and counted."""

    def _switch_off(self, trouble: object) -> None:
        if not self.is_off:
            self.is_off = self._is_troubled = True
            _logger.warning(
                "While Redis cannot be reached, events are dropped: there is no place for them (%s). "
                "Set XDG_STATE_HOME to a directory that can be written",
                trouble,
                extra={"event": "journal_spill_off"},
            )


class Spool:
    """The segments in `directory`, of which one process of the host at a time brings over what they hold.

    What was added but not settled when that process died is added again: events are the same when they come twice.
    """

    def __init__(self, directory: Path, keys: Keys, max_entries: int, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._keys = keys
        self._max_entries = max_entries
        self._clock = clock
        self._lock: int | None = None
        self._client: Client | None = None
        decode = cast(Callable[[bytes], Event], bytes)
        self._reader = FileReader(directory, decode=decode, bury=self._say_gone)

    def drain(self, client: Client) -> bool:
        """Bring over as much as a moment allows; whether that was all that is this process's to bring. Raises OSError
        or `RefusedError`, and then loses nothing.
        """
        if not self._is_locked():
            return True
        self._client = client
        until = self._clock() + _AT_ONCE_S
        while self._clock() < until:
            batch = self._reader.poll(_EVENTS)
            commands = [self._add(EVENT_FIELD, text) for text in cast(list[bytes], batch.events)]
            if batch.dropped:
                commands.append(self._add(DROPPED_FIELD, b"%d" % batch.dropped))
            for portion in _portions(commands):
                _call(client, portion)
            self._reader.settle(batch)
            if not commands:
                return True
        return False

    def let_go(self) -> None:
        """Leave the segments to another process."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    forget = let_go  # in a forked child: closing the copy leaves the parent's lock alone

    def _say_gone(self, process_id: str) -> None:
        """Of a dead process, before the file goes that tells it: a heartbeat may be good for an hour."""
        if self._client is not None:
            self._client.ask("SET", self._keys.alive(process_id), GONE, "EX", GONE_FOR_S)

    def _add(self, field: str, value: bytes) -> Command:
        return add_command(self._keys, self._max_entries, field, value)

    def _is_locked(self) -> bool:
        if self._lock is not None:
            return True
        try:
            descriptor = os.open(self._directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return False  # no directory, so nothing was spilled
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._lock = descriptor
        return True


def _portions(commands: list[Command]) -> list[list[Command]]:
    """The commands, in calls that a slow line can take within a job's patience."""
    portions: list[list[Command]] = []
    size = _CALL_BYTES
    for command in commands:
        value: Any = command[-1]
        if size + len(value) > _CALL_BYTES:
            portions.append([])
            size = 0
        portions[-1].append(command)
        size += len(value)
    return portions


def _call(client: Client, commands: list[Command]) -> None:
    try:
        client.tell(commands)
    except RefusedError as error:
        if error.code != "NOSCRIPT":
            raise
        client.ask("SCRIPT", "LOAD", ADD)
        client.tell(commands)
