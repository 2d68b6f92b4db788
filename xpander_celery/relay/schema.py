"""The index as a file: how it is created, migrated, bounded, and put aside when it is damaged.

It knows tables and pages, and nothing of what they mean (see `index.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from xpander_celery.errors import JournalError

FILE = "index.db"
RESERVE = "index.reserve"
RESERVE_BYTES = 16 * 1024**2
_PAGE_BYTES = 8192  # a row with its texts is about 2 KB: 4096 would hold one, and waste the rest
_CACHE_KIB = 6 * 1024
_QUARANTINES_KEPT = 2
_NOT_FROM_SQLITE = 0xFF

# One script for each version; a new file gets them all. Texts lie apart from what changes while a report waits, so that
# an acknowledgement rewrites a hundred bytes and not two thousand.
SCRIPTS = (
    """
    CREATE TABLE jobs (
        row INTEGER PRIMARY KEY,
        job_key INTEGER NOT NULL,
        job_id TEXT NOT NULL,
        revision INTEGER NOT NULL,
        phase INTEGER NOT NULL,
        at REAL NOT NULL,
        since REAL NOT NULL,
        agent_id TEXT,
        tries INTEGER NOT NULL DEFAULT 0,
        attempts INTEGER NOT NULL DEFAULT 0,
        crashes INTEGER NOT NULL DEFAULT 0,
        trimmed INTEGER NOT NULL DEFAULT 0,
        size INTEGER NOT NULL,
        digest BLOB,
        watch TEXT,
        reason TEXT
    );
    CREATE TABLE states (row INTEGER PRIMARY KEY, state TEXT NOT NULL);
    CREATE INDEX by_key ON jobs (job_key);
    CREATE INDEX open ON jobs (at) WHERE phase = 0;
    CREATE INDEX due ON jobs (at) WHERE phase = 1;
    CREATE INDEX held ON jobs (agent_id, since) WHERE phase = 2;
    CREATE INDEX settled ON jobs (at) WHERE phase = 3;
    CREATE INDEX dead ON jobs (at) WHERE phase = 4;
    CREATE INDEX watching ON jobs (row) WHERE watch IS NOT NULL;
    CREATE TABLE positions (segment TEXT PRIMARY KEY, position INTEGER NOT NULL) WITHOUT ROWID;
    CREATE TABLE gone (process_id TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
    CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    """,
    # Of events that the journal keeps until their job is settled; those of row 0 it may forget.
    """
    CREATE TABLE receipts (receipt TEXT PRIMARY KEY, row INTEGER NOT NULL) WITHOUT ROWID;
    CREATE INDEX receipts_of ON receipts (row);
    """,
)

logger = logging.getLogger(__name__)


class IndexNewerError(JournalError):
    """A later release wrote the index; it is left alone."""


class IndexFullError(JournalError):
    """The index is at its cap, or the disk is full; nothing of the transaction was kept."""


class IndexDamagedError(JournalError):
    """The index cannot be read; `quarantine` makes room for a fresh one."""


def connect(path: Path, *, max_bytes: int) -> sqlite3.Connection:
    """Open the index for its one owner, creating or migrating it. Raises the errors above."""
    with translated(path):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        database = sqlite3.connect(path, isolation_level=None, timeout=5.0)
        try:
            _prepare(database, path, max_bytes)
        except BaseException:
            database.close()
            raise
    return database


def _prepare(database: sqlite3.Connection, path: Path, max_bytes: int) -> None:
    database.execute("PRAGMA locking_mode = EXCLUSIVE")  # before all else, so that there is no shared memory file
    version = int(database.execute("PRAGMA user_version").fetchone()[0])
    if version > len(SCRIPTS):
        raise IndexNewerError(
            f"{path} has version {version}, which a later release of xpander-celery wrote; this one reads up to "
            f"{len(SCRIPTS)}. Nothing was changed: install that release again, or move the file away to start anew."
        )
    database.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    database.execute(f"PRAGMA journal_size_limit = {RESERVE_BYTES}")
    database.execute(f"PRAGMA max_page_count = {max_bytes // _PAGE_BYTES}")
    for number, script in enumerate(SCRIPTS[version:], version + 1):
        database.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Errors of SQLite as errors of ours."""
    try:
        yield
    except sqlite3.Error as error:
        kind = getattr(error, "sqlite_errorcode", _NOT_FROM_SQLITE) & 0xFF
        if kind == sqlite3.SQLITE_FULL:
            raise IndexFullError(f"{path}: {error}") from error
        is_undecodable = kind == _NOT_FROM_SQLITE and isinstance(error, sqlite3.OperationalError)
        if kind in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or is_undecodable:
            raise IndexDamagedError(f"{path}: {error}") from error
        raise JournalError(f"{path}: {error}") from error


def quarantine(directory: Path) -> Path:
    """Move a damaged index aside, for inspection, and return where it is now. The last two are kept."""
    stem = f"index.damaged-{time.time_ns()}"
    for suffix in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            (directory / f"{FILE}{suffix}").rename(directory / f"{stem}.db{suffix}")
    kept = sorted(directory.glob("index.damaged-*.db"))[-_QUARANTINES_KEPT:]
    for path in directory.glob("index.damaged-*"):
        if not any(path.name.startswith(other.name) for other in kept):
            path.unlink(missing_ok=True)
    return directory / f"{stem}.db"


class Reserve:
    """A file that only takes up room, given back when the disk is full, so that acknowledgements can be written."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / RESERVE

    def release(self) -> None:
        self._path.unlink(missing_ok=True)

    def room(self) -> int:
        """What is left of the disk, in bytes."""
        found = os.statvfs(self._path.parent)
        return found.f_bavail * found.f_frsize

    def restore(self) -> bool:
        """Whether the reserve exists, created now if there is room for it twice."""
        if self._path.exists():
            return True
        if self.room() < 2 * RESERVE_BYTES:
            return False
        temporary = self._path.with_suffix(".new")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                for _ in range(16):
                    os.write(descriptor, bytes(RESERVE_BYTES // 16))
            finally:
                os.close(descriptor)
            temporary.replace(self._path)
        except OSError:
            temporary.unlink(missing_ok=True)
            return False
        return True
