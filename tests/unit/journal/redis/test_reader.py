"""The reading side of the Redis journal: lease, group, acknowledgement, and whose heart is missed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.journal import drain, progress, sized
from tests.support.redis_server import RedisServer
from xpander_celery.journal.redis.keys import GROUP, Keys
from xpander_celery.journal.redis.pulse import GRACE_S
from xpander_celery.journal.redis.reader import RedisReader
from xpander_celery.journal.redis.writer import RedisJournal

Make = Callable[..., RedisJournal]


@pytest.fixture
def journal(make_journal: Make) -> RedisJournal:
    return make_journal()


@pytest.fixture
def standby(server: RedisServer, clock: Any) -> RedisReader:
    return RedisReader(server.url, "destination", clock=clock)


def test_one_relay_reads_and_the_other_stands_by(
    journal: RedisJournal, reader: RedisReader, standby: RedisReader
) -> None:
    journal.append(progress(1))
    assert len(reader.poll(10).events) == 1
    assert standby.poll(10).events == []
    assert (reader.is_active, standby.is_active) == (True, False)


def test_a_relay_keeps_its_lease_as_long_as_it_reads(
    journal: RedisJournal, reader: RedisReader, standby: RedisReader, clock: Any, server: RedisServer, keys: Keys
) -> None:
    reader.poll(10)
    for _ in range(10):
        clock.now += 5
        server.client.ask("PEXPIRE", keys.lease, 5000)
        reader.poll(10)
        standby.poll(10)
        assert server.client.ask("PTTL", keys.lease) > 10_000
    assert (reader.is_active, standby.is_active) == (True, False)


def test_a_standby_takes_over_what_a_dead_relay_had_read(
    journal: RedisJournal, reader: RedisReader, standby: RedisReader, clock: Any, server: RedisServer, keys: Keys
) -> None:
    for number in range(250):
        journal.append(progress(number))
    reader.settle(reader.poll(50))
    assert len(reader.poll(150).events) == 150
    standby.poll(10)
    server.client.ask("DEL", keys.lease)  # it ran out
    clock.now += 6
    assert drain(standby) == [f"job-{number}" for number in range(50, 250)]


def test_a_relay_that_lost_its_lease_knows_it_and_reads_no_more(
    journal: RedisJournal, reader: RedisReader, standby: RedisReader, clock: Any, server: RedisServer, keys: Keys
) -> None:
    reader.poll(10)
    server.client.ask("DEL", keys.lease)
    standby.poll(10)
    journal.append(progress(1))
    clock.now += 6
    assert reader.poll(10).events == []
    assert not reader.is_active
    assert drain(standby) == ["job-1"]


def test_a_relay_that_leaves_hands_over_at_once(
    journal: RedisJournal, reader: RedisReader, standby: RedisReader
) -> None:
    journal.append(progress(1))
    reader.poll(10)
    reader.close()
    assert drain(standby) == ["job-1"]


def test_a_relay_that_leaves_takes_no_other_relays_lease_with_it(
    reader: RedisReader, standby: RedisReader, clock: Any, server: RedisServer, keys: Keys
) -> None:
    reader.poll(10)
    server.client.ask("DEL", keys.lease)
    standby.poll(10)
    reader.close()
    clock.now += 6
    standby.poll(10)
    assert standby.is_active


def test_settled_entries_leave_the_stream(
    journal: RedisJournal, reader: RedisReader, server: RedisServer, keys: Keys
) -> None:
    for number in range(3):
        journal.append(progress(number))
    batch = reader.poll(2)
    assert server.client.ask("XLEN", keys.stream) == 3
    reader.settle(batch)
    assert server.client.ask("XLEN", keys.stream) == 1
    assert server.client.ask("XPENDING", keys.stream, GROUP)[0] == 0


def test_entries_can_be_kept_until_their_report_is_delivered(
    journal: RedisJournal, server: RedisServer, keys: Keys, clock: Any
) -> None:
    reader = RedisReader(server.url, "destination", keeps_until_delivered=True, clock=clock)
    for number in range(3):
        journal.append(progress(number))
    server.client.ask("XADD", keys.stream, "*", "dropped", "2")
    batch = reader.poll(10)
    assert (len(batch.receipts), batch.dropped) == (3, 2)
    reader.settle(batch)
    assert reader.poll(10).events == []
    assert server.client.ask("XLEN", keys.stream) == 3
    reader.acknowledge(batch.receipts[:2])
    assert server.client.ask("XLEN", keys.stream) == 1
    reader.close()
    following = RedisReader(server.url, "destination", clock=clock)
    assert drain(following) == ["job-2"]


def test_what_could_not_be_acknowledged_is_acknowledged_later_and_not_read_again(
    journal: RedisJournal, reader: RedisReader, server: RedisServer, keys: Keys, clock: Any, monkeypatch: Any
) -> None:
    journal.append(progress(1))
    batch = reader.poll(10)
    real = reader._client.call

    def fail(commands: Any) -> Any:
        raise TimeoutError("frozen")

    monkeypatch.setattr(reader._client, "call", fail)
    reader.settle(batch)
    assert reader.poll(10).events == []
    monkeypatch.setattr(reader._client, "call", real)
    clock.now += 2
    assert reader.poll(10).events == []
    assert server.client.ask("XLEN", keys.stream) == 0


def test_while_redis_does_not_answer_batches_are_empty_and_nobody_is_dead(
    journal: RedisJournal, reader: RedisReader, clock: Any, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    journal.append(progress(1))
    assert reader.poll(1).events
    backlog = reader.backlog_bytes()

    def fail(commands: Any) -> Any:
        raise TimeoutError("frozen")

    monkeypatch.setattr(reader._client, "call", fail)
    for _ in range(30):
        clock.now += 3
        assert reader.poll(10).events == []
        assert reader.is_alive("f" * 16)
        assert reader.backlog_bytes() == backlog
    assert len(caplog.records) == 2


def test_after_flushall_the_group_is_made_again(
    journal: RedisJournal, reader: RedisReader, server: RedisServer
) -> None:
    journal.append(progress(1))
    reader.settle(reader.poll(10))
    server.client.ask("FLUSHALL")
    journal.append(progress(2))
    assert drain(reader) == ["job-2"]


def test_what_was_written_before_there_was_a_group_is_read(journal: RedisJournal, reader: RedisReader) -> None:
    journal.append(progress(1))
    assert drain(reader) == ["job-1"]


def test_entries_that_cannot_be_read_are_counted_kept_aside_and_acknowledged(
    journal: RedisJournal, reader: RedisReader, server: RedisServer, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    server.client.ask("XADD", keys.stream, "*", "e1", '{"kind":"unheard-of"}')
    server.client.ask("XADD", keys.stream, "*", "unknown", "field")
    journal.append(progress(1))
    batch = reader.poll(10)
    assert (len(batch.events), batch.corrupt) == (1, 2)
    reader.settle(batch)
    assert sorted(server.client.ask("LRANGE", keys.corrupt, 0, -1)) == [b"field", b'{"kind":"unheard-of"}']
    assert server.client.ask("XLEN", keys.stream) == 0
    assert "unreadable" in caplog.text


def test_events_of_a_newer_release_are_left_for_a_relay_of_that_release(
    journal: RedisJournal, reader: RedisReader, server: RedisServer, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    server.client.ask("XADD", keys.stream, "*", "e99", "{}")
    journal.append(progress(1))
    assert drain(reader) == ["job-1"]
    assert server.client.ask("XLEN", keys.stream) == 1
    assert server.client.ask("XPENDING", keys.stream, GROUP)[0] == 1
    assert "newer release" in caplog.text


def test_entries_removed_by_hand_stop_nothing(
    journal: RedisJournal, reader: RedisReader, standby: RedisReader, server: RedisServer, keys: Keys
) -> None:
    for number in range(3):
        journal.append(progress(number))
    batch = reader.poll(10)
    server.client.ask("XDEL", keys.stream, batch.receipts[0])
    reader.close()
    assert drain(standby) == ["job-1", "job-2"]


def test_a_batch_is_bounded_in_bytes_too(journal: RedisJournal, reader: RedisReader) -> None:
    for number in range(150):
        journal.append(sized(number, 60_000))
    assert len(reader.poll(1000).events) == 100
    assert drain(reader) == [f"job-{number}" for number in range(150)]


def test_a_missed_heartbeat_proves_nothing_until_it_is_missed_for_long(
    journal: RedisJournal, reader: RedisReader, server: RedisServer, keys: Keys, clock: Any
) -> None:
    journal.append(progress(1))
    assert reader.is_alive(journal.process_id)
    server.client.ask("DEL", keys.alive(journal.process_id))
    clock.now += 2
    assert reader.is_alive(journal.process_id)
    clock.now += GRACE_S - 1
    assert reader.is_alive(journal.process_id)
    clock.now += 2
    assert not reader.is_alive(journal.process_id)


def test_a_heart_that_beats_again_is_missed_anew(
    journal: RedisJournal, reader: RedisReader, server: RedisServer, keys: Keys, clock: Any
) -> None:
    for _ in range(3):
        assert reader.is_alive(journal.process_id)
        clock.now += GRACE_S - 1
        assert reader.is_alive(journal.process_id)
        server.client.ask("SET", keys.alive(journal.process_id), "1")
        clock.now += 2
        assert reader.is_alive(journal.process_id)
        server.client.ask("DEL", keys.alive(journal.process_id))
        clock.now += 2


def test_many_are_asked_about_by_one_call(
    journal: RedisJournal, reader: RedisReader, monkeypatch: Any, clock: Any
) -> None:
    names = [f"{number:016x}" for number in range(50)]
    for name in names:
        reader.is_alive(name)
    calls: list[Any] = []
    real = reader._client.call
    monkeypatch.setattr(reader._client, "call", lambda commands: (calls.append(commands), real(commands))[1])
    clock.now += 2
    for name in names:
        reader.is_alive(name)
    assert len(calls) == 1


def test_a_process_nobody_asks_about_is_forgotten(reader: RedisReader, clock: Any) -> None:
    reader.is_alive("a" * 16)
    clock.now += 120
    reader.is_alive("b" * 16)
    assert set(reader._pulse._words) == {"b" * 16}
