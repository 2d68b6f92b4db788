"""One relay at work: takes events in, judges, lets send, and acknowledges, one turn after the other.

Where several relays share a journal, one of them leads; the others stand by and do nothing. A turn never waits, so that
tests drive it with a clock of their own; `process` gives it real time and signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from xpander_celery.events import Event, encode
from xpander_celery.journal import JournalReader, Term
from xpander_celery.journal.notices import Notice
from xpander_celery.relay.clock import Clock
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.delivery import Delivery
from xpander_celery.relay.desk import Desk
from xpander_celery.relay.index import Index
from xpander_celery.relay.inflight import InFlight
from xpander_celery.relay.ingest import MAX_BATCH, Ingest
from xpander_celery.relay.letters import Hook, Letters
from xpander_celery.relay.mailbox import Mailbox, Postbox, Request
from xpander_celery.relay.policy import MAX_BACKOFF_S, Flow, Gate
from xpander_celery.relay.rows import Phase
from xpander_celery.relay.schema import IndexFullError, Reserve
from xpander_celery.relay.status import HEARTBEAT_S, Status
from xpander_celery.relay.targets import Target

POLL_S = 0.2
_EAGER_POLL_S = 0.02
_BATCH_WHILE_SENDING = 100  # so that no sender waits long for the loop
_BATCH_WHEN_TIGHT = 20  # a whole batch may not fit where a part of it does
_DEATHS_EVERY_S = 0.2
_FULL_WAIT_S = 5.0
_LEAST_ROOM_BYTES = 4 * 1024**2  # beyond what acknowledgements need
_SETTLED_ROWS = 200_000
_SETTLED_BYTES = 256 * 1024**2
_PRUNED_AT_ONCE = 2000
_SET_ASIDE_FILES = 500
_ACKNOWLEDGE_EVERY_S = 0.2
_ACKNOWLEDGED_AT_ONCE = 1000
_STANDS_BY = {"error": "this relay stands by, another one leads", "drained": False}
_GATE, _GATE_LASTS_S = "gate", 2 * 3600  # longer than any wait

logger = logging.getLogger(__name__)


class Relay:
    """One relay on an open index. Whoever makes it holds the lock of the directory, and closes the index.

    `postboxes` are further places where the relay that leads is asked something.
    """

    def __init__(
        self,
        config: RelayConfig,
        *,
        index: Index,
        reader: JournalReader,
        targets: Callable[[], Target],
        chance: Callable[[], float],
        clock: Clock,
        hook: Hook | None = None,
        postboxes: Sequence[Postbox] = (),
    ) -> None:
        self._config = config
        self._index = index
        self._reader = reader
        self._clock = clock
        now = clock.now()
        reader.resume(index.positions)
        self._full_until = float("-inf")
        self._full = Notice(logger, "index_full", clock=clock.now)
        self._reserve = Reserve(config.directory)
        self.gate = Gate(per_minute=config.rate_limit_per_minute, chance=chance)
        self._restore_gate(index.gate, now)
        seen = Status.read(config.directory)
        if seen is not None:
            self.gate.assume_spent(min(now, seen.at + 2 * HEARTBEAT_S))  # what was sent then is not known
        self._in_flight = InFlight(config.directory, config.concurrency)
        suspects, unanswered = self._in_flight.suspects, self._in_flight.unanswered
        self._with_reserve(lambda: index.clamp_waits(now, longest_s=MAX_BACKOFF_S))
        if suspects:
            self._with_reserve(lambda: index.note_crashes(suspects, now))
        if unanswered:
            self._with_reserve(lambda: index.put_last(unanswered, now))
        self.woken = asyncio.Event()
        self._ingest = Ingest(
            reader=reader,
            index=index,
            redelivery_wait_s=config.redelivery_wait_s,
            set_aside=lambda job_id, events: _set_aside(config.directory / "corrupt", job_id, events),
        )
        self.delivery = Delivery(
            index=index,
            gate=self.gate,
            clock=clock,
            targets=targets,
            in_flight=self._in_flight,
            concurrency=config.concurrency,
            settings=config.fingerprint,
            letters=Letters(config.redelivery_wait_s, config.max_age_s, hook),
            wake=self.woken.set,
        )
        self._desk = Desk(index, now=clock.now, redelivery_wait_s=config.redelivery_wait_s)
        self._mailbox = Mailbox(config.directory)
        self._postboxes = tuple(postboxes)
        self._flushes: list[tuple[Postbox, Request]] = []
        self._term = Term().number
        self._shared_gate = index.gate
        self._has_read_all = False
        self._has_more = True  # to be read at once
        self._deaths_at = now
        self._acknowledge_at = now
        self.is_leading = False
        self.is_relieved = False  # another relay asked this one to leave
        self.is_eager = False  # somebody waits for the end

    def turn(self) -> float:
        """Do everything that can be done without waiting; returns for how long nothing else will be to do."""
        now = self._clock.now()
        self.is_leading = self._lead(now)
        if not self.is_leading:
            self._stand_by(now)
            return POLL_S
        began = time.perf_counter()
        self._read(now)
        has_looked = self._look(now) if self._has_read_all else False
        took_s = time.perf_counter() - began
        is_eager = self.is_eager or bool(self._flushes)
        self._store(at_once=is_eager)
        self._acknowledge(now)
        self._prune(now)
        self._with_reserve(self.delivery.refill)
        self._answer_flushes()  # those that were asked before the journal was read
        for postbox in (self._mailbox, *self._postboxes):
            for request in postbox.take():
                self._answer(postbox, request)
        if now < self._full_until or not (self._has_more or (self._has_read_all and not has_looked)):
            return _EAGER_POLL_S if is_eager or self._flushes else POLL_S
        return took_s if self.delivery.is_sending else 0.0  # the senders get as much of the time as the journal

    def store(self) -> None:
        """Store what is not stored yet, and tell those who wait for it: at the end."""
        self._store(at_once=True)
        self._acknowledge_at = float("-inf")
        self._acknowledge(self._clock.now())
        self._answer_flushes()

    def close(self) -> None:
        self._in_flight.close()

    # What there is to do

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is to be done now."""
        return not (self._has_more and self.is_leading) and self.delivery.is_idle

    @property
    def is_drained(self) -> bool:
        """Whether nothing that is written is left to be delivered; a relay that stands by does not know."""
        has_waiting = self._index.count(Phase.DUE) or self._index.count(Phase.HELD)
        return self.is_leading and self.is_quiet and self._has_read_all and not has_waiting

    def next_look(self) -> float:
        """When the next open job may be over."""
        return self._index.next_look()

    @property
    def is_watching(self) -> bool:
        """Whether an open job waits for the end of a process."""
        return bool(self._index.watched())

    # Which relay it is that delivers

    def _lead(self, now: float) -> bool:
        """Whether this relay is the one, for now."""
        if not self.is_leading and now < self._full_until:
            return False  # it could not begin
        term = self._reader.lead()
        if term is None:
            if self.is_leading:
                logger.warning("another relay leads, or Redis is away", extra={"event": "relay_stands_by"})
                self.gate.close_at(now)
                self.delivery.put_down()
            return False
        try:
            if term.number != self._term:
                self._begin(term, now)
        except IndexFullError as error:
            self._is_full(error)
            self._reader.close()  # another one may have the room
            return False
        self.gate.close_at(term.until)
        return True

    def _begin(self, term: Term, now: float) -> None:
        """Go on where the relay before this one was; what is not delivered, the journal gives once more."""
        self.delivery.put_down()  # it may have slept longer than its lease, and not have seen that it ended
        if not term.is_continued:
            self._index.hand_over(now)
            self.gate.assume_spent(now)
        self._restore_gate(self._reader.shared(_GATE), now)
        self._reader.resume(self._index.positions)
        self._has_read_all, self._has_more = False, True
        self._term = term.number
        logger.info("this relay leads", extra={"event": "relay_leads"})

    def _stand_by(self, now: float) -> None:
        """Send nothing and promise nothing; but what came of what was sent counts."""
        self._store(at_once=True)
        self._acknowledge(now)
        for request in self._mailbox.take():
            self._leave(request) if request.verb == "leave" else self._mailbox.answer(request, _STANDS_BY)
        for postbox, request in self._flushes:
            postbox.answer(request, _STANDS_BY)
        self._flushes.clear()

    def _restore_gate(self, stored: Mapping[str, Any] | None, now: float) -> None:
        if stored is None:
            return
        try:  # what paused delivery may be mended by other settings
            if stored["flow"] != Flow.PAUSED or stored["settings"] == self._config.fingerprint:
                self.gate.restore(stored, now=now)
        except (KeyError, TypeError, ValueError) as error:  # another release may have states of its own
            logger.warning("how the destination stood cannot be read: %r", error, extra={"event": "gate_not_read"})

    # The parts of a turn

    def _read(self, now: float) -> None:
        """Take a batch from the journal."""
        self._has_read_all, self._has_more = False, True
        if now < self._full_until:
            return
        try:
            if not self._reserve.restore() and self._index.free_bytes() < _LEAST_ROOM_BYTES > self._reserve.room():
                raise IndexFullError(f"{self._config.directory}: the disk is full")
            if self._index.is_nearly_full():
                raise IndexFullError(f"{self._index.path}: the rest of its room is for what becomes of reports")
            is_tight = now - self._full_until < _FULL_WAIT_S
            limit = _BATCH_WHEN_TIGHT if is_tight else _BATCH_WHILE_SENDING if self.delivery.is_sending else MAX_BATCH
            taken = self._ingest.take(now, limit)
        except IndexFullError as error:
            self._is_full(error)
            return
        self.delivery.drop(taken.rows)
        self._has_read_all, self._has_more = taken.is_all, taken.has_more

    def _look(self, now: float) -> bool:
        """Find jobs that are over because time went by or a process died; whether there are no more of them now."""
        try:
            if now >= self._deaths_at:
                self._deaths_at = now + _DEATHS_EVERY_S
                if self._ingest.see_deaths(now):
                    self._has_read_all, self._has_more = False, True  # they may have written since
                    return False
            return self._ingest.look(now).is_all
        except IndexFullError as error:
            self._is_full(error)
            return False

    def _store(self, *, at_once: bool = False) -> None:
        """Store what came of reports. On a full disk that takes the reserve; where that is not enough, less is stored,
        and results wait in memory.
        """
        for is_tight in (False, False, True):
            try:
                reopened = self.delivery.commit(at_once=at_once, is_tight=is_tight)
                known = self._index.load(job.row for job in reopened)  # more may have been heard of them
                self._ingest.judge([job for job in known if job.phase.is_waiting], self._clock.now())
                break
            except IndexFullError as error:
                self._reserve.release()
                self._is_full(error)
        gate = self._index.gate
        if gate is not None and gate is not self._shared_gate:
            self._reader.share(_GATE, gate, lasts_s=_GATE_LASTS_S)
            self._shared_gate = gate

    def _acknowledge(self, now: float) -> None:
        """Let the journal forget what is delivered."""
        if now < self._acknowledge_at:
            return
        receipts = self._index.released(_ACKNOWLEDGED_AT_ONCE)
        is_all = len(receipts) < _ACKNOWLEDGED_AT_ONCE
        self._acknowledge_at = now + _ACKNOWLEDGE_EVERY_S if is_all else now
        if receipts and self._reader.acknowledge(receipts):
            with contextlib.suppress(IndexFullError):  # then once more
                self._index.forget_receipts(receipts)

    def _is_full(self, error: IndexFullError) -> None:
        self._full_until = self._clock.now() + _FULL_WAIT_S
        self._make_room(error)

    def _make_room(self, error: IndexFullError) -> None:
        self._full.warn("The index can take no more, so events wait in the journal: %s", error)
        with contextlib.suppress(IndexFullError):
            self._index.prune(before=float("inf"), max_rows=0, max_bytes=0, limit=_PRUNED_AT_ONCE)

    def _with_reserve(self, change: Callable[[], object]) -> None:
        """Make a small change, with what the reserve took up if need be. Without room even so, it is left undone."""
        for _ in range(2):
            try:
                change()
                break
            except IndexFullError as error:
                self._reserve.release()
                self._make_room(error)

    def _prune(self, now: float) -> None:
        """Forget settled jobs for which neither a correction nor a redelivery is to be expected any more."""
        before = now - self._config.redelivery_wait_s - _DEATHS_EVERY_S
        with contextlib.suppress(IndexFullError):
            self._index.prune(before=before, max_rows=_SETTLED_ROWS, max_bytes=_SETTLED_BYTES, limit=_PRUNED_AT_ONCE)

    # What others ask

    def _answer(self, postbox: Postbox, request: Request) -> None:
        if request.verb == "flush":
            self._flushes.append((postbox, request))
        elif request.verb == "leave" and postbox is self._mailbox:
            self._leave(request)
        else:
            postbox.answer(request, self._desk.answer(request.verb, request.arguments))

    def _leave(self, request: Request) -> None:
        self.is_relieved |= request.arguments.get("fingerprint") == self._config.fingerprint
        self._mailbox.answer(request, {})

    def _answer_flushes(self) -> None:
        """Whoever asked to flush hears of it when all is delivered, or when that cannot be for now."""
        wall = self._clock.wall()
        for postbox, request in list(self._flushes):
            cannot = self.is_quiet and self.gate.flow is not Flow.FLOWING
            if self.is_drained or cannot or request.expires_at < wall:
                postbox.answer(request, {"drained": self.is_drained})
                self._flushes.remove((postbox, request))


def _set_aside(folder: Path, job_id: str, events: Iterable[Event]) -> None:
    """Keep events that could not be folded, for inspection."""
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        if sum(1 for _ in folder.iterdir()) < _SET_ASIDE_FILES:
            name = blake2b(job_id.encode(errors="replace"), digest_size=8).hexdigest()
            with (folder / f"job-{name}").open("ab") as file:
                file.writelines(encode(event.model_dump()) + b"\n" for event in events)
