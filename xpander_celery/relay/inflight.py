"""Remembers over the relay's own death which reports it was at work on, so that one that kills it is found out.

A file of fixed slots in shared memory: a mark costs no system call, and the kernel keeps it when the process dies. A
slot tells apart the moments in which code runs for a report, and the time in which its answer is waited for: whoever
dies in the first is suspected of that report, while what kills a relay that only waits (an operator, the kernel that is
short of memory, chaos) has nothing to do with it.
"""

from __future__ import annotations

import mmap
import os
import struct
import types
from collections.abc import Coroutine, Generator
from pathlib import Path
from typing import Any, TypeVar

FILE = "relay.inflight"
_SLOT = struct.Struct("<q")  # 0: free; a row: code runs for it; a row below zero: it waits

_T = TypeVar("_T")


class InFlight:
    """One slot for each sending worker. A power cut may lose marks, which then accuse nobody.

    `suspects` are the rows that code ran for when an earlier relay died, `unanswered` those it waited for.
    """

    def __init__(self, directory: Path, slots: int) -> None:
        size = slots * _SLOT.size
        descriptor = os.open(directory / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            found = os.read(descriptor, 1 << 16)
            found = found[: len(found) // _SLOT.size * _SLOT.size]
            rows = [row for (row,) in _SLOT.iter_unpack(found)]
            self.suspects = [row for row in rows if row > 0]
            self.unanswered = [-row for row in rows if row < 0]
            os.ftruncate(descriptor, size)
            os.pwrite(descriptor, bytes(size), 0)  # real blocks: a hole would raise SIGBUS once the disk is full
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)

    def mark(self, slot: int, row: int) -> None:
        """This worker begins to work on the report in `row`."""
        _SLOT.pack_into(self._map, slot * _SLOT.size, row)

    def clear(self, slot: int) -> None:
        """It is done with it, whatever came of it."""
        _SLOT.pack_into(self._map, slot * _SLOT.size, 0)

    @types.coroutine
    def watching(self, slot: int, row: int, work: Coroutine[Any, Any, _T]) -> Generator[Any, Any, _T]:
        """Await `work` for the report in `row`, with a mark that says when its code runs and when it waits."""
        go_on: Any = work.send
        given: Any = None
        while True:
            _SLOT.pack_into(self._map, slot * _SLOT.size, row)
            try:
                awaited = go_on(given)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            _SLOT.pack_into(self._map, slot * _SLOT.size, -row)
            try:
                go_on, given = work.send, (yield awaited)
            except GeneratorExit:
                work.close()
                raise
            except BaseException as error:  # noqa: BLE001 - also a cancellation is for the work to see
                go_on, given = work.throw, error

    def close(self) -> None:
        self._map.close()
