"""Sends what is due: as many workers as may send at once, each with a connection of its own, on one event loop.

It decides nothing by itself: `policy.Gate` says who may send when and what an answer means, the index keeps what came
of it. One report at most is on its way for each job.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable

from xpander_celery.errors import JournalError
from xpander_celery.journal.notices import Notice
from xpander_celery.relay.clock import Clock
from xpander_celery.relay.index import Index
from xpander_celery.relay.inflight import InFlight
from xpander_celery.relay.letters import Letter, Letters, Unsent
from xpander_celery.relay.policy import Fate, Flow, Gate, Permit, Ruling, Try
from xpander_celery.relay.replies import DELIVERED, read_error
from xpander_celery.relay.rows import Job, Result
from xpander_celery.relay.targets import Target

_LEAST_READY = 64  # what is fetched at once, or twice as many as can be sent at once
_READY_BYTES = 4 * 1024**2
_COMMIT_AT = 200
_COMMIT_AFTER_S = 0.1
_MOST_UNSTORED = 1000  # results; while they cannot be stored, nothing more is sent
_RELEASED_AT_ONCE = 500
_MAX_REASON = 1000

logger = logging.getLogger(__name__)


class Delivery:
    """Owns the sending workers and what they hold. `wake` is called when the main loop has something to do for them."""

    def __init__(
        self,
        *,
        index: Index,
        gate: Gate,
        clock: Clock,
        targets: Callable[[], Target],
        in_flight: InFlight,
        concurrency: int,
        settings: str,
        letters: Letters,
        wake: Callable[[], None],
    ) -> None:
        self._index = index
        self._gate = gate
        self._clock = clock
        self._targets = targets
        self._in_flight = in_flight
        self._concurrency = concurrency
        self._settings = settings
        self._letters = letters
        self._wake = wake
        self._ready: deque[Job] = deque()
        self._has_more = False  # of what is due, in the index
        self._leased: set[int] = set()  # ready, in flight, or with a result that is not committed
        self._stale: set[int] = set()  # of those that are ready: the index has something newer
        self._sending = 0
        self._is_alone = False  # what is in flight is suspected of having killed the relay
        self._results: list[Result] = []
        self._first_result_at = 0.0
        self._counters: Counter[str] = Counter()
        self._reopened: list[Job] = []
        self._released: list[str] = []  # agents whose held reports may go again
        self._parked: list[asyncio.Future[None]] = []
        self._is_stopping = False
        self._stored_gate = gate.snapshot()
        self._deaths = Notice(logger, "report_dead", clock=clock.now)
        for agent_id, reason in index.held_agents().items():
            gate.hold(agent_id, reason)

    # The main loop's side

    @property
    def is_sending(self) -> bool:
        """Whether something is on its way."""
        return self._sending > 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way, nothing could be, and everything is stored."""
        is_blocked = self._clock.now() < self._gate.opens_at()
        return not self._sending and not self._results and (is_blocked or not (self._ready or self._has_more))

    @property
    def is_short(self) -> bool:
        """Whether the workers are about to run out of reports although more are due."""
        return self._has_more and len(self._ready) < self._concurrency

    def drop(self, rows: Iterable[int]) -> None:
        """The index has newer revisions of these: what is still here of them is not sent."""
        changed = set(rows)
        self._stale.update(job.row for job in self._ready if job.row in changed)

    def commit(self, *, at_once: bool = False, is_tight: bool = False) -> list[Job]:
        """Store results, several at a time unless `at_once`. Returns jobs that turned out not to be over.

        `is_tight`: keep no more of them than what nobody can do without.
        """
        now = self._clock.now()
        is_time = len(self._results) >= _COMMIT_AT or now - self._first_result_at >= _COMMIT_AFTER_S
        if at_once or is_time:
            self._store_results(now, is_tight=is_tight)
        snapshot = self._gate.snapshot()
        if snapshot != self._stored_gate:
            self._index.store_gate({**snapshot, "settings": self._settings})
            self._stored_gate = snapshot
        reopened, self._reopened = self._reopened, []
        self._leased.difference_update(job.row for job in reopened)
        return reopened

    def _store_results(self, now: float, *, is_tight: bool = False) -> None:
        if self._results:
            self._index.finish(self._results, now, counters=self._counters, is_tight=is_tight)
            self._leased.difference_update(result.row for result in self._results)
            self._results.clear()
            self._counters.clear()

    def refill(self) -> None:
        """Fetch what is due, as far as it could be sent now, and let the workers go on."""
        now = self._clock.now()
        if self._released:
            self._store_results(now)  # some may have met the pause, and shall go too
        while self._released:
            agent_id, at_once = self._released[-1], _RELEASED_AT_ONCE
            if self._index.release_held(agent_id, now, limit=at_once, without=self._leased) == at_once:
                break  # the rest with the next call
            self._released.pop()
        if self._is_stopping or now < self._gate.opens_at():
            return
        if len(self._ready) < self._concurrency:
            limit = max(_LEAST_READY, 2 * self._concurrency) if self._gate.flow is Flow.FLOWING else 1
            found = self._index.due(now, limit=limit, max_bytes=_READY_BYTES, without=self._leased)
            self._has_more = len(found) > limit // 2
            self._ready.extend(found)
            self._leased.update(job.row for job in found)
        for agent_id in self._gate.agents_to_probe(now):
            probe = self._index.longest_held(agent_id, without=self._leased)
            if probe is not None:
                self._ready.appendleft(probe)
                self._leased.add(probe.row)
        if self._ready:
            self._let_go_on()

    def put_down(self) -> None:
        """Leave what is ready to whoever fetches it next."""
        self._leased.difference_update(job.row for job in self._ready)
        self._ready.clear()
        self._stale.clear()
        self._has_more = False

    def _let_go_on(self) -> None:
        """Have the workers that found nothing to send look again."""
        parked, self._parked = self._parked, []
        for future in parked:
            if not future.done():
                future.set_result(None)

    def stop(self) -> None:
        """Begin nothing more."""
        self._is_stopping = True
        self.put_down()

    # The workers' side

    async def work(self, slot: int) -> None:
        """One sending worker; ends when it is cancelled."""
        target = self._targets()
        try:
            while True:
                taken = self._take(slot)
                if taken is None:
                    future = asyncio.get_running_loop().create_future()
                    self._parked.append(future)
                    self._wake_if_needed()
                    await future
                    continue
                letter, permit = taken
                self._sending += 1
                try:
                    await self._send(slot, target, letter, permit)
                finally:
                    self._sending -= 1
                    self._in_flight.clear(slot)
                    if self._is_alone:
                        self._is_alone = False
                        self._let_go_on()
                self._wake_if_needed()
        finally:
            await target.aclose()

    def _wake_if_needed(self) -> None:
        if self.is_short or len(self._results) >= _COMMIT_AT or self._reopened or self._released:
            self._wake()

    def _take(self, slot: int) -> tuple[Letter, Permit] | None:
        """The next report that may be sent now; whenever code runs for it, it is marked."""
        now = self._clock.now()
        can_store = len(self._results) < _MOST_UNSTORED
        while can_store and self._ready and now >= self._gate.opens_at() and not self._is_alone:
            job = self._ready.popleft()
            agent_id = job.agent_id or ""
            if job.row in self._stale:
                self._stale.discard(job.row)
                self._leased.discard(job.row)
                self._has_more = True
            elif self._gate.is_held(agent_id, now):
                self._add(job, Ruling(Fate.HELD, reason=self._gate.held_agents()[agent_id]))
            elif job.crashes and self._sending:
                self._ready.appendleft(job)
                return None  # it goes alone, so that nobody else is to blame
            else:
                self._in_flight.mark(slot, job.row)
                letter = self._letters.prepare(job, now, self._index.gone)
                if isinstance(letter, Letter):
                    permit = self._gate.permit(job.row, agent_id, now) if self._may_correct(job) else None
                    if permit is not None:
                        self._is_alone = bool(job.crashes)
                        return letter, permit
                    self._ready.appendleft(job)
                    self._in_flight.clear(slot)
                    return None
                self._in_flight.clear(slot)
                if isinstance(letter, Unsent):
                    self._add(job, Ruling(letter.fate, reason=letter.reason), counter=letter.counter)
                else:
                    self._reopened.append(job)
        return None

    def _may_correct(self, job: Job) -> bool:
        """Store first that the platform is about to get another report of the job, so that one which comes back to its
        former report is sent again, by the next relay too. False while that cannot be stored: the main loop meets the
        same trouble, and handles it.
        """
        if job.digest:
            try:
                self._index.doubt(job.row)
            except JournalError:
                return False
        return True

    async def _send(self, slot: int, target: Target, letter: Letter, permit: Permit) -> None:
        """Deliver one report, and note what came of it."""
        job, reply, counter = letter.job, DELIVERED, "delivered"
        try:
            counter = await self._in_flight.watching(slot, job.row, _exchange(target, letter))
        except Exception as error:  # noqa: BLE001 - whatever a backend raises, it is an answer
            reply = read_error(error, now=self._clock.wall())
        before = Try(tries=job.tries, attempts=job.attempts, trimmed=job.trimmed)
        ruling = self._gate.rule(permit, reply, before, self._clock.now())
        if ruling.notice:
            logger.warning(ruling.notice, extra={"event": "delivery_changed"})
        if permit.is_agent_probe and permit.agent_id not in self._gate.held_agents():
            self._released.append(permit.agent_id)
        delivered = counter == "delivered" and ruling.fate is Fate.SETTLED
        self._add(job, ruling, counter=counter, digest=letter.digest if delivered else None)

    def _add(self, job: Job, ruling: Ruling, *, counter: str = "", digest: bytes | None = None) -> None:
        now = self._clock.now()
        if not self._results:
            self._first_result_at = now
        match ruling.fate:
            case Fate.SETTLED:
                self._counters[counter] += 1
            case Fate.RETRY | Fate.TRIM:
                self._counters["retried"] += 1
            case Fate.DEAD:
                self._counters["died"] += 1
                self._deaths.warn("A report is given up and kept as dead: %s", ruling.reason)
        self._results.append(
            Result(
                row=job.row,
                revision=job.revision,
                phase=job.phase,
                size=job.size,
                fate=ruling.fate,
                at=now + ruling.wait_s,
                counts=ruling.counts,
                digest=digest,
                reason=ruling.reason[:_MAX_REASON].encode(errors="replace").decode() or None,
            )
        )


async def _exchange(target: Target, letter: Letter) -> str:
    """Let the platform have the report; returns what to count that as."""
    is_ours = letter.job.digest is not None  # then what stands there is no better word than this one
    if letter.inferred and not is_ours and await target.has_ended(letter.report):
        return "left_as_recorded"
    await target.send(letter.report)
    return "delivered"
