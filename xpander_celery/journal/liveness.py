"""One locked file per process says that the process is alive. It knows nothing of segments or events.

The file is opened once and never rotated. The kernel frees its lock with the process, however that ends, so a free
lock or a missing file means that the process is dead.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from xpander_celery.journal.locks import create_locked, is_abandoned

SUFFIX = ".alive"


def new_process_id() -> str:
    """A random id of 16 hexadecimal digits: process numbers come again, these do not."""
    return secrets.token_hex(8)


def announce(directory: Path, process_id: str) -> int:
    """Create the liveness file of this process; the descriptor returned keeps it alive."""
    return create_locked(directory / f"{process_id}{SUFFIX}")


def withdraw(directory: Path, process_id: str) -> None:
    """Say that the process is gone, as its death would."""
    (directory / f"{process_id}{SUFFIX}").unlink(missing_ok=True)


def has_file(directory: Path, process_id: str) -> bool:
    """Whether the liveness file is where its process put it."""
    return (directory / f"{process_id}{SUFFIX}").exists()


def is_alive(directory: Path, process_id: str) -> bool:
    """Whether the process still holds its liveness file."""
    return not is_abandoned(directory / f"{process_id}{SUFFIX}")


def process_of(name: str) -> str | None:
    """The process that a liveness file is of, None for another file."""
    return name.removesuffix(SUFFIX) if name.endswith(SUFFIX) else None


def processes_in(directory: Path) -> list[str]:
    """The processes that have a liveness file, alive or not; none where the directory cannot be read."""
    try:
        with os.scandir(directory) as entries:
            return [process_id for entry in entries if (process_id := process_of(entry.name)) is not None]
    except OSError:
        return []
