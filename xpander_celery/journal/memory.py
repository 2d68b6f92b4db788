"""Both sides of a journal in memory: for tests, and for user's tests through `xpander_celery.testing`.

It keeps encoded events, so that what cannot be encoded or read fails here as it would in a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xpander_celery.events import decode
from xpander_celery.journal import Appended, Batch, Counters, SoleReader
from xpander_celery.journal.liveness import new_process_id
from xpander_celery.journal.trimming import record_text

_NAME = "memory"


class MemoryJournal(SoleReader):
    """One list of events. `another_process` gives the view of a further process; `kill` ends this one."""

    def __init__(self, *, store: MemoryStore | None = None) -> None:
        self.process_id = new_process_id()
        self.counters = Counters()
        self._store = store if store is not None else MemoryStore()

    def another_process(self) -> MemoryJournal:
        """The journal as a further process would hold it."""
        return MemoryJournal(store=self._store)

    def open(self) -> None:
        """Become alive."""
        self._store.alive.add(self.process_id)

    def append(self, event: dict[str, Any]) -> Appended:
        """Keep one event, as long as this process lives."""
        self.open()
        text, is_trimmed = record_text(event)
        self.counters.trimmed += is_trimmed
        if text is None:
            self.counters.dropped += 1
            return Appended.DROPPED
        self._store.texts.append(text)
        self.counters.durable += 1
        return Appended.DURABLE

    def tend(self) -> None:
        """Nothing is ever held back."""

    def close(self) -> None:
        """Be dead, as a process is that ended."""
        self._store.alive.discard(self.process_id)

    kill = close

    def resume(self, positions: Mapping[str, int]) -> None:
        """Go on behind as many events as the position says."""
        self._store.settled = max(self._store.settled, positions.get(_NAME, 0))

    def poll(self, limit: int) -> Batch:
        """At most `limit` events beyond what was settled."""
        store = self._store
        texts = store.texts[store.settled : store.settled + limit]
        return Batch(
            events=[decode(text) for text in texts],
            positions={_NAME: store.settled + len(texts)},
            size=sum(map(len, texts)),
        )

    def settle(self, batch: Batch) -> None:
        """Forget what `batch` read."""
        self._store.settled = batch.positions[_NAME]

    def is_alive(self, process_id: str) -> bool:
        """False once the process is dead, or was never seen."""
        return process_id in self._store.alive

    def backlog_bytes(self) -> int:
        """What is written and not yet settled."""
        return sum(map(len, self._store.texts[self._store.settled :]))

    def sync(self) -> None:
        """Memory is as durable as it can be."""


class MemoryStore:
    """What the processes of one memory journal share."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []
        self.settled = 0
        self.alive: set[str] = set()
