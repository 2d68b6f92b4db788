"""From the journal into the index: reads events, folds them, and judges which jobs are over.

It knows neither the platform nor when reports are sent. Whatever an event holds, its neighbours get through.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from xpander_celery.events import Event
from xpander_celery.fold import Final, JobState, Open, fold, verdict
from xpander_celery.journal import JournalReader
from xpander_celery.relay.index import Index
from xpander_celery.relay.policy import MAX_CRASHES
from xpander_celery.relay.reports import digest_of
from xpander_celery.relay.rows import Change, Job, Phase

MAX_BATCH = 250  # events; twice as many cost 0.4 MB of memory for good
_LARGE_BATCH_BYTES = 2 * 1024**2  # readers cut batches by size too
_NEVER = float("inf")
_AHEAD_S = 5.0  # clocks differ

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Taken:
    """What one call changed. `rows` that were known before may be on their way to the platform in an older form."""

    rows: tuple[int, ...] = ()
    is_all: bool = True  # whether nothing else was there
    has_more: bool = False  # whether the next call would find more at once


class Ingest:
    """Moves events from one reader into one index. `set_aside` keeps what cannot be folded, for inspection."""

    def __init__(
        self,
        *,
        reader: JournalReader,
        index: Index,
        redelivery_wait_s: float,
        set_aside: Callable[[str, Iterable[Event]], None],
    ) -> None:
        self._reader = reader
        self._index = index
        self._redelivery_wait_s = redelivery_wait_s
        self._set_aside = set_aside
        self._seen_dead: dict[str, float] = {}  # since the journal was read: their last words may not be known
        self._gone: dict[str, float] = {}  # all is read of them, but they are not yet in the index
        self._to_look_at: dict[int, None] = {}  # rows that watched a process that died, in order
        self._is_read = False  # all that was written when this turn began

    def take(self, now: float, limit: int = MAX_BATCH) -> Taken:
        """Read at most `limit` events, store what they say, and let the journal forget them."""
        batch = self._reader.poll(limit)
        has_more = len(batch.events) >= limit or batch.size >= _LARGE_BATCH_BYTES
        self._is_read = batch.is_whole and not has_more
        if self._is_read:
            self._believe_deaths()
        by_job: dict[str, list[Event]] = {}
        for event in batch.events:
            by_job.setdefault(event.job_id, []).append(_until_now(event, now))
        receipts: dict[str, list[str]] = {}
        for event, receipt in zip(batch.events, batch.receipts, strict=False):  # most journals give none
            receipts.setdefault(event.job_id, []).append(receipt)
        counters = Counter(appended=len(batch.events), corrupt=batch.corrupt, dropped=batch.dropped)
        changes: list[Change] = []
        if by_job:
            known = self._index.find(by_job)
            for job_id, events in by_job.items():
                change = self._folded(job_id, events, known.get(job_id), now, counters)
                if change is not None:
                    kept = tuple(receipts.pop(job_id, ()))
                    changes.append(replace(change, receipts=kept) if kept else change)
        if batch.events or batch.positions != self._index.positions:
            released = [receipt for unfoldable in receipts.values() for receipt in unfoldable]
            self._index.record(changes, now, positions=batch.positions, counters=counters, released=released)
        self._reader.settle(batch)
        rows = tuple(change.before.row for change in changes if change.before is not None)
        return Taken(rows, is_all=self._is_read, has_more=has_more)

    def see_deaths(self, now: float) -> bool:
        """Find out which of the watched processes are dead; whether there are more of them than before.

        They count, and their jobs are looked at, once everything is read after that: a process may write its last
        words between the reading and its death.
        """
        known = self._seen_dead.keys() | self._gone.keys()
        dead = {each: now for each in self._index.watched() if each not in known and not self._reader.is_alive(each)}
        self._seen_dead |= dead
        return bool(dead)

    def _believe_deaths(self) -> None:
        for process_id in self._seen_dead:
            self._to_look_at.update(dict.fromkeys(self._index.watchers(process_id)))
        self._gone |= self._seen_dead
        self._seen_dead.clear()

    def look(self, now: float, limit: int = MAX_BATCH) -> Taken:
        """Judge again the open jobs whose time has come, or whose process died, when all that is written is read."""
        rows = list(islice(self._to_look_at, limit))
        jobs = {job.row: job for job in self._index.load(rows) if job.phase is Phase.OPEN}
        jobs |= {job.row: job for job in self._index.to_look_at(now, limit)}
        self.judge(jobs.values(), now)
        for row in rows:
            del self._to_look_at[row]
        return Taken(tuple(jobs), is_all=len(jobs) < limit)

    def judge(self, jobs: Iterable[Job], now: float) -> None:
        """Store where jobs stand of which nothing new is known, but the time and the deaths of processes."""
        changes, counters = [], Counter[str]()
        for job in jobs:
            try:
                state = JobState.model_validate_json(job.state)
            except ValueError as error:
                reason = f"its state is unreadable: {error}"
                changes.append(Change(job.job_id, Phase.DEAD, now, before=job, reason=reason))
            else:
                changes.append(self._judged(state, None, job, now, counters))
        if changes or self._gone:
            self._index.record(changes, now, gone=self._gone, counters=counters)
            self._gone.clear()

    def _folded(
        self, job_id: str, events: list[Event], before: Job | None, now: float, counters: Counter[str]
    ) -> Change | None:
        try:
            state = fold(events, JobState.model_validate_json(before.state) if before is not None else None)
            text = state.model_dump_json()
            if before is not None and before.crashes >= MAX_CRASHES and text == before.state:  # it came once more
                return Change(job_id, Phase.DEAD, now, before, agent_id=before.agent_id, reason=before.reason)
            return self._judged(state, text, before, now, counters)
        except Exception:  # a single job must not stop all others
            logger.exception("events could not be folded", extra={"event": "fold_failed", "job_id": job_id})
            counters["unfoldable"] += len(events)
            self._set_aside(job_id, events)
            return None

    def _judged(
        self, state: JobState, text: str | None, before: Job | None, now: float, counters: Counter[str]
    ) -> Change:
        gone: Mapping[str, float] = {**self._index.gone, **self._gone} if self._gone else self._index.gone
        match verdict(state, now=now, gone=gone, redelivery_wait_s=self._redelivery_wait_s, is_read=self._is_read):
            case Open(until, watch):
                at = _NEVER if until is None else until
                return Change(state.job_id, Phase.OPEN, at, before=before, state=text, watch=watch)
            case Final(report=None):
                counters["unreported"] += 1
                return Change(state.job_id, Phase.SETTLED, now, before=before, state=text)
            case Final(report=report):
                assert report is not None
                agent_id = report.agent_id
                change = Change(state.job_id, Phase.DUE, now, before=before, state=text, agent_id=agent_id)
        if before is None:
            return change
        if before.digest and before.digest == digest_of(report):
            counters["unchanged"] += 1
            return Change(state.job_id, Phase.SETTLED, now, before=before, state=text, agent_id=agent_id)
        if before.phase is Phase.HELD and before.agent_id == agent_id:
            return Change(state.job_id, Phase.HELD, now, before, text, agent_id, reason=before.reason)
        if before.phase is Phase.DUE and before.tries:  # new words do not shorten the wait after a failure
            return Change(state.job_id, Phase.DUE, max(now, before.at), before, text, agent_id, reason=before.reason)
        return change


def _until_now(event: Event, now: float) -> Event:
    """The event, at a time that is not far ahead of this relay's clock, in the order that it has among others.

    The time of day may be set forward while the relay keeps its own: what is waited for from then on would stall.
    """
    ahead_s = event.at - now
    return event.model_copy(update={"at": now + ahead_s * 1e-6}) if ahead_s > _AHEAD_S else event
