"""Runs a command that must not outlive whoever started it. Executed as a script, so it imports nothing of ours.

    python leash.py --grace SECONDS [--relays DIRECTORY] [--remove DIRECTORY] -- COMMAND…

Its standard input is a pipe from the one who holds the leash. When that ends, because it was closed or because its
holder was killed in whatever way, the command gets SIGTERM, and SIGKILL for its whole process group after the grace.
`--relays` names a journal: relays that the command started there live in sessions of their own, and go with it.
`--remove` names a directory that its holder removes, so it is removed here if the pipe ended without a goodbye.
Ends with the command's exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_LOOK_EVERY_S = 0.05


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--grace", type=float, required=True)
    parser.add_argument("--relays", type=Path)
    parser.add_argument("--remove", type=Path)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(arguments.command, stdin=subprocess.DEVNULL, process_group=0)
    said, has_ended = b"", False
    while child.poll() is None and not has_ended:
        heard = _listen()
        said, has_ended = said + (heard or b""), heard == b""
    _stop(child, arguments.grace)
    if arguments.relays is not None:
        _stop_relays(arguments.relays)
    if arguments.remove is not None and has_ended and not said:
        shutil.rmtree(arguments.remove, ignore_errors=True)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _listen() -> bytes | None:
    """What the holder says: nothing for a moment (None), a goodbye, or that the pipe has ended (empty)."""
    ready, _, _ = select.select([0], [], [], _LOOK_EVERY_S)
    return os.read(0, 4096) if ready else None


def _stop(child: subprocess.Popen[bytes], grace_s: float) -> None:
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(grace_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM where only zombies are left
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _stop_relays(journal: Path) -> None:
    for lock in journal.glob("**/relay.lock"):
        deadline = time.monotonic() + 5
        while _is_held(lock) and time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError, KeyError):
                os.kill(json.loads((lock.parent / "relay.json").read_bytes())["pid"], signal.SIGKILL)
            time.sleep(_LOOK_EVERY_S)


def _is_held(lock: Path) -> bool:
    with contextlib.suppress(FileNotFoundError), lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
