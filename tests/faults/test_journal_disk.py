"""Disks that fill up, and what reaches them when (faults 27 and 29)."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.journal import drain, progress, sized
from tests.support.relay_process import AGENT, Jobs, start_relay
from tests.support.sandbox import start_sandbox
from tests.support.waiting import until
from xpander_celery.journal import Appended
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.reader import FileReader
from xpander_celery.relay.config import RelayConfig

ROOT = Path(__file__).parents[2]
SIZE = 8 * 1024**2


@contextlib.contextmanager
def mounted(place: Path, size: int) -> Iterator[Path]:
    """A file system of this size that is really mounted."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("only root on Linux can mount a small file system")
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not let root mount: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    with mounted(tmp_path / "disk", SIZE) as place:
        yield place


def fill(disk: Path) -> Path:
    """Take all the space that is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096, 512, 1):
            while True:
                try:
                    file.write(b"x" * size)
                except OSError:
                    break
    return ballast


def append_until(journal: FileJournal, wanted: Appended, name: str, kept: list[str]) -> float:
    """Append small events until one is `wanted`; the slowest append, in seconds."""
    slowest, deadline = 0.0, time.monotonic() + 30
    for number in range(10**9):
        assert time.monotonic() < deadline, f"no append was {wanted}"
        before = time.perf_counter()
        answer = journal.append(sized(f"{name}-{number}", 400))
        slowest = max(slowest, time.perf_counter() - before)
        if answer is not Appended.DROPPED:
            kept.append(f"job-{name}-{number}")
        if answer is wanted:
            return slowest
    raise AssertionError


@pytest.mark.fault(27)
def test_a_disk_that_others_fill_costs_only_counted_events_and_recovers_unaided(small_disk: Path) -> None:
    """Fault 27: full to the last byte, then freed."""
    directory = small_disk / "state" / "destination"
    journal, reader = FileJournal(directory), FileReader(directory)
    journal.open()
    kept: list[str] = []
    append_until(journal, Appended.DURABLE, "before", kept)
    ballast = fill(small_disk)
    slowest = append_until(journal, Appended.BUFFERED, "full", kept)
    slowest = max(slowest, append_until(journal, Appended.DROPPED, "memory", kept))
    assert slowest < 0.5
    dropped = journal.counters.dropped
    assert dropped == 1
    ballast.unlink()
    slowest = append_until(journal, Appended.DURABLE, "freed", kept)
    assert slowest < 0.5
    dropped = journal.counters.dropped
    journal.close()
    batches = []
    while (batch := reader.poll(500)).events or batch.finished:
        reader.settle(batch)
        batches.append(batch)
    found = [event.job_id for batch in batches for event in batch.events]
    assert sorted(found) == sorted(kept)
    assert sum(batch.dropped for batch in batches) == dropped
    assert journal.counters.buffered == 0


@pytest.mark.fault(27)
def test_a_disk_that_the_journal_fills_is_left_at_nine_tenths_and_drains(small_disk: Path) -> None:
    """Fault 27, with the journal itself as the one that fills: no other program meets a full disk."""
    directory = small_disk / "state" / "destination"
    journal, reader = FileJournal(directory), FileReader(directory)
    kept: list[str] = []
    append_until(journal, Appended.BUFFERED, "full", kept)
    assert 0.85 < 1 - shutil.disk_usage(small_disk).free / SIZE < 0.95
    found = drain(reader)
    append_until(journal, Appended.DURABLE, "drained", kept)
    journal.close()
    found += drain(reader)
    assert sorted(found) == sorted(kept)


@pytest.mark.fault(27)
def test_a_worker_that_starts_on_a_full_disk_reports_once_it_is_freed(small_disk: Path) -> None:
    """Fault 27 at the first event of a child, whose files do not exist yet."""
    directory = small_disk / "state" / "destination"
    directory.mkdir(parents=True)
    ballast = fill(small_disk)
    journal = FileJournal(directory)
    assert journal.append(progress(1)) is Appended.BUFFERED
    ballast.unlink()
    kept: list[str] = []
    append_until(journal, Appended.DURABLE, "freed", kept)
    journal.close()
    assert sorted(drain(FileReader(directory))) == sorted(["job-1", *kept])


@pytest.mark.fault(27)
def test_a_relay_on_a_disk_that_is_full_lives_and_delivers_everything_once_it_is_freed(tmp_path: Path) -> None:
    """Fault 27 with the whole way to the platform: journal, index and the relay's own files on the full disk."""
    with mounted(tmp_path / "disk", 96 * 1024**2) as disk, start_sandbox() as sandbox:
        config = RelayConfig(disk / "destination", api_key=sandbox.api_key, base_url=sandbox.url)
        jobs = Jobs(config.directory)
        with start_relay(config) as relay:
            kept = [job_id for job_id in ("before-1", "before-2") if jobs.job(job_id)]
            until(lambda: len(sandbox.records(AGENT)) == 2, what="what was sent before")
            ballast = fill(disk)
            for number in range(200):
                answers = jobs.started(f"full-{number}"), jobs.finished(f"full-{number}", result="x" * 2000)
                if Appended.DROPPED not in answers:
                    kept.append(f"full-{number}")
            assert jobs.journal.counters.buffered > 0
            fill(disk)  # what the relay let go of meanwhile
            assert relay.poll() is None
            ballast.unlink()
            until(lambda: jobs.job("after"), what="an append to the disk")
            kept.append("after")
            jobs.journal.tend()
            until(lambda: len(sandbox.records(AGENT)) == len(kept), timeout_s=90, what="everything that was kept")
            assert {record["id"] for record in sandbox.records(AGENT)} == set(kept)
            assert relay.poll() is None
        jobs.close()


def traced(tmp_path: Path, role: str, directory: Path, count: int) -> list[str]:
    """The system calls that such a program made to write and to sync, in order, as `name path`."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    output = tmp_path / "trace"
    command = [sys.executable, "-m", "tests.support.journal_process", role, str(directory), str(count)]
    calls = "trace=write,fsync,fdatasync"
    done = subprocess.run(
        ["strace", "-f", "-y", "-e", calls, "-s", "16", "-o", str(output), *command],
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=60,
    )
    if b"PTRACE" in done.stderr:
        pytest.skip("this machine does not allow tracing")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(write|fsync|fdatasync)\((\d+)<([^>]*)>", output.read_text())
    return [
        "told" if descriptor == "1" else f"{name} {Path(path).name.split('-')[-1]}"
        for name, descriptor, path in found
        if descriptor == "1" or path.startswith(str(directory))
    ]


@pytest.mark.fault(29)
def test_with_fsync_always_an_event_is_on_the_disk_before_append_returns(tmp_path: Path) -> None:
    """Fault 29."""
    calls = traced(tmp_path, "always", tmp_path / "journal", 3)
    written = calls.index("write 000000.v1e1")
    assert "fsync journal" in calls[:written]
    assert [call for call in calls[written:] if "size" not in call] == [
        "write 000000.v1e1",
        "fdatasync 000000.v1e1",
        "told",
    ] * 3


@pytest.mark.fault(29)
def test_with_fsync_interval_the_relay_brings_events_to_the_disk(tmp_path: Path) -> None:
    """Fault 29: the writer never waits for the disk, each sync of the relay reaches all that was not settled."""
    calls = traced(tmp_path, "sync", tmp_path / "journal", 2)
    written = calls.index("write 000000.v1e1")
    assert calls[written:] == [
        *("write 000000.v1e1", "told", "fdatasync 000000.v1e1", "fdatasync journal"),
        *("write 000000.v1e1", "told", "fdatasync 000000.v1e1"),
    ]
