"""Remembers over the relay's own death which reports it was sending, so that one that kills it is found out.

A file of fixed slots in shared memory: a mark costs no system call, and the kernel keeps it when the process dies.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

FILE = "relay.inflight"
_SLOT = struct.Struct("<q")


class InFlight:
    """One slot for each sending worker. A power cut may lose marks, which then accuse nobody."""

    def __init__(self, directory: Path, slots: int) -> None:
        size = slots * _SLOT.size
        descriptor = os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            found = os.read(descriptor, 1 << 16)
            found = found[: len(found) // _SLOT.size * _SLOT.size]
            self.suspects = [row for (row,) in _SLOT.iter_unpack(found) if row > 0]
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, bytes(size), 0)  # real blocks: a hole would raise SIGBUS once the disk is full
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)

    def mark(self, slot: int, row: int) -> None:
        """This worker is about to send the report in `row`."""
        _SLOT.pack_into(self._map, slot * _SLOT.size, row)

    def clear(self, slot: int) -> None:
        """It is done with it, whatever came of it."""
        _SLOT.pack_into(self._map, slot * _SLOT.size, 0)

    def close(self) -> None:
        self._map.close()
