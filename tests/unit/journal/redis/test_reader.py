"""The reading side of the Redis journal: lease, group, acknowledgement, and whose heart is missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.journal import LeadingReader, drain, progress, sized
from tests.support.redis_server import RedisServer
from xpander_celery.journal import Batch, Term
from xpander_celery.journal.redis.client import RefusedError
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
    return LeadingReader(server.url, "destination", clock=clock)


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
    reader = LeadingReader(server.url, "destination", keeps_until_delivered=True, clock=clock)
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
    following = LeadingReader(server.url, "destination", clock=clock)
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
    server.client.ask("XDEL", keys.stream, min(batch.finished))
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


# Terms


@pytest.fixture
def relay_of(server: RedisServer, clock: Any) -> Iterator[Callable[[str], RedisReader]]:
    """A relay of the index that is named, as its process would start it."""
    made: list[RedisReader] = []

    def start(identity: str) -> RedisReader:
        made.append(RedisReader(server.url, "destination", identity=identity, keeps_until_delivered=True, clock=clock))
        return made[-1]

    yield start
    for reader in made:
        reader.close()


Start = Callable[[str], RedisReader]


def killed(server: RedisServer, keys: Keys) -> None:
    """The lease of a relay that is no more has run out."""
    server.client.ask("DEL", keys.lease)


def ids(batch: Batch) -> list[str]:
    return [event.job_id for event in batch.events]


def test_a_relay_whose_index_led_last_goes_on_behind_what_it_has(
    journal: RedisJournal, relay_of: Start, server: RedisServer, keys: Keys
) -> None:
    for number in range(6):
        journal.append(progress(number))
    first = relay_of("index-1")
    assert first.lead() == Term(1, 1014.0, is_continued=True)
    first.resume({})
    kept = first.poll(2)
    first.settle(kept)
    assert ids(first.poll(2)) == ["job-2", "job-3"]  # read, and not committed when it is killed
    killed(server, keys)
    again = relay_of("index-1")
    term = again.lead()
    assert term is not None
    assert term.is_continued
    again.resume(kept.positions)
    assert ids(again.poll(10)) == ["job-2", "job-3", "job-4", "job-5"]
    assert server.client.ask("XLEN", keys.stream) == 6


def test_a_relay_with_another_index_gets_everything_that_is_not_delivered(
    journal: RedisJournal, relay_of: Start, server: RedisServer, keys: Keys
) -> None:
    for number in range(4):
        journal.append(progress(number))
    first = relay_of("index-1")
    first.lead()
    batch = first.poll(3)
    first.settle(batch)
    assert first.acknowledge(batch.receipts[:1])
    killed(server, keys)
    second = relay_of("index-2")
    term = second.lead()
    assert term is not None
    assert not term.is_continued
    second.resume({"1": 2})  # from a time when it led before
    assert ids(second.poll(10)) == ["job-1", "job-2", "job-3"]
    killed(server, keys)
    term = relay_of("index-1").lead()
    assert term is not None
    assert not term.is_continued


def test_a_later_release_is_another_index_since_it_may_read_more(
    relay_of: Start, server: RedisServer, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay_of("index-1").lead()
    killed(server, keys)
    monkeypatch.setattr("xpander_celery.journal.redis.reader.VERSION", 2)
    term = relay_of("index-1").lead()
    assert term is not None
    assert not term.is_continued


def test_after_redis_lost_all_it_knew_the_index_holds_what_is_true(
    journal: RedisJournal, relay_of: Start, server: RedisServer
) -> None:
    relay = relay_of("index-1")
    relay.lead()
    relay.resume({})
    relay.poll(10)
    server.client.ask("FLUSHALL")
    journal.append(progress(1))
    assert relay.poll(10).events == []
    term = relay.lead()
    assert term is not None
    assert (term.number, term.is_continued) == (2, True)
    relay.resume({"9999999999999": 0})
    assert ids(relay.poll(10)) == ["job-1"]


def test_but_not_that_of_a_relay_that_saw_another_one_lead_meanwhile(
    relay_of: Start, server: RedisServer, clock: Any
) -> None:
    first, second = relay_of("index-1"), relay_of("index-2")
    first.lead()
    server.client.ask("FLUSHALL")
    second.lead()
    clock.now += 6
    assert first.lead() is None
    server.client.ask("FLUSHALL")
    clock.now += 6
    term = first.lead()
    assert term is not None
    assert not term.is_continued


def test_a_relay_that_was_asleep_while_another_took_over_takes_nothing_from_it(
    journal: RedisJournal, relay_of: Start, server: RedisServer, keys: Keys
) -> None:
    asleep, active = relay_of("index-1"), relay_of("index-2")
    asleep.lead()
    asleep.poll(10)
    killed(server, keys)
    active.lead()
    active.poll(10)
    journal.append(progress(1))
    assert asleep.poll(10).events == []  # it believes that it leads
    assert not asleep.is_active
    assert ids(active.poll(10)) == ["job-1"]


def test_a_term_ends_before_the_lease_does_while_redis_does_not_answer(
    relay_of: Start, server: RedisServer, keys: Keys, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = relay_of("index-1")
    term = relay.lead()
    assert term is not None
    assert 0 < server.client.ask("PTTL", keys.lease) / 1000 - (term.until - clock.now) <= 1.1

    def fail(commands: Any) -> Any:
        raise TimeoutError("frozen")

    monkeypatch.setattr(relay._client, "call", fail)
    clock.now += 13
    assert relay.lead() == term
    clock.now += 1
    assert relay.lead() is None


def test_what_redis_gave_in_a_reply_that_was_lost_is_taken_again(
    journal: RedisJournal, relay_of: Start, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = relay_of("index-1")
    relay.lead()
    relay.resume({})
    journal.append(progress(1))
    relay.settle(relay.poll(10))
    for number in (2, 3):
        journal.append(progress(number))
    real = relay._client.call

    def lose_reply(commands: Any) -> Any:
        real(commands)
        raise TimeoutError("the reply was lost")

    with monkeypatch.context() as patch:
        patch.setattr(relay._client, "call", lose_reply)
        assert relay.poll(10).events == []
    journal.append(progress(4))
    clock.now += 2
    assert ids(relay.poll(10)) == ["job-2", "job-3", "job-4"]


def test_a_lease_that_was_taken_without_hearing_of_it_is_held_and_nothing_is_taken_to_be_known(
    relay_of: Start, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = relay_of("index-1")
    real = relay._client.call

    def lose_reply(commands: Any) -> Any:
        real(commands)
        raise TimeoutError("the reply was lost")

    with monkeypatch.context() as patch:
        patch.setattr(relay._client, "call", lose_reply)
        assert relay.lead() is None
    clock.now += 2
    term = relay.lead()
    assert term is not None
    assert not term.is_continued


def test_no_batch_belongs_to_a_term_that_was_not_spoken_of(
    journal: RedisJournal, relay_of: Start, server: RedisServer, keys: Keys, clock: Any
) -> None:
    journal.append(progress(1))
    relay = relay_of("index-1")
    assert relay.poll(10).events == []
    relay.lead()
    clock.now += 20
    relay._lease.keep()
    killed(server, keys)
    clock.now += 20
    relay._lease.keep()
    assert relay.is_active
    assert relay.poll(10).events == []
    relay.lead()
    assert ids(relay.poll(10)) == ["job-1"]


def test_a_redis_that_is_out_of_memory_can_still_be_read_from_and_emptied(
    journal: RedisJournal, relay_of: Start, server: RedisServer, keys: Keys
) -> None:
    journal.append(progress(1))
    server.client.ask("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(RefusedError, match="OOM"):
        server.client.ask("SET", "x", "y")
    relay = relay_of("index-1")
    assert relay.lead() is not None
    batch = relay.poll(10)
    assert ids(batch) == ["job-1"]
    relay.settle(batch)
    assert relay.acknowledge(batch.receipts)
    assert server.client.ask("XLEN", keys.stream) == 0


def test_relays_tell_each_other(relay_of: Start, server: RedisServer, keys: Keys, clock: Any) -> None:
    active, standby = relay_of("index-1"), relay_of("index-2")
    active.lead()
    standby.lead()
    assert standby.shared("gate") is None
    active.share("gate", {"flow": "paused"}, lasts_s=60)
    standby.share("gate", {"flow": "nonsense"}, lasts_s=60)
    assert standby.shared("gate") == {"flow": "paused"}
    assert 0 < server.client.ask("TTL", keys.shared("gate")) <= 60


def test_what_is_delivered_is_acknowledged_later_where_redis_is_away(
    journal: RedisJournal, relay_of: Start, server: RedisServer, keys: Keys, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.append(progress(1))
    relay = relay_of("index-1")
    relay.lead()
    batch = relay.poll(10)
    relay.settle(batch)
    with monkeypatch.context() as patch:
        patch.setattr(relay._client, "call", lambda commands: (_ for _ in ()).throw(TimeoutError("frozen")))
        assert not relay.acknowledge(batch.receipts)
    assert not relay.acknowledge(batch.receipts)  # it waits for a second
    clock.now += 2
    assert relay.acknowledge(batch.receipts)
    assert server.client.ask("XLEN", keys.stream) == 0


def test_a_relay_brings_over_what_workers_spilled_that_are_gone(
    make_journal: Make, server: RedisServer, tmp_path: Path, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = make_journal(tmp_path / "spill")
    monkeypatch.setattr(worker._client, "call", lambda commands: (_ for _ in ()).throw(TimeoutError("frozen")))
    worker.append(progress(1))
    worker._spill._segments.forget()  # as its death would
    standby = RedisReader(server.url, "destination", directory=tmp_path / "spill", clock=clock)
    relay = LeadingReader(server.url, "destination", clock=clock)
    relay.poll(10)
    standby.sync()
    assert drain(relay) == ["job-1"]
    assert list((tmp_path / "spill").glob("*-0*")) == []
    standby.close()
    relay.close()
