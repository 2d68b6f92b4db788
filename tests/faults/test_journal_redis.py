"""A Redis that is killed, frozen, flushed and filled while processes write and relays read (faults 22 to 26)."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.journal import LeadingReader, drain, progress
from tests.support.journal_process import ledger, running
from tests.support.redis_server import RedisServer, running_redis
from xpander_celery.journal import Appended
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.redis import writer
from xpander_celery.journal.redis.keys import Keys
from xpander_celery.journal.redis.writer import RedisJournal

KEYS = Keys("destination")


@pytest.fixture
def durable_redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path / "redis", "--appendonly", "yes", "--appendfsync", "everysec") as server:
        yield server


@pytest.fixture
def volatile_redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path / "redis") as server:
        yield server


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def found_by(server: RedisServer, ledgers: list[Path], spill: Path) -> set[str]:
    """Bring over what the killed writers spilled, and read everything."""
    last = RedisJournal(server.url, "destination", spill=FileJournal(spill))
    last.open()
    reader = LeadingReader(server.url, "destination")
    found: set[str] = set()

    def has_everything() -> bool:
        last._tend_at = last._spill_until = float("-inf")
        last.tend()
        found.update(drain(reader))
        return {entry for path in ledgers for entry in ledger(path)} <= found

    wait_until(has_everything)
    last.close()
    reader.close()
    return found


@pytest.mark.fault(22)
def test_a_redis_with_an_append_only_file_that_is_killed_loses_nothing(
    durable_redis: RedisServer, tmp_path: Path
) -> None:
    """Fault 22: killed three times at random while two processes write."""
    randomness, spill = random.Random(22), tmp_path / "spill"
    ledgers = [tmp_path / "ledger-1", tmp_path / "ledger-2"]
    with (
        running("redis", spill, durable_redis.url, ledgers[0], "one"),
        running("redis", spill, durable_redis.url, ledgers[1], "two"),
    ):
        for _ in range(3):
            time.sleep(0.3 + randomness.random() * 0.3)
            durable_redis.kill()
            time.sleep(randomness.random() * 0.3)
            durable_redis.start()
        before = [len(ledger(path)) for path in ledgers]
        wait_until(lambda: all(len(ledger(path)) > count + 100 for path, count in zip(ledgers, before, strict=True)))
    found_by(durable_redis, ledgers, spill)


@pytest.mark.fault(23)
def test_a_redis_without_one_loses_only_what_was_not_read_and_was_warned_about(
    volatile_redis: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault 23."""
    journal = RedisJournal(volatile_redis.url, "destination", spill=FileJournal(tmp_path / "spill"))
    reader = LeadingReader(volatile_redis.url, "destination")
    journal.open()
    assert "appendonly" in caplog.text
    for number in range(10):
        assert journal.append(progress(number)) is Appended.DURABLE
    batch = reader.poll(4)
    reader.settle(batch)
    volatile_redis.kill()
    volatile_redis.start()
    assert journal.append(progress("after")) is Appended.DURABLE
    found: list[str] = []

    def has_last() -> bool:
        found.extend(drain(reader))
        return "job-after" in found

    wait_until(has_last)
    assert [event.job_id for event in batch.events] + found == [*(f"job-{number}" for number in range(4)), "job-after"]
    journal.close()
    reader.close()


@pytest.mark.fault(24)
def test_a_frozen_redis_costs_one_job_a_moment_and_loses_nothing(
    volatile_redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 24."""
    monkeypatch.setattr(writer, "SPILL_S", 5.0)
    monkeypatch.setattr(writer, "TEND_AGAIN_S", 0.5)
    journal = RedisJournal(volatile_redis.url, "destination", spill=FileJournal(tmp_path / "spill"))
    reader = LeadingReader(volatile_redis.url, "destination")
    journal.open()
    journal.append(progress("before"))
    volatile_redis.freeze()
    taken: list[float] = []
    for number in range(500):
        before = time.perf_counter()
        assert journal.append(progress(number)) is Appended.DURABLE
        taken.append(time.perf_counter() - before)
    volatile_redis.thaw()
    assert 0.2 < taken[0] < 0.4
    assert statistics.median(taken[1:]) < 0.0005
    found: set[str] = set()

    def has_everything() -> bool:
        journal.tend()
        found.update(drain(reader))
        return len(found) == 501

    wait_until(has_everything)
    journal.close()
    reader.close()


@pytest.mark.fault(25)
def test_after_flushall_new_events_flow(volatile_redis: RedisServer, tmp_path: Path) -> None:
    """Fault 25: the group goes with the stream."""
    with (
        running("redis", tmp_path / "spill", volatile_redis.url, tmp_path / "ledger", "w"),
        running("redis-relay", tmp_path / "index", volatile_redis.url),
    ):
        for _ in range(3):
            seen = len(ledger(tmp_path / "index"))
            wait_until(lambda seen=seen: len(ledger(tmp_path / "index")) > seen + 50)
            volatile_redis.client.ask("FLUSHALL")
            flushed = len(ledger(tmp_path / "ledger"))
            wait_until(lambda flushed=flushed: len(ledger(tmp_path / "ledger")) > flushed + 50)
            expected = set(ledger(tmp_path / "ledger")[flushed + 1 : flushed + 50])
            wait_until(lambda expected=expected: expected <= set(ledger(tmp_path / "index")))


@pytest.mark.fault(26)
def test_a_redis_that_is_out_of_memory_loses_nothing(volatile_redis: RedisServer, tmp_path: Path) -> None:
    """Fault 26: noeviction, so that it refuses; what it refuses lies in files until it has room."""
    spill = tmp_path / "spill"
    with running("redis", spill, volatile_redis.url, tmp_path / "ledger", "w"):
        wait_until(lambda: len(ledger(tmp_path / "ledger")) > 100)
        volatile_redis.client.ask("CONFIG", "SET", "maxmemory", "1")
        full = len(ledger(tmp_path / "ledger"))
        wait_until(lambda: len(ledger(tmp_path / "ledger")) > full + 300)
        assert sum(path.stat().st_size for path in spill.iterdir() if ".v1e1" in path.name) > 300 * 200
        volatile_redis.client.ask("CONFIG", "SET", "maxmemory", "0")
    found_by(volatile_redis, [tmp_path / "ledger"], spill)


def test_a_standby_takes_over_from_a_relay_that_is_killed_and_nothing_is_lost(
    volatile_redis: RedisServer, tmp_path: Path
) -> None:
    """Three times in a row; the lease of these relays lasts 1.5 s."""
    indexes = [tmp_path / f"index-{number}" for number in range(4)]
    with ExitStack() as stack:
        writer_process = stack.enter_context(
            running("redis", tmp_path / "spill", volatile_redis.url, tmp_path / "ledger", "w")
        )
        active = stack.enter_context(running("redis-relay", indexes[0], volatile_redis.url))
        for before, after in pairwise(indexes):
            wait_until(lambda before=before: len(ledger(before)) > 50)
            standby = stack.enter_context(running("redis-relay", after, volatile_redis.url))
            assert ledger(after) == []
            active.kill()
            active.wait()
            wait_until(lambda after=after: len(ledger(after)) > 50, timeout_s=10)
            active = standby
        writer_process.kill()
        writer_process.wait()
        acknowledged = set(ledger(tmp_path / "ledger"))
        wait_until(lambda: acknowledged <= {entry for index in indexes for entry in ledger(index)})
