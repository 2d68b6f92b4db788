"""The files by which a relay can be seen from outside: its lock, and its status. Light: the standard library.

Whoever holds the lock owns the index and the reading side of the journal. The kernel frees it with the process,
so a free lock means that no relay runs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

LOCK = "relay.lock"
STATUS = "relay.json"
WANTED = "relay.wanted"

# How a relay ends that was to deliver everything once. Any other relay ends with 0 when another one holds the lock.
EXIT_TAKEN = 73
EXIT_LEFT = 75  # something is still waiting
EXIT_UNUSABLE = 78  # its settings or its index are none that it can work with

HEARTBEAT_S = 5.0  # a status is written at least as often

_TESTED_FOR_S = 0.5  # others test the lock by taking it for an instant
_WANTED_FOR_S = 15.0  # several ticks of the worker that wants it


class RelayLock:
    """The right to be the relay of a directory, held until `release` or the end of the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, directory: Path) -> Self | None:
        """The lock, or None where another relay holds it."""
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _TESTED_FOR_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return cls(descriptor)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    return None
                time.sleep(0.02)

    def release(self) -> None:
        os.close(self._descriptor)


def is_running(directory: Path) -> bool:
    """Whether a relay holds the lock of this directory."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # closing alone would not free it if another thread forked in between: the child holds the same open file
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@dataclass(frozen=True, slots=True)
class Status:
    """What a relay says of itself. It is true as of `at` (seconds since the epoch); `counters` are never reset.

    `waiting` are reports that are due or will be tried again, `held` wait for an unknown agent, `running` are jobs
    without an end so far. `flow` and `reason` say whether the platform takes reports, `held_agents` who waits and why.
    Where relays share a journal, one of them `leads`; one that stands by counts nothing, and says who the `leader` is.
    """

    pid: int
    version: str
    fingerprint: str
    loaded_at: float
    started_at: float
    at: float
    host: str = ""
    leads: bool = True
    leader: str = ""
    flow: str = "flowing"
    reason: str = ""
    held_agents: dict[str, str] = field(default_factory=dict)
    waiting: int = 0
    held: int = 0
    running: int = 0
    dead: int = 0
    oldest_waiting_s: float = 0.0
    backlog_bytes: int = 0
    counters: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """The last status written in this directory, None where there is none that can be read."""
        try:
            return cls.of(json.loads((directory / STATUS).read_bytes()))
        except (OSError, ValueError):
            return None

    @staticmethod
    def age_s(directory: Path) -> float | None:
        """Since when it stands there, by the clock of files: that of the relay does not follow the time of day."""
        try:
            return abs(time.time() - (directory / STATUS).stat().st_mtime)
        except OSError:
            return None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self | None:
        """The status that these values are, None where they are none."""
        try:
            return cls(**{name: values[name] for name in cls.__slots__ if name in values})
        except TypeError:
            return None

    def write(self, directory: Path) -> None:
        """Replace the status of this directory; a reader sees the old one or the new one."""
        write_whole(directory / STATUS, json.dumps(asdict(self)).encode())


def is_outdated(directory: Path, *, fingerprint: str, loaded_at: float, now: float) -> bool:
    """Whether a live worker wants a relay with newer settings, so that one with these is not to be started.

    If none does, this call says for a while that these are wanted. Of workers with different settings on one host the
    newest thus win, whichever of them first sees that no relay runs.
    """
    path = directory / WANTED
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):  # then nobody said anything
        other = json.loads(path.read_bytes())
        is_newer = other["fingerprint"] != fingerprint and other["loaded_at"] > loaded_at
        if is_newer and abs(now - other["at"]) < _WANTED_FOR_S:
            return True
    write_whole(path, json.dumps({"fingerprint": fingerprint, "loaded_at": loaded_at, "at": now}).encode())
    return False


def write_whole(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 so that nobody ever sees half of it. Raises OSError, and then leaves nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            if os.write(descriptor, content) < len(content):  # the last of the room was less than that
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
