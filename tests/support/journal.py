"""Events to append and ways to read them, for every test of the journal."""

from __future__ import annotations

from typing import Any

from xpander_celery.journal import Batch, JournalReader
from xpander_celery.journal.redis.reader import RedisReader


class LeadingReader(RedisReader):
    """As a relay uses it: it asks for the lease before it reads, and once more where it turns out to be lost."""

    def poll(self, limit: int) -> Batch:
        self.lead()
        batch = super().poll(limit)
        if self.is_active or self.lead() is None:
            return batch
        return super().poll(limit)


def progress(number: object, **more: Any) -> dict[str, Any]:
    """A small event of the job `job-<number>`."""
    return {"v": 1, "kind": "progress", "job_id": f"job-{number}", "attempt_id": "a", "at": 1.0, **more}


def sized(number: object, size: int) -> dict[str, Any]:
    """An event that takes about `size` bytes."""
    return progress(number, used_tools=["x" * size])


def drain(reader: JournalReader, limit: int = 500) -> list[str]:
    """Read and settle everything there is; the ids of the jobs, in the order read."""
    found: list[str] = []
    while (batch := reader.poll(limit)).events or batch.finished or batch.corrupt:
        found += [event.job_id for event in batch.events]
        reader.settle(batch)
    return found
