"""Processes that write or read the journal are killed (faults 1, 2, 3, 5 and 7)."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.journal import drain
from tests.support.journal_process import await_ready, ledger, running
from xpander_celery.journal.reader import FileReader

KILLS = 24


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


@pytest.mark.fault(1)
def test_writers_killed_at_random_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Fault 1: four writers at a time, KILLS of them killed at random moments, while a relay reads."""
    directory, randomness = tmp_path / "journal", random.Random(1)
    reader = FileReader(directory)
    found: Counter[str] = Counter()
    ledgers = [tmp_path / f"ledger-{number}" for number in range(KILLS)]
    for first in range(0, KILLS, 4):
        with ExitStack() as stack:
            writers = [
                stack.enter_context(running("write", directory, ledgers[number], number, 600, 0.0002, ready=False))
                for number in range(first, first + 4)
            ]
            for writer in writers:
                await_ready(writer)
            for writer in writers:
                deadline = time.monotonic() + randomness.random() * 0.05
                while time.monotonic() < deadline:
                    batch = reader.poll(500)
                    found.update(event.job_id for event in batch.events)
                    reader.settle(batch)
                writer.kill()
    found.update(drain(reader))
    acknowledged = [entry for path in ledgers for entry in ledger(path)]
    assert len(acknowledged) > 10 * KILLS
    assert [entry for entry in acknowledged if entry not in found] == []
    assert [entry for entry, times in found.items() if times > 1] == []
    assert [path for path in directory.iterdir() if ".v1e1" in path.name] == []


@pytest.mark.fault(1, 2)
def test_writers_killed_amid_large_writes_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Faults 1 and 2: with records of 200 KB a kill often meets a write that is under way."""
    directory, randomness = tmp_path / "journal", random.Random(2)
    reader = FileReader(directory)
    for number in range(15):
        with running("write", directory, tmp_path / f"ledger-{number}", number, 200_000, 0) as writer:
            time.sleep(randomness.random() * 0.03)
            writer.kill()
            writer.wait()
        found = set(drain(reader))
        assert [entry for entry in ledger(tmp_path / f"ledger-{number}") if entry not in found] == []


@pytest.mark.fault(2)
def test_a_kill_in_the_middle_of_a_write_costs_that_line_only(tmp_path: Path) -> None:
    """Fault 2."""
    for _ in range(2):
        with running("half", tmp_path, ready=False) as writer:
            assert writer.wait(30) == -signal.SIGKILL
    batch = FileReader(tmp_path).poll(10)
    assert sorted(event.job_id for event in batch.events) == ["job-1", "job-1", "job-2", "job-2"]
    assert batch.corrupt == 2
    assert len(list((tmp_path / "corrupt").iterdir())) == 2


@pytest.mark.fault(3, 7)
def test_when_a_worker_dies_its_children_go_on_and_nobody_takes_it_for_alive(tmp_path: Path) -> None:
    """Faults 3 and 7: the parent held a segment when it forked; it is killed while its children write."""
    directory, ledgers = tmp_path / "journal", tmp_path / "ledgers"
    ledgers.mkdir()
    reader = FileReader(directory)
    children: list[int] = []
    try:
        with running("fork", directory, ledgers, 3) as parent:
            wait_until(lambda: len(list(ledgers.iterdir())) == 4)
            children = [int(path.name.split("-")[0]) for path in ledgers.iterdir() if path.name[0].isdigit()]
            [parent_id] = [path.name.split("-")[1] for path in ledgers.iterdir() if path.name.startswith("parent")]
            child_ids = [path.name.split("-")[1] for path in ledgers.iterdir() if path.name[0].isdigit()]
            assert reader.is_alive(parent_id)
            parent.kill()
            parent.wait()
            assert not reader.is_alive(parent_id)
            wait_until(lambda: all(reader.is_alive(child_id) for child_id in child_ids))
            batch = reader.poll(100_000)
            assert {name.split("-")[0] for name in batch.finished} == {parent_id}
            written = {path: len(ledger(path)) for path in ledgers.iterdir() if path.name[0].isdigit()}
            wait_until(lambda: all(len(ledger(path)) > before for path, before in written.items()))
        for path in directory.iterdir():
            if ".v1e1" in path.name:
                owner, content = path.name.split("-")[0], path.read_bytes()
                assert all(owner.encode() in line for line in content.splitlines() if b"job-parent" not in line)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
    wait_until(lambda: not any(reader.is_alive(child_id) for child_id in child_ids))
    found = drain(reader)
    acknowledged = [entry for path in ledgers.iterdir() for entry in ledger(path)]
    assert set(acknowledged) <= set(found)
    assert len(found) == len(set(found))


@pytest.mark.fault(5)
def test_a_relay_killed_between_commit_and_removal_reads_nothing_twice_and_skips_nothing(tmp_path: Path) -> None:
    """Fault 5: the index has the events, the segments are still there."""
    directory, index = tmp_path / "journal", tmp_path / "index.json"
    with running("write", directory, tmp_path / "ledger", "w", 20_000, 0) as writer:
        wait_until(lambda: len(ledger(tmp_path / "ledger")) > 400)  # two segments
        writer.kill()
        writer.wait()
    for die_after in (1, 2, 3):
        with running("relay", directory, index, die_after) as relay:
            assert relay.wait(30) == -signal.SIGKILL
    with running("relay", directory, index, -1):
        wait_until(lambda: not any(".v1e1" in path.name for path in directory.iterdir()))
    found = Counter(index.read_text().split('"')[1:-1:1])
    acknowledged = ledger(tmp_path / "ledger")
    assert [entry for entry in acknowledged if found[entry] != 1] == []


@pytest.mark.fault(5)
def test_relays_killed_at_random_read_everything_once(tmp_path: Path) -> None:
    """Fault 5 again, with the moment left to chance and two writers at work."""
    directory, index, randomness = tmp_path / "journal", tmp_path / "index.json", random.Random(3)
    with (
        running("write", directory, tmp_path / "ledger-1", "one", 5000, 0.0005) as one,
        running("write", directory, tmp_path / "ledger-2", "two", 5000, 0.0005) as two,
    ):
        for _ in range(5):
            with running("relay", directory, index, -1) as relay:
                time.sleep(randomness.random() * 0.05)
                relay.kill()
                relay.wait()
            for writer in (one, two):
                os.kill(writer.pid, signal.SIGSTOP if randomness.random() < 0.5 else signal.SIGCONT)
        for writer in (one, two):
            writer.kill()
            writer.wait()
    with running("relay", directory, index, -1):
        wait_until(lambda: not any(".v1e1" in path.name for path in directory.iterdir()), timeout_s=60)
    found = Counter(index.read_text().split('"'))
    acknowledged = ledger(tmp_path / "ledger-1") + ledger(tmp_path / "ledger-2")
    assert len(acknowledged) > 100
    assert [entry for entry in acknowledged if found[entry] != 1] == []
