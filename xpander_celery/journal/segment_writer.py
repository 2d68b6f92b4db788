"""The files that one process holds open to write: its liveness file and its current segment.

It raises OSError (or JournalError for a place that may not be used) and leaves it to `files` what then becomes of an
event. Nothing here waits for another thread: signal handlers, threads and greenlets may be in any function at once.

The number of the segment's descriptor stays the same as long as the process lives: rotation and closing put another
file behind it (dup2). So a thread that has read the number and is about to write never meets a file of the user's
that got the number meanwhile. Where a program closes all descriptors that it finds, as daemons do, a file of the user's
may get the number all the same: so before a write that does not follow another one closely, and before it is closed or
replaced, it is asked which file is behind it.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

from xpander_celery.journal import liveness, location
from xpander_celery.journal.capacity import Capacity
from xpander_celery.journal.locks import create_locked, identity_of
from xpander_celery.journal.segments import segment_name

MAX_SEGMENT_BYTES = 4 * 1024**2
MAX_SEGMENT_AGE_S = 60.0
TRUSTED_S = 0.01  # for so long after a write its descriptor is taken to be what it was: asking takes 2 us

_NEVER = float("-inf")
_TRIES = 2
_FILES_KNOWN = 4  # the last files behind one descriptor: threads may rotate at once
_fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS has only the latter


class SegmentWriter:
    """Writes lines to the segments of this process, which it opens at the first line."""

    def __init__(self, directory: Path, *, max_bytes: int, sync_always: bool, clock: Callable[[], float]) -> None:
        self._directory = directory
        self._capacity = Capacity(directory, max_bytes)
        self._sync_always = sync_always
        self._clock = clock
        self._descriptor: dict[str, int] = {}  # at most one, under "segment": a dict, since its setdefault is atomic
        self._liveness: list[int] = []  # more than one only if threads met at the first line
        self._known: dict[
            int, tuple[tuple[int, int] | None, ...]
        ] = {}  # by descriptor: the files that may be behind it
        self._is_prepared = False
        self.forget()

    def forget(self) -> None:
        """Begin again as another process: what was inherited over a fork is closed, never unlocked."""
        self._let_go([*self._descriptor.values(), *self._liveness])
        self._descriptor = {}
        self._liveness = []
        self._known = {}
        self._numbers = itertools.count()
        self._generation = 0
        self._size = 0
        self._granted = self._left = 0  # bytes to write until size and capacity are looked at again
        self._rotate_at = _NEVER
        self._trusted_until = _NEVER
        self._is_torn = False
        self.process_id = liveness.new_process_id()

    def __del__(self) -> None:
        self._let_go([*self._descriptor.values(), *self._liveness])

    def open(self) -> None:
        """Become alive and create the first segment; the second time it does nothing."""
        if self._rotate_at == _NEVER:
            self._rotate(self._clock())

    def write(self, line: bytes) -> None:
        """Append one line by one system call; durable when it returns. A full journal is an OSError (ENOSPC) too."""
        now = self._clock()
        if (
            now >= self._trusted_until
            and self._rotate_at != _NEVER
            and not self._is_ours(self._descriptor.get("segment", -1))
        ):
            self._open_again(now)
        self._trusted_until = now + TRUSTED_S
        if self._left <= 0 or now >= self._rotate_at:
            self._look_around(now)
        self._left -= len(line)
        if self._is_torn or self._sync_always:
            self._write_with_care(line)
            return
        try:
            written = os.write(self._descriptor.get("segment", -1), line)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            self._open_again(now)
            self._write_with_care(line)
        else:
            if written != len(line):
                self._is_torn = True
                self._write_with_care(line)

    def _write_with_care(self, line: bytes) -> None:
        for _ in range(_TRIES):
            generation = self._generation
            if self._is_torn:
                line = b"\n" + line.lstrip()
            written = os.write(self._descriptor.get("segment", -1), line)
            self._is_torn = written != len(line)
            if self._is_torn:
                continue
            if self._sync_always:
                _fdatasync(self._descriptor.get("segment", -1))
                if generation != self._generation:
                    continue  # another thread rotated in between: what was synced may be another file
            return
        raise OSError(errno.ENOSPC, "only a part of a record was written")

    def _look_around(self, now: float) -> None:
        written = self._granted - self._left
        self._granted = self._left = 0
        self._size += written
        allowance = self._capacity.allowance(written)
        if self._size >= MAX_SEGMENT_BYTES or now >= self._rotate_at:
            self._rotate(now)
        self._granted = self._left = min(allowance, MAX_SEGMENT_BYTES - self._size)

    def _open_again(self, now: float) -> None:
        if self._rotate_at != _NEVER:  # closed behind our back, as daemons do: the numbers may be in use by now
            self._descriptor, self._liveness, self._rotate_at = {}, [], _NEVER
        self._granted = self._left = 0
        self._rotate(now)

    def _rotate(self, now: float) -> None:
        """Go on in a new segment. Two callers at once make one more than needed; the reader removes an empty one."""
        has_one = self._rotate_at != _NEVER
        if has_one:
            self._rotate_at = now + MAX_SEGMENT_AGE_S  # first of all, so that nobody else rotates meanwhile
            if self._size == 0:
                return
            self._size = 0
        try:
            fresh = self._create()
        except OSError:
            if has_one:
                return  # the old one serves for another term
            raise
        self._known[fresh] = (identity_of(fresh),)
        current = self._descriptor.setdefault("segment", fresh)
        if current != fresh and not self._is_ours(current):
            self._descriptor = {"segment": fresh}
        elif current != fresh:
            self._generation += 1
            self._known[current] = (*self._known[current][-_FILES_KNOWN:], *self._known.pop(fresh))
            os.dup2(fresh, current, inheritable=False)
            os.close(fresh)
        self._rotate_at = now + MAX_SEGMENT_AGE_S
        self._size = 0

    def announce(self) -> None:
        """Become alive; the second time it does nothing."""
        if not self._is_prepared:
            location.prepare(self._directory)
            self._is_prepared = True
        if not self._liveness:
            descriptor = liveness.announce(self._directory, self.process_id)
            self._known[descriptor] = (identity_of(descriptor),)
            self._liveness.append(descriptor)

    def _create(self) -> int:
        try:
            return self._create_in_place()
        except FileNotFoundError:
            self._is_prepared = False
            self._let_go(self._liveness)  # its file went with the directory
            return self._create_in_place()

    def _create_in_place(self) -> int:
        self.announce()
        fresh = create_locked(self._directory / segment_name(self.process_id, next(self._numbers)))
        if self._sync_always:
            _sync_directory(self._directory)
        return fresh

    def stay_alive(self) -> None:
        """Become alive again if somebody removed the liveness file, perhaps with the whole directory."""
        if self._liveness and not liveness.has_file(self._directory, self.process_id):
            self._is_prepared = False
            self._let_go(self._liveness)
            self.announce()

    def make_room(self) -> None:
        """Give up a segment that holds something, so that the reader may remove it; the next write opens another."""
        if self._size + self._granted - self._left:
            self._release()

    def _release(self) -> None:
        current = self._descriptor.get("segment")
        if current is not None and self._rotate_at != _NEVER:
            self._rotate_at = _NEVER
            if not self._is_ours(current):
                self._descriptor = {}
                return
            nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)  # a write to it fails with EBADF
            self._known[current] = (*self._known[current], identity_of(nothing))
            os.dup2(nothing, current, inheritable=False)
            os.close(nothing)

    def close(self) -> None:
        """Give up the segment and the liveness of this process."""
        self._release()
        if self._liveness:
            liveness.withdraw(self._directory, self.process_id)
            self._let_go(self._liveness)

    def _is_ours(self, descriptor: int) -> bool:
        """Whether a file is behind it that was put there here."""
        identity = identity_of(descriptor)
        return identity is not None and identity in self._known.get(descriptor, ())

    def _let_go(self, descriptors: list[int]) -> None:
        while descriptors:
            descriptor = descriptors.pop()
            if self._is_ours(descriptor):
                os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
