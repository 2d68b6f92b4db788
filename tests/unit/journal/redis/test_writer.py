"""The writing side of the Redis journal: what goes to the stream, what to files, and whose heart beats."""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.journal import drain, progress
from tests.support.redis_server import RedisServer
from xpander_celery.errors import JournalError
from xpander_celery.journal import Appended
from xpander_celery.journal.reader import FileReader
from xpander_celery.journal.redis.keys import Keys
from xpander_celery.journal.redis.reader import RedisReader
from xpander_celery.journal.redis.writer import HEARTBEAT_S, LONG_HEARTBEAT_S, SPILL_S, RedisJournal

Make = Callable[..., RedisJournal]


def started(number: int) -> dict[str, Any]:
    return {
        **progress(number),
        "kind": "started",
        "child": "c",
        "owner": "o",
        "facts": {"task": "t"},
    }


def finished(number: int) -> dict[str, Any]:
    return {**progress(number), "kind": "finished", "outcome": "succeeded", "duration_s": 1.0}


def messages(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if getattr(record, "event", "") == event]


@pytest.fixture
def nowhere() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"redis://:secret@127.0.0.1:{listener.getsockname()[1]}"


def test_nothing_is_connected_or_created_before_it_is_needed(make_journal: Make, tmp_path: Path, nowhere: str) -> None:
    make_journal(url=nowhere)
    assert not (tmp_path / "spill").exists()


def test_an_event_is_one_entry_of_the_stream(make_journal: Make, server: RedisServer, keys: Keys) -> None:
    assert make_journal().append(progress(1)) is Appended.DURABLE
    [[_, [field, text]]] = server.client.ask("XRANGE", keys.stream, "-", "+")
    assert field == b"e1"
    assert b'"job_id":"job-1"' in text


def test_all_keys_lie_in_one_slot_of_a_cluster(make_journal: Make, server: RedisServer, reader: RedisReader) -> None:
    journal = make_journal()
    journal.append(progress(1))
    reader.poll(1)
    names = server.client.ask("KEYS", "xpander-celery:{*")
    assert len(names) == 4
    assert all(name.startswith(b"xpander-celery:{destination}:") for name in names)


def test_a_server_that_forgot_the_script_is_told_again(make_journal: Make, server: RedisServer) -> None:
    journal = make_journal()
    journal.append(progress(1))
    server.client.ask("SCRIPT", "FLUSH")
    assert journal.append(progress(2)) is Appended.DURABLE
    assert journal.counters.durable == 2


def test_without_redis_events_go_to_files_and_the_password_into_no_log(
    make_journal: Make, tmp_path: Path, nowhere: str, caplog: pytest.LogCaptureFixture
) -> None:
    journal = make_journal(url=nowhere)
    journal.open()
    assert [journal.append(progress(number)) for number in range(3)] == [Appended.DURABLE] * 3
    assert drain(FileReader(tmp_path / "spill")) == ["job-0", "job-1", "job-2"]
    assert len(messages(caplog, "journal_spills")) == 1
    assert "secret" not in caplog.text
    assert journal.counters.durable == 3


