"""Any order of appending, rotating, dying, failing and reading: nothing acknowledged is lost, nothing is read twice.

The index of the relay is a counter of ids and the positions, committed together, as the real one is.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tests.support.journal import sized
from xpander_celery.events import encode
from xpander_celery.journal import Appended, Batch
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.reader import FileReader
from xpander_celery.journal.segments import frame


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of warnings about torn lines help nobody."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Journals(RuleBasedStateMachine):
    processes = Bundle("processes")

    def __init__(self) -> None:
        super().__init__()
        self._place = tempfile.TemporaryDirectory()
        self.directory = Path(self._place.name) / "journal"
        self.now = 0.0
        self.number = 0
        self.living: list[FileJournal] = []
        self.torn = 0
        self.durable: set[str] = set()
        self.held: dict[str, set[str]] = {}
        self.index: Counter[str] = Counter()
        self.positions: dict[str, int] = {}
        self.corrupt = 0
        self.reader = FileReader(self.directory, clock=self.clock)

    def clock(self) -> float:
        return self.now

    @rule(target=processes)
    def start(self) -> FileJournal:
        journal = FileJournal(self.directory, clock=self.clock)
        journal.open()
        self.living.append(journal)
        self.held[journal.process_id] = set()
        return journal

    @rule(journal=processes, size=st.sampled_from([0, 10, 3000, 150_000]))
    def append(self, journal: FileJournal, size: int) -> None:
        self.number += 1
        answer = journal.append(sized(self.number, size))
        held = self.held[journal.process_id]
        if answer is Appended.BUFFERED:
            held.add(f"job-{self.number}")
        elif answer is Appended.DURABLE:
            self.durable.add(f"job-{self.number}")
        if not journal.counters.buffered:
            self.durable |= held
            held.clear()

    @rule(journal=processes)
    def rotate(self, journal: FileJournal) -> None:
        journal._segments._rotate_at = 0.0

    @rule(seconds=st.sampled_from([0.5, 2.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(journal=processes, part=st.floats(0.05, 0.95))
    def a_write_is_short_once(self, journal: FileJournal, part: float) -> None:
        descriptor = journal._segments._descriptor.get("segment")
        if descriptor is not None and journal._segments._rotate_at > 0:
            line = frame(encode(sized("torn", 300)))
            begun = b"\n" if journal._segments._is_torn else b""
            os.write(descriptor, begun + line[: int(len(line) * part)])
            journal._segments._is_torn = True
            self.torn += 1

    @rule(journal=processes)
    def the_disk_fails(self, journal: FileJournal) -> None:
        def fail(line: bytes) -> None:
            raise OSError(errno.ENOSPC, "full")

        journal._segments.__dict__["write"] = fail

    @rule(journal=processes)
    def the_disk_recovers(self, journal: FileJournal) -> None:
        journal._segments.__dict__.pop("write", None)

    @rule(journal=processes, events=st.integers(1, 4), size=st.sampled_from([10, 150_000]))
    def an_outage(self, journal: FileJournal, events: int, size: int) -> None:
        self.the_disk_fails(journal)
        for _ in range(events):
            self.append(journal, size)
        self.the_disk_recovers(journal)
        self.time_passes(2.0)
        self.append(journal, size)

    @rule(journal=consumes(processes), amid_a_write=st.booleans())
    def kill(self, journal: FileJournal, amid_a_write: bool) -> None:
        if amid_a_write:
            self.a_write_is_short_once(journal, 0.5)
        journal._segments.forget()
        self.living.remove(journal)

    @rule(journal=consumes(processes))
    def close(self, journal: FileJournal) -> None:
        process_id = journal.process_id
        journal.close()
        if not journal.counters.buffered:
            self.durable |= self.held[process_id]
        self.living.remove(journal)

    def commit(self, batch: Batch) -> None:
        self.index.update(event.job_id for event in batch.events)
        self.positions = dict(batch.positions)
        self.corrupt += batch.corrupt

    @rule(limit=st.integers(1, 20))
    def ingest(self, limit: int) -> None:
        batch = self.reader.poll(limit)
        self.commit(batch)
        self.reader.settle(batch)

    def restart_relay(self) -> None:
        self.reader = FileReader(self.directory, clock=self.clock)
        self.reader.resume(self.positions)

    @rule(limit=st.integers(1, 20))
    def relay_dies_before_its_commit(self, limit: int) -> None:
        self.reader.poll(limit)
        self.restart_relay()

    @rule(limit=st.integers(1, 20))
    def relay_dies_after_its_commit(self, limit: int) -> None:
        self.commit(self.reader.poll(limit))
        self.restart_relay()

    @rule(limit=st.integers(1, 20))
    def a_commit_fails(self, limit: int) -> None:
        self.reader.poll(limit)

    @rule()
    def sync(self) -> None:
        self.reader.sync()

    @invariant()
    def nothing_is_read_twice(self) -> None:
        assert [name for name, times in self.index.items() if times > 1] == []

    @invariant()
    def the_living_are_alive(self) -> None:
        assert all(self.reader.is_alive(journal.process_id) for journal in self.living)

    def teardown(self) -> None:
        try:
            for journal in self.living:
                journal._segments.forget()
            while True:
                batch = self.reader.poll(50)
                self.commit(batch)
                self.reader.settle(batch)
                if not (batch.events or batch.finished or batch.corrupt):
                    break
            self.nothing_is_read_twice()
            assert self.durable - set(self.index) == set()
            assert self.corrupt == self.torn
            assert self.reader.backlog_bytes() == 0
            assert not any(".v1e1" in path.name for path in self._files())
        finally:
            self._place.cleanup()

    def _files(self) -> list[Path]:
        return list(self.directory.iterdir()) if self.directory.exists() else []


TestJournals: Any = Journals.TestCase
TestJournals.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
