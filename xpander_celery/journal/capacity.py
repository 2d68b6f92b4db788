"""Whether the journal may still grow. It knows sizes of files and of the disk, nothing of what is in them.

Measuring costs as much as there are segments, so the processes of a host share the result: it lies in a file beside
the segments and serves them all for a second.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from xpander_celery.journal.segments import parse_name

SHARED_MEASURE = "journal.size"
DISK_SHARE = 0.9
PLENTY_BYTES = 8 * 1024**3  # more than segments and index take together by default
_STEP_BYTES = 256 * 1024
_SHARED_FOR_S = 1.0


class Capacity:
    """Answers for one process, which asks before each write; measured again whenever it has written 256 KiB more."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._step_bytes = min(_STEP_BYTES, max_bytes // 16)
        self._left_bytes = 0

    def full_for(self, size: int) -> str | None:
        """What stands against writing `size` bytes, in words for a log line; None if nothing does."""
        if self._left_bytes < size:
            obstacle = self._obstacle()
            if obstacle is not None:
                return obstacle
            self._left_bytes = self._step_bytes
        self._left_bytes -= size
        return None

    def _obstacle(self) -> str | None:
        try:
            taken = self._taken_bytes()
            disk = os.statvfs(self._directory)
        except FileNotFoundError:
            return None  # nothing there yet
        if taken >= self._max_bytes:
            return f"its segments take {taken} of {self._max_bytes} bytes"
        used = disk.f_blocks - disk.f_bfree
        free_bytes = disk.f_bavail * disk.f_frsize
        if used >= DISK_SHARE * (used + disk.f_bavail) and free_bytes < PLENTY_BYTES:
            return f"the disk is full to {DISK_SHARE:.0%}"
        return None

    def _taken_bytes(self) -> int:
        shared = self._directory / SHARED_MEASURE
        try:
            with shared.open("rb") as file:
                if 0 <= time.time() - os.fstat(file.fileno()).st_mtime < _SHARED_FOR_S:
                    return int(file.read())
        except (FileNotFoundError, ValueError):  # none yet, or another process is writing it
            pass
        taken = segment_bytes(self._directory)
        try:
            descriptor = os.open(shared, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError:
            return taken  # a full disk; the next process measures for itself
        try:
            os.write(descriptor, b"%d" % taken)
        except OSError:
            return taken
        finally:
            os.close(descriptor)
        return taken


def segment_bytes(directory: Path) -> int:
    """What all segments take on the disk together."""
    taken = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if parse_name(entry.name) is not None:
                try:
                    taken += entry.stat().st_blocks * 512
                except FileNotFoundError:
                    continue  # settled in this moment
    return taken
