"""Whether the journal may still grow. It knows sizes of files and of the disk, nothing of what is in them.

Measuring costs as much as there are segments, so the processes of a host share the result: it lies in a file beside
the segments, each process adds what it wrote, and after a second, or longer where measuring is slow, it is made anew.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from xpander_celery.journal.segments import parse_name

SHARED_MEASURE = "journal.size"
DISK_SHARE = 0.9
PLENTY_BYTES = 8 * 1024**3  # more than segments and index take together by default

_LONGEST_STEP_BYTES = 1024**2  # so seldom that it is not seen in the 99th percentile of appends
_SHORTEST_STEP_BYTES = 16 * 1024
_STEPS_TO_LIMIT = 16
_VALID_S = 1.0
_VALID_PER_COST = 50.0  # so that measuring never takes more than 2 % of the time
_BLOCK_BYTES = 4096  # the least that a file takes on most file systems


class Capacity:
    """Answers for one process, which asks again whenever it has written as much as the last answer allowed."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._shared_path = str(directory / SHARED_MEASURE)
        self._max_bytes = max_bytes

    def allowance(self, written: int) -> int:
        """The bytes that may be written before asking again; `written` is what this process wrote since it last did.

        Raises OSError (ENOSPC) if the journal is full.
        """
        try:
            taken = self._taken_bytes(written)
            disk = os.statvfs(self._directory)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return _SHORTEST_STEP_BYTES  # nothing there, or nothing for us: what is wrong will show when it is opened
        room = self._max_bytes - taken
        if room <= 0:
            raise OSError(errno.ENOSPC, f"its segments take {taken} of {self._max_bytes} bytes")
        used = disk.f_blocks - disk.f_bfree
        if disk.f_bavail * disk.f_frsize < PLENTY_BYTES:
            room = min(room, int(DISK_SHARE * (used + disk.f_bavail) - used) * disk.f_frsize)
            if room <= 0:
                raise OSError(errno.ENOSPC, f"the disk is full to {DISK_SHARE:.0%}")
        return max(_SHORTEST_STEP_BYTES, min(_LONGEST_STEP_BYTES, room // _STEPS_TO_LIMIT))

    def _taken_bytes(self, written: int) -> int:
        now = time.time()
        measured_at, valid_s, counted = self._shared()
        if 0 <= now - measured_at < valid_s:
            taken = int(counted) + written
        else:
            measured_at = now
            started_at = time.monotonic()
            taken = segment_bytes(self._directory)
            valid_s = max(_VALID_S, _VALID_PER_COST * (time.monotonic() - started_at))
        self._share(f"{measured_at:20.6f} {valid_s:10.3f} {taken:20d}\n".encode())
        return taken

    def _shared(self) -> tuple[float, float, float]:
        try:
            descriptor = os.open(self._shared_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0.0, 0.0, 0.0
        try:
            measured_at, valid_s, counted = map(float, os.read(descriptor, 100).split())
        except ValueError:  # another process is writing it
            return 0.0, 0.0, 0.0
        finally:
            os.close(descriptor)
        return measured_at, valid_s, counted

    def _share(self, measure: bytes) -> None:
        """Overwrite in place, always the same length: ext4 begins to flush a file that is truncated and written."""
        try:
            descriptor = os.open(self._shared_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return  # a full disk: the next process measures for itself
        try:
            os.write(descriptor, measure)
        except OSError:
            return
        finally:
            os.close(descriptor)


def segment_bytes(directory: Path) -> int:
    """What all segments take on the disk together."""
    taken = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if parse_name(entry.name) is not None:
                try:
                    taken += -(-entry.stat().st_size // _BLOCK_BYTES) * _BLOCK_BYTES
                except FileNotFoundError:
                    continue  # settled in this moment
    return taken
