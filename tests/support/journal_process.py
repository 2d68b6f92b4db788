"""Programs that use a journal and are there to be killed: `python -m tests.support.journal_process ROLE DIRECTORY …`.

A writer keeps a ledger of its own, outside of the package: one line for each event of which `append` said `durable`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.journal import LeadingReader, sized
from xpander_celery.journal import Appended
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.reader import FileReader
from xpander_celery.journal.redis import writer as redis_writer

_ROOT = Path(__file__).parents[2]


@contextmanager
def running(role: str, directory: Path, *arguments: object, ready: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    """One such program, killed at the end if it still runs; `ready` waits for the byte by which it says that it is."""
    command = [sys.executable, "-m", "tests.support.journal_process", role, str(directory), *map(str, arguments)]
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE) as process:
        try:
            if ready:
                await_ready(process)
            yield process
        finally:
            process.kill()


def await_ready(process: subprocess.Popen[bytes]) -> None:
    """Wait for the byte by which a program says that it has begun."""
    assert process.stdout is not None
    assert process.stdout.read(1) == b"."


def ledger(path: Path) -> list[str]:
    """The ids that a ledger holds; a last line without its newline was not promised to anyone."""
    if not path.exists():
        return []
    return path.read_text().split("\n")[:-1]


def say_ready() -> None:
    os.write(1, b".")


def write(directory: Path, ledger_path: Path, name: str, size: int, pause_s: float) -> None:
    """Append for ever, each acknowledged event into the ledger."""
    journal = FileJournal(directory)
    ledger_file = os.open(ledger_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    journal.open()
    say_ready()
    number = 0
    while True:
        number += 1
        if journal.append(sized(f"{name}-{number}", size)) is Appended.DURABLE:
            os.write(ledger_file, f"job-{name}-{number}\n".encode())
        if pause_s:
            time.sleep(pause_s)


def fork_writers(directory: Path, ledgers: Path, children: int) -> None:
    """A worker: the parent holds the journal, its forked children append; their ids go into the ledgers' names."""
    journal = FileJournal(directory)
    journal.open()
    journal.append(sized("parent", 10))
    for _ in range(children):
        if os.fork() == 0:
            ledger_file = os.open(
                ledgers / f"{os.getpid()}-{journal.process_id}", os.O_WRONLY | os.O_CREAT | os.O_APPEND
            )
            number = 0
            while True:
                number += 1
                if journal.append(sized(f"{journal.process_id}-{number}", 200)) is Appended.DURABLE:
                    os.write(ledger_file, f"job-{journal.process_id}-{number}\n".encode())
                time.sleep(0.0005)
    (ledgers / f"parent-{journal.process_id}").touch()
    say_ready()
    signal.pause()


def write_half_and_die(directory: Path) -> None:
    """Be killed by SIGKILL when half of the third event is written."""
    journal = FileJournal(directory)
    journal.append(sized(1, 1000))
    journal.append(sized(2, 1000))
    real_write = os.write

    def write_half(descriptor: int, data: bytes) -> int:
        real_write(descriptor, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    os.write = write_half
    journal.append(sized(3, 1000))


def relay(directory: Path, index_path: Path, die_after_commit: int) -> None:
    """Read into an index, a file that is replaced as a whole; die between a commit and its settling."""
    index = json.loads(index_path.read_text()) if index_path.exists() else {"positions": {}, "ids": []}
    reader = FileReader(directory)
    reader.resume(index["positions"])
    commits = 0
    say_ready()
    while True:
        batch = reader.poll(50)
        if batch.events:
            index["ids"] += [event.job_id for event in batch.events]
            index["positions"] = batch.positions
            fresh = index_path.with_suffix(".new")
            fresh.write_text(json.dumps(index))
            fresh.replace(index_path)
            commits += 1
            if commits == die_after_commit:
                os.kill(os.getpid(), signal.SIGKILL)
        elif not batch.finished:
            time.sleep(0.005)
        reader.settle(batch)


def write_to_redis(directory: Path, url: str, ledger_path: Path, name: str) -> None:
    """Append to Redis for ever, with a timer, each acknowledged event into the ledger; failures last a second."""
    redis_writer.SPILL_S, redis_writer.TEND_AGAIN_S = 1.0, 0.5
    journal = redis_writer.RedisJournal(url, "destination", spill=FileJournal(directory))
    ledger_file = os.open(ledger_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    journal.open()
    say_ready()
    number, tend_at = 0, 0.0
    while True:
        number += 1
        if journal.append(sized(f"{name}-{number}", 200)) is Appended.DURABLE:
            os.write(ledger_file, f"job-{name}-{number}\n".encode())
        if time.monotonic() >= tend_at:
            journal.tend()
            tend_at = time.monotonic() + 0.2
        time.sleep(0.001)


def relay_of_redis(index_path: Path, url: str) -> None:
    """Read from Redis into a file of ids, synced before each batch is settled."""
    reader = LeadingReader(url, "destination", lease_s=1.5)
    index = os.open(index_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    say_ready()
    while True:
        batch = reader.poll(50)
        os.write(index, "".join(f"{event.job_id}\n" for event in batch.events).encode())
        reader.settle(batch)
        if not batch.finished:
            time.sleep(0.01)


def write_always_synced(directory: Path, count: int) -> None:
    """Append with fsync="always", and say on standard output when each append has returned."""
    journal = FileJournal(directory, fsync="always")
    journal.open()
    for number in range(count):
        journal.append(sized(number, 100))
        os.write(1, b"returned\n")


def write_and_sync_as_a_relay(directory: Path, count: int) -> None:
    """Append, and let a reader sync what is not settled."""
    journal, reader = FileJournal(directory), FileReader(directory)
    for number in range(count):
        journal.append(sized(number, 100))
        os.write(1, b"appended\n")
        reader.sync()


if __name__ == "__main__":
    role, place, *rest = sys.argv[1:]
    if role == "write":
        write(Path(place), Path(rest[0]), rest[1], int(rest[2]), float(rest[3]))
    elif role == "fork":
        fork_writers(Path(place), Path(rest[0]), int(rest[1]))
    elif role == "half":
        write_half_and_die(Path(place))
    elif role == "relay":
        relay(Path(place), Path(rest[0]), int(rest[1]))
    elif role == "redis":
        write_to_redis(Path(place), rest[0], Path(rest[1]), rest[2])
    elif role == "redis-relay":
        relay_of_redis(Path(place), rest[0])
    elif role == "always":
        write_always_synced(Path(place), int(rest[0]))
    elif role == "sync":
        write_and_sync_as_a_relay(Path(place), int(rest[0]))