def test_after_a_failure_redis_is_left_alone_for_a_while_and_then_tried_again(
    make_journal: Make, server: RedisServer, clock: Any, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = make_journal()
    journal.append(progress(0))
    calls: list[int] = []
    real = journal._client.call

    def fail(commands: Any) -> Any:
        calls.append(len(commands))
        raise TimeoutError("frozen")

    monkeypatch.setattr(journal._client, "call", fail)
    for number in range(1, 20):
        clock.now += 1
        assert journal.append(progress(number)) is Appended.DURABLE
    assert len(calls) == 1
    monkeypatch.setattr(journal._client, "call", real)
    clock.now += SPILL_S
    journal.append(progress("back"))
    assert server.client.ask("XLEN", keys.stream) == 2


def test_the_timer_brings_over_what_was_spilled_and_nothing_comes_twice(
    make_journal: Make, server: RedisServer, clock: Any, reader: RedisReader, tmp_path: Path
) -> None:
    journal = make_journal()
    journal.open()
    journal._turn_to_files(TimeoutError("frozen"))
    for number in range(250):
        journal.append(progress(number))
    assert reader.poll(10).events == []
    clock.now += SPILL_S
    for _ in range(3):
        journal.tend()
    assert drain(reader) == [f"job-{number}" for number in range(250)]
    journal.tend()
    assert drain(reader) == []


def test_the_timer_tries_sooner_than_jobs_do(
    make_journal: Make, clock: Any, reader: RedisReader, tmp_path: Path
) -> None:
    journal = make_journal()
    journal.open()
    journal._turn_to_files(TimeoutError("frozen"))
    journal.append(progress(1))
    clock.now += 9
    journal.tend()
    assert drain(reader) == []
    clock.now += 2
    journal.tend()
    journal.append(progress(2))
    assert drain(reader) == ["job-1", "job-2"]


def test_what_dead_processes_of_the_host_spilled_is_brought_over_too(
    make_journal: Make, clock: Any, reader: RedisReader, tmp_path: Path
) -> None:
    dead = make_journal()
    dead._turn_to_files(TimeoutError("frozen"))
    dead.append(progress("last words"))
    dead._spill._segments.forget()
    journal = make_journal()
    journal.open()
    journal.tend()
    assert drain(reader) == ["job-last words"]
    assert not any(".v1e1" in path.name and path.stat().st_size for path in (tmp_path / "spill").iterdir())


def test_only_one_process_of_a_host_brings_files_over(make_journal: Make, clock: Any, reader: RedisReader) -> None:
    one, two = make_journal(), make_journal()
    for journal in (one, two):
        journal.open()
    one.tend()
    two._turn_to_files(TimeoutError("frozen"))
    two.append(progress(1))
    clock.now += SPILL_S
    two.tend()
    assert drain(reader) == []
    one.close()
    two.tend()
    assert drain(reader) == ["job-1"]


def test_how_many_events_files_had_to_drop_reaches_the_relay(
    make_journal: Make, clock: Any, reader: RedisReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = make_journal()
    journal.open()
    journal._turn_to_files(TimeoutError("frozen"))
    write = os.write

    def fail(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("os.write", fail)
    for number in range(1003):
        journal.append(progress(number))
    monkeypatch.setattr("os.write", write)
    assert journal.counters.dropped == 3
    clock.now += SPILL_S
    for _ in range(20):
        journal.tend()
    found = 0
    dropped = 0
    while (batch := reader.poll(300)).finished:
        found += len(batch.events)
        dropped += batch.dropped
        reader.settle(batch)
    assert (found, dropped) == (1000, 3)


def test_without_redis_and_files_events_are_dropped_and_counted(
    make_journal: Make, tmp_path: Path, nowhere: str
) -> None:
    (tmp_path / "file").touch()
    journal = make_journal(tmp_path / "file" / "spill", url=nowhere)
    assert [journal.append(progress(number)) for number in range(2)] == [Appended.DROPPED] * 2
    assert journal.counters.dropped == 2


def test_a_stream_at_its_cap_is_not_trimmed_but_spared(
    make_journal: Make, server: RedisServer, keys: Keys, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = make_journal(max_bytes=10 * 1024)
    for number in range(15):
        assert journal.append(progress(number)) is Appended.DURABLE
    assert server.client.ask("XLEN", keys.stream) == 10
    assert drain(FileReader(tmp_path / "spill")) == [f"job-{number}" for number in range(10, 15)]
    assert "JOURNALFULL the stream holds 10 events" in caplog.text


def test_a_redis_that_is_out_of_memory_is_spared(make_journal: Make, server: RedisServer, tmp_path: Path) -> None:
    journal = make_journal()
    journal.append(progress(1))
    server.client.ask("CONFIG", "SET", "maxmemory", "1")
    assert journal.append(progress(2)) is Appended.DURABLE
    assert drain(FileReader(tmp_path / "spill")) == ["job-2"]


def test_a_forked_child_is_another_process_with_connections_of_its_own(
    make_journal: Make, server: RedisServer, reader: RedisReader, keys: Keys
) -> None:
    journal = make_journal()
    journal.open()
    journal.append(progress("parent"))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            journal.append(progress("child"))
            lasts_s = journal._client.ask("TTL", keys.alive(journal.process_id))
            os.write(writing, f"{journal.process_id} {journal.counters.durable} {lasts_s}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        child_id, durable, lasts_s = pipe.read().split()
    journal.append(progress("parent again"))
    assert child_id != journal.process_id
    assert durable == "1"
    assert HEARTBEAT_S - 2 <= int(lasts_s) <= HEARTBEAT_S
    assert drain(reader) == ["job-parent", "job-child", "job-parent again"]


def lasts_s(server: RedisServer, keys: Keys, journal: RedisJournal) -> int:
    found: int = server.client.ask("TTL", keys.alive(journal.process_id))
    return found


def test_a_process_without_a_timer_beats_for_long(make_journal: Make, server: RedisServer, keys: Keys) -> None:
    journal = make_journal()
    journal.append(started(1))
    assert lasts_s(server, keys, journal) > LONG_HEARTBEAT_S - 5


def test_a_worker_whose_jobs_stop_its_timer_beats_for_long_whenever_a_job_starts(
    make_journal: Make, server: RedisServer, keys: Keys
) -> None:
    solo = make_journal()
    solo.open()
    for number in range(2):
        solo.append(started(number))
        assert lasts_s(server, keys, solo) > LONG_HEARTBEAT_S - 5
        solo.append(finished(number))
        solo.tend()
        assert lasts_s(server, keys, solo) <= HEARTBEAT_S


def test_a_worker_whose_timer_runs_beside_its_jobs_beats_shortly(
    make_journal: Make, server: RedisServer, keys: Keys
) -> None:
    threads = make_journal()
    threads.open()
    threads.append(started(1))
    threads.tend()
    threads.append(started(2))
    assert lasts_s(server, keys, threads) <= HEARTBEAT_S


def test_a_worker_beats_for_the_living_of_its_host_and_says_who_died(
    make_journal: Make, server: RedisServer, keys: Keys, reader: RedisReader
) -> None:
    worker, child = make_journal(), make_journal()
    worker.open()
    child.append(progress(1))
    server.client.ask("DEL", keys.alive(child.process_id))
    worker.tend()
    assert server.client.ask("GET", keys.alive(child.process_id)) == b"1"
    child._spill._segments.forget()
    dead_id = next(path.stem for path in child._spill.directory.glob("*.alive") if path.stem != worker.process_id)
    worker.tend()
    assert not reader.is_alive(dead_id)
    assert reader.is_alive(worker.process_id)


def test_a_redis_that_evicts_events_is_refused(make_journal: Make, server: RedisServer) -> None:
    server.client.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(JournalError, match=r"maxmemory-policy allkeys-lru.*noeviction"):
        make_journal().open()


def test_a_redis_that_evicts_heartbeats_is_warned_about(
    make_journal: Make, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.client.ask("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    make_journal().open()
    assert "volatile-lru" in messages(caplog, "journal_redis_setting")[0]


@pytest.mark.parametrize(("appendonly", "warned"), [("no", True), ("yes", False)])
def test_a_redis_without_an_append_only_file_is_warned_about(
    make_journal: Make, server: RedisServer, caplog: pytest.LogCaptureFixture, appendonly: str, warned: bool
) -> None:
    server.client.ask("CONFIG", "SET", "appendonly", appendonly)
    make_journal().open()
    assert any("appendonly" in message for message in messages(caplog, "journal_redis_setting")) is warned


def test_a_redis_that_wants_a_password_is_an_error_at_start(make_journal: Make, server: RedisServer) -> None:
    server.client.ask("CONFIG", "SET", "requirepass", "secret")
    try:
        with pytest.raises(JournalError, match="password"):
            make_journal().open()
        with pytest.raises(JournalError, match="WRONGPASS"):
            make_journal(url=server.url.replace("//", "//:wrong@")).open()
        make_journal(url=server.url.replace("//", "//:secret@")).open()
    finally:
        server.client.forget()
        server.client.call([["AUTH", "secret"], ["CONFIG", "SET", "requirepass", ""]])


def test_a_frozen_redis_costs_one_job_a_quarter_of_a_second(tmp_path: Path, make_journal: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        journal = make_journal(url=f"redis://127.0.0.1:{silent.getsockname()[1]}")
        before = time.monotonic()
        journal.append(progress(1))
        assert 0.2 < time.monotonic() - before < 0.6
        before = time.monotonic()
        for number in range(100):
            journal.append(progress(number))
        assert time.monotonic() - before < 0.2


def test_the_logger_names_no_url(make_journal: Make, caplog: pytest.LogCaptureFixture, nowhere: str) -> None:
    with caplog.at_level(logging.DEBUG):
        make_journal(url=nowhere).append(progress(1))
    assert "redis://" not in caplog.text
