"""Files that are locked from the first moment under their name, and the question whether a lock is free.

A lock belongs to the open file, not to the process: it is free once the last descriptor of it is gone, so also when
no write to it can be under way. Readers ask with a shared lock, so that two of them do not see each other.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from pathlib import Path

_TEMPORARY = ".new"
_TEMPORARY_LIFETIME_S = 60.0


def create_locked(path: Path) -> int:
    """Create `path`, empty, mode 0600, and return its descriptor: append-only, closed on exec, locked.

    The file gets its name only when it is locked, so nobody can take it for one that its writer has left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary.rename(path)
    except BaseException:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
        raise
    return descriptor


def identity_of(descriptor: int) -> tuple[int, int] | None:
    """Which file is behind `descriptor` (device and inode); None where none is."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def is_free(descriptor: int) -> bool:
    """Whether nobody else has the file of `descriptor` open and locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_abandoned(path: Path) -> bool:
    """Whether the process that locked `path` is dead, or there is no such file. In doubt it is not."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        return is_free(descriptor)
    finally:
        os.close(descriptor)


def is_stale_temporary(path: Path) -> bool:
    """Whether `path` is what a process left that was killed while it created a locked file."""
    if not (path.name.startswith(".") and path.name.endswith(_TEMPORARY)):
        return False
    try:
        age_s = time.time() - path.stat().st_mtime
    except OSError:
        return False
    return age_s > _TEMPORARY_LIFETIME_S and is_abandoned(path)
