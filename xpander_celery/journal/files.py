"""The writing side of the file journal: what becomes of an event, and never a trouble for the job that it is about.

An append is one system call. What cannot be written now is kept in memory (`HELD_EVENTS`, `HELD_BYTES`), tried again by
later appends at most once a second, and beyond that the newest is dropped and counted. Once writing works again, a
note of the count goes into the journal, so that the relay knows it too.
"""

from __future__ import annotations

import errno
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from xpander_celery.errors import JournalError
from xpander_celery.journal import Appended, Counters, location
from xpander_celery.journal.notices import Notice
from xpander_celery.journal.segment_writer import SegmentWriter
from xpander_celery.journal.segments import drop_note, frame
from xpander_celery.journal.trimming import record_text

HELD_EVENTS = 1000
HELD_BYTES = 8 * 1024**2

_RETRY_S = 1.0
_CATCH_UP_BYTES = 256 * 1024  # of what was held, written by one append
_DURABLE = Appended.DURABLE  # a look-up takes 0.2 µs on Python 3.11
_logger = logging.getLogger(__name__)


class FileJournal:
    """Writes the events of this process to segments in `directory`, one folder of one destination.

    `required` says that the user named the directory: then `open` raises where it cannot be used. Otherwise it logs
    one warning and the journal `is_off`. In a forked child it starts anew by itself, with another `process_id`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        fsync: Literal["interval", "always"] = "interval",
        max_bytes: int = 1024**3,
        required: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.is_off = False
        self._required = required
        self._clock = clock
        self._segments = SegmentWriter(directory, max_bytes=max_bytes, sync_always=fsync == "always", clock=clock)
        self._begin()
        _renew_in_children(weakref.ref(self))

    def _begin(self) -> None:
        self.counters = Counters()
        self._held: deque[bytes] = deque()
        self._is_troubled = self.is_off  # or something is held, or a drop is not noted
        self._retry_at = 0.0
        self._unnoted_drops = 0
        self._trouble = Notice(_logger, "journal_trouble", clock=self._clock)
        self._drops = Notice(_logger, "journal_dropped", clock=self._clock)

    @property
    def process_id(self) -> str:
        """The liveness id of this process, another one in each forked child."""
        return self._segments.process_id

    def open(self) -> None:
        """Become alive; raises `JournalError` for a directory that the user named and that cannot be used."""
        try:
            self._segments.open()
        except (OSError, JournalError) as error:
            if self._required:
                raise JournalError(f"the journal cannot be opened: {error}") from error
            self._switch_off(error)
        else:
            location.warn_of_network_file_system(self.directory)

    def announce(self) -> None:
        """Become alive without a segment; raises OSError or `JournalError`."""
        self._segments.announce()

    def append(self, event: dict[str, Any]) -> Appended:
        """Keep one event: one system call, and no wait."""
        text, is_trimmed = record_text(event)
        if is_trimmed:
            self.counters.trimmed += 1
        if text is None:
            return self._drop("it cannot be encoded")
        line = frame(text)
        if self._is_troubled:
            return self._append_in_trouble(line)
        try:
            self._segments.write(line)
        except (OSError, JournalError) as error:
            self._meet_trouble(error)
            return self._hold(line)
        self.counters.durable += 1
        return _DURABLE

    def _append_in_trouble(self, line: bytes) -> Appended:
        if self._clock() < self._retry_at or not self._write(line):
            return self._hold(line)
        self.counters.durable += 1
        self._catch_up()
        return Appended.DURABLE

    def tend(self) -> None:
        """Try again what is held, and stay alive if the directory was replaced: for a timer of a quiet process."""
        if self._is_troubled and self._clock() >= self._retry_at:
            self._catch_up()
        try:
            self._segments.stay_alive()
        except (OSError, JournalError) as error:
            self._meet_trouble(error)

    def close(self) -> None:
        """Write what is held, as far as that is possible now, and give up segment and liveness."""
        self._retry_at = 0.0
        while (self._held or self._unnoted_drops) and self._catch_up():
            continue
        if self._held:
            _logger.warning("%d events were lost with this process", len(self._held), extra={"event": "journal_lost"})
        try:
            self._segments.close()
        except OSError as error:
            self._trouble.warn("The journal %s could not be closed: %s", self.directory, error)

    def _write(self, line: bytes) -> bool:
        if self.is_off:
            return False
        try:
            self._segments.write(line)
        except (OSError, JournalError) as error:
            self._meet_trouble(error)
            return False
        return True

    def _meet_trouble(self, trouble: OSError | JournalError) -> None:
        """Decide what a failed write means: off for good, or trying again in a second."""
        self._is_troubled = True
        if isinstance(trouble, JournalError) and not self._required:
            self._switch_off(trouble)
            return
        self._retry_at = self._clock() + _RETRY_S
        self._trouble.warn("The journal %s cannot be written, events are held in memory: %s", self.directory, trouble)
        if isinstance(trouble, OSError) and trouble.errno in (errno.ENOSPC, errno.EDQUOT):
            with suppress(OSError):  # no descriptor left: the segment stays, which is no worse
                self._segments.make_room()

    def _catch_up(self) -> bool:
        """Write a part of what is held, then the note of what was dropped; False if writing still fails."""
        left = _CATCH_UP_BYTES
        while left > 0:
            try:
                line = self._held[0]
            except IndexError:
                break
            if not self._write(line):
                return False
            try:
                self._held.remove(line)  # only now: a signal handler may raise before, and twice is better than never
            except ValueError:
                continue  # another thread wrote it too
            left -= len(line)
            self.counters.buffered -= 1
            self.counters.durable += 1
        if not self._held:
            noted, self._unnoted_drops = self._unnoted_drops, 0
            if noted and not self._write(frame(drop_note(noted))):
                self._unnoted_drops += noted
                return False
            self._is_troubled = self.is_off
        return True

    def _hold(self, line: bytes) -> Appended:
        if self.is_off:
            self.counters.dropped += 1
            return Appended.DROPPED
        held = self._held
        if len(held) >= HELD_EVENTS or sum(map(len, held.copy())) + len(line) > HELD_BYTES:
            return self._drop("the journal cannot be written and memory is full")
        held.append(line)
        self.counters.buffered += 1
        return Appended.BUFFERED

    def _drop(self, reason: str) -> Appended:
        self.counters.dropped += 1
        self._unnoted_drops += 1
        self._is_troubled = True
        self._drops.warn("An event was dropped: %s (%d so far in this process)", reason, self.counters.dropped)
        return Appended.DROPPED

    def _switch_off(self, trouble: object) -> None:
        if not self.is_off:
            self.is_off = self._is_troubled = True
            _logger.warning(
                "Reporting is off: no journal (%s). Set XPANDER_CELERY_JOURNAL to a directory that can be written",
                trouble,
                extra={"event": "journal_off"},
            )

    def _start_anew(self) -> None:
        self._segments.forget()
        self._begin()


def _renew_in_children(journal: weakref.ref[FileJournal]) -> None:
    """Let the journal start anew in each forked child, for as long as it lives."""

    def renew() -> None:
        inherited = journal()
        if inherited is not None:
            inherited._start_anew()

    os.register_at_fork(after_in_child=renew)
