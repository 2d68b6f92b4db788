"""What every kind of journal promises, whatever it is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import pytest

from tests.support.journal import LeadingReader, drain, progress
from tests.support.redis_server import RedisServer
from xpander_celery.events import Event, Progress, encode
from xpander_celery.journal import Appended, Journal, JournalReader
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.memory import MemoryJournal
from xpander_celery.journal.reader import FileReader
from xpander_celery.journal.redis.keys import Keys
from xpander_celery.journal.redis.pulse import GRACE_S
from xpander_celery.journal.redis.reader import RedisReader
from xpander_celery.journal.redis.writer import RedisJournal


class Kind(Protocol):
    """One kind of journal: its processes and its relays share one place."""

    def process(self) -> Journal: ...
    def relay(self) -> JournalReader: ...
    def die(self, journal: Journal) -> None: ...
    def is_alive_at_last(self, reader: JournalReader, process_id: str) -> bool: ...


class Files:
    def __init__(self, directory: Path) -> None:
        self.directory = directory / "state" / "destination"

    def process(self) -> FileJournal:
        return FileJournal(self.directory)

    def relay(self) -> FileReader:
        return FileReader(self.directory)

    def die(self, journal: Journal) -> None:
        assert isinstance(journal, FileJournal)
        journal._segments.forget()  # what the kernel does: every descriptor is closed, no file is touched

    def is_alive_at_last(self, reader: JournalReader, process_id: str) -> bool:
        return reader.is_alive(process_id)


class Memory:
    def __init__(self) -> None:
        self.shared = MemoryJournal()

    def process(self) -> MemoryJournal:
        return self.shared.another_process()

    def relay(self) -> MemoryJournal:
        return self.shared.another_process()

    def die(self, journal: Journal) -> None:
        journal.close()

    def is_alive_at_last(self, reader: JournalReader, process_id: str) -> bool:
        return reader.is_alive(process_id)


class Redis:
    """Heartbeats expire by a clock that stands still until somebody waits for a death."""

    def __init__(self, server: RedisServer, directory: Path) -> None:
        self.server = server
        self.directory = directory / "spill"
        self.now = 1000.0
        server.client.ask("FLUSHALL")

    def clock(self) -> float:
        return self.now

    def process(self) -> RedisJournal:
        spill = FileJournal(self.directory)
        return RedisJournal(self.server.url, "destination", spill=spill, clock=self.clock)

    def relay(self) -> RedisReader:
        self.server.client.ask("DEL", Keys("destination").lease)
        return LeadingReader(self.server.url, "destination", clock=self.clock)

    def die(self, journal: Journal) -> None:
        self.server.client.ask("DEL", Keys("destination").alive(journal.process_id))

    def is_alive_at_last(self, reader: JournalReader, process_id: str) -> bool:
        assert isinstance(reader, RedisReader)
        for _ in range(3):  # as before, missed, missed for long enough
            is_alive = reader.is_alive(process_id)
            self.now += GRACE_S
        return is_alive


@pytest.fixture(params=["files", "memory", "redis"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    if request.param == "redis":
        return Redis(request.getfixturevalue("redis_server"), tmp_path)
    return Files(tmp_path) if request.param == "files" else Memory()


def ids(events: list[Event]) -> list[str]:
    return [event.job_id for event in events]


def test_an_appended_event_is_read_as_it_was_written(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    journal.open()
    assert journal.append(progress(1, used_tools=["search"], duration_s=0.5)) is Appended.DURABLE
    [event] = reader.poll(10).events
    assert event == Progress(job_id="job-1", attempt_id="a", at=1.0, used_tools=("search",), duration_s=0.5)


def test_events_of_one_process_come_in_their_order(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    for number in range(50):
        journal.append(progress(number))
    assert drain(reader, limit=7) == [f"job-{number}" for number in range(50)]


def test_a_batch_keeps_to_its_limit(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    for number in range(5):
        journal.append(progress(number))
    assert [len(reader.poll(limit).events) for limit in (1, 3)] == [1, 3]


def test_what_is_not_settled_comes_again(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    journal.append(progress(1))
    assert ids(reader.poll(10).events) == ids(reader.poll(10).events) == ["job-1"]


def test_what_is_settled_never_comes_again(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    journal.append(progress(1))
    reader.settle(reader.poll(10))
    journal.append(progress(2))
    assert ids(reader.poll(10).events) == ["job-2"]


def test_the_next_relay_goes_on_behind_what_was_settled(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    for number in range(4):
        journal.append(progress(number))
    batch = reader.poll(2)
    reader.settle(batch)
    following = kind.relay()
    following.resume(batch.positions)
    assert drain(following) == ["job-2", "job-3"]


def test_the_next_relay_reads_again_what_was_not_committed(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    journal.append(progress(1))
    reader.poll(10)
    following = kind.relay()
    following.resume({})
    assert drain(following) == ["job-1"]


def test_events_of_a_dead_process_are_read(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    journal.append(progress(1))
    kind.die(journal)
    assert drain(reader) == ["job-1"]
    assert drain(reader) == []


def test_a_process_is_alive_from_its_first_event_until_its_death(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    assert not kind.is_alive_at_last(reader, "0" * 16)
    journal.append(progress(1))
    assert reader.is_alive(journal.process_id)
    kind.die(journal)
    assert not kind.is_alive_at_last(reader, journal.process_id)


def test_an_opened_process_is_alive_before_it_writes_and_dead_after_it_closes(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    journal.open()
    journal.open()
    assert reader.is_alive(journal.process_id)
    journal.close()
    assert not kind.is_alive_at_last(reader, journal.process_id)


def test_processes_have_ids_of_their_own(kind: Kind) -> None:
    assert kind.process().process_id != kind.process().process_id


def test_an_append_after_closing_is_still_kept(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    journal.append(progress(1))
    journal.close()
    assert journal.append(progress(2)) is Appended.DURABLE
    assert reader.is_alive(journal.process_id)
    assert sorted(drain(reader)) == ["job-1", "job-2"]


def test_the_backlog_is_what_is_not_settled(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    assert reader.backlog_bytes() == 0
    journal.append(progress(1))
    batch = reader.poll(10)
    assert reader.backlog_bytes() >= len(encode(progress(1)))
    reader.settle(batch)
    assert reader.backlog_bytes() == 0


def test_an_oversized_event_is_trimmed_and_not_lost(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    event = progress(1) | {"kind": "finished", "outcome": "succeeded", "duration_s": 1.0}
    event |= {"llm_response": "x" * 300_000, "result": "kept", "tokens": {"prompt_tokens": 7}}
    assert journal.append(event) is Appended.DURABLE
    [found] = reader.poll(10).events
    assert found.kind == "finished"
    assert found.result == "kept"
    assert found.tokens.prompt_tokens == 7
    assert len(found.llm_response) < 10_000
    assert journal.counters.trimmed == 1


def test_a_value_that_cannot_be_encoded_does_not_cost_the_event(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    event = progress(1) | {"kind": "finished", "outcome": "failed", "duration_s": 1.0, "result": object()}
    assert journal.append(event) is Appended.DURABLE
    assert ids(reader.poll(10).events) == ["job-1"]


def test_an_event_that_nothing_helps_is_dropped_and_counted(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    assert journal.append({"job_id": object()}) is Appended.DROPPED
    assert journal.counters.dropped == 1
    assert reader.poll(10).events == []


def test_every_durable_event_is_counted(kind: Kind) -> None:
    journal = kind.process()
    for number in range(3):
        journal.append(progress(number))
    assert (journal.counters.durable, journal.counters.buffered, journal.counters.dropped) == (3, 0, 0)


def test_syncing_changes_nothing_that_is_read(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    reader.sync()
    journal.append(progress(1))
    reader.sync()
    assert drain(reader) == ["job-1"]


def test_a_relay_that_is_alone_leads_and_what_it_acknowledges_is_forgotten(kind: Kind) -> None:
    journal, reader = kind.process(), kind.relay()
    journal.append(progress(1))
    term = reader.lead()
    assert term is not None
    assert reader.lead() == term
    batch = reader.poll(10)
    reader.settle(batch)
    assert reader.acknowledge(batch.receipts)
    assert reader.poll(10).events == []
    assert reader.shared("gate") is None
    reader.share("gate", {"flow": "paused"}, lasts_s=10)
    reader.close()
