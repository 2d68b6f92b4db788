"""Relays and workers as processes of their own, there to be killed: `python -m tests.support.relay_process ROLE …`.

A role is a relay that dies at a certain point, or a writer that stands for a worker and keeps a ledger of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.waiting import until
from xpander_celery.journal import Appended, Journal
from xpander_celery.journal.files import FileJournal
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.status import Status, is_running

AGENT = "agent"
_ROOT = Path(__file__).parents[2]
_PLAIN = (sys.executable, "-P", "-m", "xpander_celery.relay")


@contextlib.contextmanager
def start_relay(
    config: RelayConfig, *options: str, role: str | None = None, ready: bool = True
) -> Iterator[subprocess.Popen[bytes]]:
    """A relay, killed at the end if it still runs; with a `role`, one that misbehaves."""
    command = _PLAIN if role is None else (sys.executable, "-m", "tests.support.relay_process", role)
    environ = {**os.environ, **config.to_environ(), "PYTHONPATH": str(_ROOT)}
    with (config.directory.parent / "relay-output.log").open("ab") as log:
        process = subprocess.Popen([*command, *options], cwd=_ROOT, env=environ, stdout=log, stderr=log)
    try:
        if ready:
            until(lambda: is_running(config.directory) or process.poll() is not None, what="a relay that runs")
        yield process
    except BaseException:
        print(said(config))
        raise
    finally:
        process.kill()
        process.wait()


def said(config: RelayConfig) -> str:
    """What relays of this directory said."""
    return (config.directory.parent / "relay-output.log").read_text()


def status(config: RelayConfig) -> Status:
    """How the relay says that things stand."""
    return until(lambda: Status.read(config.directory), what="a status")


def counter(config: RelayConfig, name: str) -> int:
    return status(config).counters.get(name, 0)


class Jobs:
    """Jobs of this process, as a worker that is one process would write them."""

    def __init__(self, directory: Path, journal: Journal | None = None) -> None:
        self.journal = journal if journal is not None else FileJournal(directory)
        self.journal.open()

    def started(self, job_id: str, *, agent_id: str = AGENT, **facts: Any) -> Appended:
        process_id = self.journal.process_id
        known = {"task": "shop.charge", "agent_id": agent_id, "input": "42", **facts}
        return self._append(job_id, kind="started", child=process_id, owner=process_id, facts=known)

    def finished(self, job_id: str, **more: Any) -> Appended:
        return self._append(job_id, **{"kind": "finished", "outcome": "succeeded", "duration_s": 0.5, **more})

    def job(self, job_id: str, *, agent_id: str = AGENT, **more: Any) -> bool:
        """A whole job; whether the journal promised to keep it."""
        self.started(job_id, agent_id=agent_id)
        return self.finished(job_id, result="done", **more) is Appended.DURABLE

    def close(self) -> None:
        self.journal.close()

    def _append(self, job_id: str, **event: Any) -> Appended:
        return self.journal.append({"v": 1, "job_id": job_id, "attempt_id": "1", "at": time.time(), **event})


class DiesAfterSending:
    """A backend that kills its process, once, after the platform has taken a report and before it can say so."""

    def __init__(self) -> None:
        from xpander_celery.backend import Backend

        self._backend = Backend()
        self._mark = RelayConfig.from_environ(os.environ).directory.parent / "died-after-sending"

    async def areport_external_task(self, **values: Any) -> None:
        await self._backend.areport_external_task(**values)
        if not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class DiesOfPoisonousAnswers:
    """A backend that some answers of the platform kill its process in, long after it sent the report."""

    def __init__(self) -> None:
        from xpander_celery.backend import Backend

        self._backend = Backend()

    async def areport_external_task(self, **values: Any) -> None:
        await self._backend.areport_external_task(**values)
        if values["id"].startswith("poison"):
            os.kill(os.getpid(), signal.SIGKILL)


def die_of_poison(report: Any) -> Any:
    """A hook that some reports kill the relay in."""
    if report.id.startswith("poison"):
        os.kill(os.getpid(), signal.SIGKILL)
    return report


def die_before_settling() -> int:
    """A relay that is killed, once, when the index has a batch and its segment is not removed yet."""
    from xpander_celery.journal.reader import FileReader
    from xpander_celery.relay.process import main

    mark = RelayConfig.from_environ(os.environ).directory.parent / "died-before-settling"
    settle = FileReader.settle

    def die(self: FileReader, batch: Any) -> None:
        if batch.finished and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        settle(self, batch)

    FileReader.settle = die  # type: ignore[method-assign]
    return main(sys.argv[2:], os.environ)


def note_syncs() -> int:
    """A relay that notes up to where a segment is safe from a power cut, and since when: `time name size` a line.

    Safe is what was synced, and what the index has, which is synced with each of its transactions.
    """
    from xpander_celery.journal import reader
    from xpander_celery.relay.process import main

    notes = RelayConfig.from_environ(os.environ).directory.parent / "syncs"
    sync, settle = reader._fdatasync, reader.FileReader.settle

    def note(name: str, size: int) -> None:
        with notes.open("a") as file:
            file.write(f"{time.monotonic()} {name} {size}\n")

    def synced(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size  # what is written later may not be on the disk yet
        sync(descriptor)
        note(Path(f"/proc/self/fd/{descriptor}").readlink().name, size)

    def settled(self: reader.FileReader, batch: Any) -> None:
        for name, position in batch.positions.items():
            note(name, position)
        settle(self, batch)

    reader._fdatasync = synced
    reader.FileReader.settle = settled  # type: ignore[method-assign]
    return main(sys.argv[2:], os.environ)


def worker(directory: Path, ledger: Path, children: int) -> None:
    """A worker's main process, which forks children; each child starts a job and never ends it."""
    journal = FileJournal(directory)
    journal.open()
    owner = journal.process_id
    for number in range(children):
        if os.fork() == 0:
            event = {"v": 1, "kind": "started", "job_id": f"job-{number}", "attempt_id": "1", "at": time.time()}
            event |= {"child": journal.process_id, "owner": owner, "facts": {"task": "t", "agent_id": AGENT}}
            assert journal.append(event) is Appended.DURABLE
            with ledger.open("a") as file:
                file.write(f"job-{number} {os.getpid()}\n")
            signal.pause()
    signal.pause()


if __name__ == "__main__":
    if sys.argv[1] == "die-before-settling":
        sys.exit(die_before_settling())
    elif sys.argv[1] == "note-syncs":
        sys.exit(note_syncs())
    elif sys.argv[1] == "worker":
        worker(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
