"""The reading side of the file journal, for the one relay of a directory.

Segments are tailed while their writers live. A segment whose lock is free gets no more lines, so it is read to its
end and, once the index has what it held, removed. What cannot be read is kept aside below `corrupt`, bounded.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from xpander_celery.events import Event, UnreadableEventError, decode
from xpander_celery.journal import Batch, SoleReader, liveness
from xpander_celery.journal.locks import is_free, is_stale_temporary
from xpander_celery.journal.notices import Notice
from xpander_celery.journal.segments import dropped_in, lines, parse_name

QUARANTINE = "corrupt"

_CHUNK_BYTES = 1024**2
_BATCH_BYTES = 4 * 1024**2
_SWEEP_S = 5.0
_QUARANTINED_FILES = 500
_fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS has only the latter
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Found:
    """A batch while it is gathered."""

    limit: int
    events: list[Event] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    corrupt: int = 0
    dropped: int = 0
    size: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.events) >= self.limit or self.size >= _BATCH_BYTES


class FileReader(SoleReader):
    """Reads the segments in `directory`. One object, in the process that holds the directory's lock.

    `bury` is called with each dead process before the file that tells of its death is removed; if it raises, the file
    stays, and so does the error.
    """

    def __init__(
        self,
        directory: Path,
        *,
        decode: Callable[[bytes], Event] = decode,
        clock: Callable[[], float] = time.monotonic,
        bury: Callable[[str], None] | None = None,
    ) -> None:
        self._bury = bury
        self._directory = directory
        self._decode = decode
        self._clock = clock
        self._positions: dict[str, int] = {}  # no entry: not read yet
        self._round: deque[str] = deque()  # the segments not looked at since the directory was last listed
        self._synced: dict[str, int] = {}
        self._sweep_at = float("-inf")
        self._damage = Notice(_logger, "journal_corrupt", clock=clock)
        self._newer = Notice(_logger, "journal_newer", clock=clock)
        self._trouble = Notice(_logger, "journal_trouble", clock=clock)

    def resume(self, positions: Mapping[str, int]) -> None:
        """Go on where the index says that reading had come to."""
        self._positions = dict(positions)

    def poll(self, limit: int) -> Batch:
        """At most `limit` events (and about 4 MiB) beyond what was settled; what is not settled comes again.

        A batch below both limits holds all that was written before the call.
        """
        is_new_round = not self._round
        if is_new_round:
            self._begin_round()
        found = _Found(limit)
        positions = dict(self._positions)
        self._read_round(found, positions)
        if not (is_new_round or found.is_full):  # so that a batch that is not full has seen every segment
            self._begin_round()
            self._read_round(found, positions)
        if found.corrupt:
            self._damage.warn(
                "%d unreadable lines in the journal %s: kept aside below %s", found.corrupt, self._directory, QUARANTINE
            )
        return Batch(
            events=found.events,
            positions={name: at for name, at in positions.items() if at},
            corrupt=found.corrupt,
            dropped=found.dropped,
            size=found.size,
            finished=frozenset(found.finished),
        )

    def settle(self, batch: Batch) -> None:
        """Remove the segments that `batch` finished, and go on behind the others."""
        for name in batch.finished:
            (self._directory / name).unlink(missing_ok=True)
        self._positions = {name: at for name, at in batch.positions.items() if name not in batch.finished}
        if self._clock() >= self._sweep_at:
            self._sweep_at = self._clock() + _SWEEP_S
            self._sweep()

    def is_alive(self, process_id: str) -> bool:
        """False once the process is dead, or was never seen."""
        return liveness.is_alive(self._directory, process_id)

    def backlog_bytes(self) -> int:
        """What is written and not yet settled."""
        return sum(max(0, size - self._positions.get(name, 0)) for name, size in self._sizes().items())

    def sync(self) -> None:
        """Make what is written and not yet settled survive a crash of the host: at least every 500 ms."""
        sizes = self._sizes()
        self._synced = {name: at for name, at in self._synced.items() if name in sizes}
        unsynced = {
            name: size
            for name, size in sizes.items()
            if size > max(self._positions.get(name, 0), self._synced.get(name, 0))
        }
        try:
            for name in unsynced:
                _sync(self._directory / name)
            if not unsynced.keys() <= self._synced.keys():
                _sync(self._directory)
        except FileNotFoundError:
            return  # removed by hand; the next call sees what is left
        self._synced |= unsynced

    def _begin_round(self) -> None:
        names = set()
        for entry in self._listing():
            segment = parse_name(entry)
            if segment is None:
                continue
            if segment.is_newer:
                self._newer.warn(
                    "%s was written by a newer release and is left alone: let a relay of that release read it",
                    self._directory / entry,
                )
            else:
                names.add(entry)
        self._round.extend(sorted(names))
        self._positions = {name: at for name, at in self._positions.items() if name in names}

    def _read_round(self, found: _Found, positions: dict[str, int]) -> None:
        while self._round and not found.is_full:
            name = self._round.popleft()
            try:
                positions[name] = self._read(name, positions.get(name, 0), found)
            except FileNotFoundError:
                positions.pop(name, None)
            except OSError as error:
                self._trouble.warn("A segment of the journal %s cannot be read: %s", self._directory, error)
            if found.is_full and name not in found.finished:
                self._round.appendleft(name)

    def _read(self, name: str, position: int, found: _Found) -> int:
        """Take lines from one segment, and return the position behind them."""
        descriptor = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            is_final = is_free(descriptor)  # asked before reading: what is read after it is all there will ever be
            while not found.is_full:
                chunk = os.pread(descriptor, _CHUNK_BYTES, position)
                if not chunk and is_final:
                    found.finished.append(name)
                taken = self._take(name, position, chunk, is_final and len(chunk) < _CHUNK_BYTES, found)
                if not taken:
                    break
                position += taken
        finally:
            os.close(descriptor)
        return position

    def _take(self, name: str, position: int, chunk: bytes, is_end: bool, found: _Found) -> int:
        """Take lines from one chunk, and return how many bytes they are."""
        taken = 0
        for line in lines(chunk, is_end=is_end):
            debris = line.debris
            if line.text is not None and not self._understand(line.text, found):
                debris = line.text
            if debris is not None:
                found.corrupt += 1
                self._quarantine(f"{name}.{position + taken}", debris)
            found.size += line.end - taken
            taken = line.end
            if found.is_full:
                break
        return taken

    def _understand(self, text: bytes, found: _Found) -> bool:
        try:
            dropped = dropped_in(text)
            if dropped is None:
                found.events.append(self._decode(text))
            else:
                found.dropped += dropped
        except (UnreadableEventError, ValueError):
            return False
        return True

    def _quarantine(self, name: str, debris: bytes) -> None:
        """Keep what could not be read. The name is made of its place, so that reading it again keeps it once."""
        folder = self._directory / QUARANTINE
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if sum(1 for _ in folder.iterdir()) >= _QUARANTINED_FILES:
                return
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return
        except OSError as error:
            self._trouble.warn("Unreadable lines could not be kept aside in %s: %s", folder, error)
            return
        with os.fdopen(descriptor, "wb") as file:
            file.write(debris)

    def _sizes(self) -> dict[str, int]:
        sizes = {}
        for name in self._listing():
            segment = parse_name(name)
            if segment is not None and not segment.is_newer:
                with suppress(FileNotFoundError):  # removed in this moment
                    sizes[name] = (self._directory / name).stat().st_size
        return sizes

    def _listing(self) -> list[str]:
        try:
            with os.scandir(self._directory) as entries:
                return [entry.name for entry in entries]
        except FileNotFoundError:
            return []

    def _sweep(self) -> None:
        """Remove what dead processes left: liveness files that no segment refers to, files half created."""
        names = self._listing()
        with_segments = {segment.process_id for name in names if (segment := parse_name(name)) is not None}
        for name in names:
            process_id = liveness.process_of(name)
            if process_id is not None:
                is_stale = process_id not in with_segments and not self.is_alive(process_id)
            else:
                is_stale = is_stale_temporary(self._directory / name)
            if is_stale:
                if process_id is not None and self._bury is not None:
                    self._bury(process_id)
                (self._directory / name).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _fdatasync(descriptor)
    finally:
        os.close(descriptor)
