"""What an answer of the platform means, and when the next request may go out.

Pure: no I/O; the time (`now`, in seconds) and chance are given. Attempts, pauses, the breaker and Retry-After are one
table: `NEXT` says where each answer leads the destination, `FATES` what becomes of the report that it answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from xpander_celery.relay.replies import MAX_RETRY_AFTER_S, Answer, Reply

MAX_BACKOFF_S = 300.0
MAX_ATTEMPTS = 12  # failures of one report while others got through
MAX_CRASHES = 3  # deaths of the relay in a row while it was sending one report
_PROBE_INTERVAL_S = 60.0  # of a pause, and the longest rest of the breaker
_PROBE_SPREAD = 0.1  # rests are up to this much longer, so that the relays of many hosts do not probe at once
_IN_A_ROW = 5  # failures that open the breaker
_WINDOW = 20  # answers of which half may not be failures
_SOMEBODY_GOT_THROUGH_S = 60.0


class Fate(StrEnum):
    """What becomes of a report after one try."""

    SETTLED = "settled"
    RETRY = "retry"
    TRIM = "trim"  # once more with its texts cut, then dead
    HELD = "held"  # waits until its agent is known
    DEAD = "dead"


class Flow(StrEnum):
    """The state of the destination. In all but `flowing`, nothing is sent before a time, and then one at a time."""

    FLOWING = "flowing"
    THROTTLED = "throttled"  # asked to wait (429)
    BROKEN = "broken"  # the breaker is open: the platform fails or does not answer
    PAUSED = "paused"  # the key or the address is refused: somebody has to mend it


FATES: Mapping[Answer, Fate] = {
    Answer.DELIVERED: Fate.SETTLED,
    Answer.FAILED: Fate.RETRY,
    Answer.THROTTLED: Fate.RETRY,
    Answer.BARRED: Fate.RETRY,
    Answer.AGENT_UNKNOWN: Fate.HELD,
    Answer.TOO_LARGE: Fate.TRIM,
    Answer.REFUSED: Fate.DEAD,
}

_WORKS = dict.fromkeys((Answer.DELIVERED, Answer.AGENT_UNKNOWN, Answer.TOO_LARGE, Answer.REFUSED), Flow.FLOWING)

NEXT: Mapping[Flow, Mapping[Answer, Flow]] = {
    Flow.FLOWING: _WORKS | {  # a failure leads to `broken` once the breaker trips
        Answer.FAILED: Flow.FLOWING, Answer.THROTTLED: Flow.THROTTLED, Answer.BARRED: Flow.PAUSED,
    },
    Flow.THROTTLED: _WORKS | {
        Answer.FAILED: Flow.BROKEN, Answer.THROTTLED: Flow.THROTTLED, Answer.BARRED: Flow.PAUSED,
    },
    Flow.BROKEN: _WORKS | {
        Answer.FAILED: Flow.BROKEN, Answer.THROTTLED: Flow.THROTTLED, Answer.BARRED: Flow.PAUSED,
    },
    Flow.PAUSED: _WORKS | {
        Answer.FAILED: Flow.PAUSED, Answer.THROTTLED: Flow.PAUSED, Answer.BARRED: Flow.PAUSED,
    },
}  # fmt: skip


def backoff_s(tries: int, chance: float) -> float:
    """The wait after the `tries`-th failure in a row: uniform between 0 and 2ⁿ seconds, at most five minutes."""
    return chance * min(MAX_BACKOFF_S, 2.0 ** min(tries, 16))


@dataclass(frozen=True, slots=True)
class Permit:
    """Leave to send one report. It ends with `Gate.rule`."""

    row: int
    agent_id: str
    is_probe: bool  # of the destination: its answer decides
    is_agent_probe: bool


@dataclass(frozen=True, slots=True)
class Try:
    """What is known of a report before its answer came."""

    tries: int = 0  # failures in a row
    attempts: int = 0  # those of them that count
    trimmed: bool = False


@dataclass(frozen=True, slots=True)
class Ruling:
    """What becomes of a report. `notice` is for the log: what changed for the destination or an agent."""

    fate: Fate
    wait_s: float = 0.0
    counts: bool = False
    reason: str = ""
    notice: str = ""


@dataclass(slots=True)
class _Pause:
    """An agent that the platform does not know."""

    until: float
    reason: str
    probed_by: int | None = None


class RateLimit:
    """At most `per_minute` reports arrive in any minute: a tenth at once, the rest spread evenly.

    A report may arrive at any moment between its permit and its answer. So it counts as one of those on their way until
    it is answered, and then as one that was sent at that moment; a count of permits would let one or two too many in.
    """

    def __init__(self, per_minute: int | None) -> None:
        self._burst = max(1, (per_minute or 0) // 10)
        self._interval_s = 60.0 / (per_minute - self._burst + 1) if per_minute else 0.0
        # When the next report would be due at an even pace, counted from a time at which none was ahead of it: small
        # steps added to seconds since the epoch, of which a float holds less than a millionth, would drift.
        self._from = self._next_s = 0.0
        self._on_their_way = 0

    def opens_at(self) -> float:
        """When the next permit can be had; infinite while an answer has to come before."""
        if not self._interval_s:
            return 0.0
        ahead = self._burst - 1 - self._on_their_way
        return self._from + (self._next_s - ahead * self._interval_s) if ahead >= 0 else float("inf")

    def take(self) -> None:
        """A report is let out."""
        self._on_their_way += 1

    def answered(self, now: float) -> None:
        """It has arrived by now, or never will."""
        self._on_their_way -= 1
        if now - self._from >= self._next_s:
            self._from, self._next_s = now, 0.0
        self._next_s += self._interval_s

    def assume_spent(self, at: float) -> None:
        """Another relay may have sent all that it was allowed to, until then."""
        spent_s = self._burst * self._interval_s
        if at - self._from + spent_s > self._next_s:
            self._from, self._next_s = at, spent_s


class Gate:
    """Says who may send when, and rules on every answer. One for the whole destination; not thread-safe."""

    def __init__(self, *, per_minute: int | None, chance: Callable[[], float]) -> None:
        self.flow = Flow.FLOWING
        self.reason = ""
        self._until = 0.0  # in every other flow: no request before
        self._is_asked = False  # the platform said how long; else the rest is our own choice
        self._rests = 0  # in a row, without an answer between them that ended one
        self._probe: int | None = None
        self._recent: deque[tuple[int, bool]] = deque(maxlen=_WINDOW)  # row, and whether its answer was a failure
        self._through: dict[int, float] = {}  # the last two rows that got through, and when
        self._agents: dict[str, _Pause] = {}
        self._rate = RateLimit(per_minute)
        self._closes_at = float("inf")
        self._chance = chance

    # Asking

    def opens_at(self) -> float:
        """The earliest time at which a permit can be had; infinite while a probe is out."""
        if self.flow is Flow.FLOWING:
            return self._rate.opens_at()
        return float("inf") if self._probe is not None else max(self._until, self._rate.opens_at())

    def permit(self, row: int, agent_id: str, now: float) -> Permit | None:
        """Leave to send the report in `row` now. None: not now, or its agent is paused (see `is_held`)."""
        pause = self._agents.get(agent_id)
        if now < self.opens_at() or now >= self._closes_at or self.is_held(agent_id, now):
            return None
        if pause is not None:
            pause.probed_by = row
        is_probe = self.flow is not Flow.FLOWING
        if is_probe:
            self._probe = row
        self._rate.take()
        return Permit(row, agent_id, is_probe, pause is not None)

    def is_held(self, agent_id: str, now: float) -> bool:
        """Whether reports of this agent have to wait, all but the one that probes it."""
        pause = self._agents.get(agent_id)
        return pause is not None and (pause.probed_by is not None or now < pause.until)

    def held_agents(self) -> dict[str, str]:
        """The paused agents and why."""
        return {agent_id: pause.reason for agent_id, pause in self._agents.items()}

    def agents_to_probe(self, now: float) -> list[str]:
        """The paused agents for whom one report should be tried now."""
        return [agent_id for agent_id in self._agents if not self.is_held(agent_id, now)]

    def hold(self, agent_id: str, reason: str) -> None:
        """Pause an agent that was found paused in the index of an earlier relay; its first probe is due at once."""
        self._agents.setdefault(agent_id, _Pause(until=0.0, reason=reason))

    def close_at(self, at: float) -> None:
        """Give permits only before that time: then another relay may give them."""
        self._closes_at = at

    def assume_spent(self, at: float) -> None:
        """Until then another relay may have sent all that the rate limit allows."""
        self._rate.assume_spent(at)

    # Answering

    def rule(self, permit: Permit, reply: Reply, before: Try, now: float) -> Ruling:
        """What becomes of the report that `permit` let out; the gate moves on."""
        was_flowing = self.flow is Flow.FLOWING
        self._rate.answered(now)
        self._end_probes(permit)
        notice = self._move(permit, reply, now) or self._move_agent(permit, reply, now)
        fate = FATES[reply.answer]
        if fate is Fate.RETRY:
            counts = was_flowing and self.flow is Flow.FLOWING and self._another_got_through(permit.row, now)
            if counts and before.attempts + 1 >= MAX_ATTEMPTS:
                return Ruling(Fate.DEAD, reason=f"failed {MAX_ATTEMPTS} times, last: {reply.reason}", notice=notice)
            # while the whole destination waits, the report has no wait of its own
            backoff_s = self._backoff_s(before.tries + 1, now) if self.flow is Flow.FLOWING else 0.0
            wait_s = max(backoff_s, reply.retry_after_s or 0.0)
            return Ruling(fate, wait_s=wait_s, counts=counts, reason=reply.reason, notice=notice)
        if fate is Fate.TRIM and before.trimmed:
            fate = Fate.DEAD
        return Ruling(fate, reason=reply.reason, notice=notice)

    def _backoff_s(self, tries: int, now: float) -> float:
        """A report that has the whole outage for itself, so that no breaker opens, probes no faster than a breaker."""
        wait_s = backoff_s(tries, self._chance())
        is_outage = all(now - at > _SOMEBODY_GOT_THROUGH_S for at in self._through.values())
        return max(wait_s, _PROBE_INTERVAL_S) if is_outage and 2.0**tries > _PROBE_INTERVAL_S else wait_s

    def _end_probes(self, permit: Permit) -> None:
        if permit.is_probe and self._probe == permit.row:
            self._probe = None
        pause = self._agents.get(permit.agent_id)
        if permit.is_agent_probe and pause is not None and pause.probed_by == permit.row:
            pause.probed_by = None

    def _move(self, permit: Permit, reply: Reply, now: float) -> str:
        """Go where the table leads; returns what to log, if anything."""
        before = self.flow
        if reply.answer is Answer.DELIVERED:
            self._through.pop(permit.row, None)
            self._through[permit.row] = now
            if len(self._through) > 2:
                del self._through[next(iter(self._through))]
        self._recent.append((permit.row, reply.answer is Answer.FAILED))
        decides = before is Flow.FLOWING or permit.is_probe
        if not decides and reply.answer not in (Answer.THROTTLED, Answer.BARRED):
            return ""  # sent before the flow changed: its answer is no news
        after = NEXT[before][reply.answer]
        if before is Flow.FLOWING and reply.answer is Answer.FAILED and self._trips():
            after = Flow.BROKEN
        self.flow = after
        if after is Flow.FLOWING:
            if before is not Flow.FLOWING:
                self._rests, self.reason = 0, ""
                self._recent.clear()
                return f"The platform takes reports again (was {before})."
            return ""
        if decides:
            self._rests = 1 if before is Flow.FLOWING else self._rests + 1
        asked_s = reply.retry_after_s or 0.0
        until = now + self._rest_s(after, asked_s)
        if decides or until >= self._until:
            self._until, self._is_asked = until, asked_s > 0
        changed = (after, reply.reason) != (before, self.reason)
        self.reason = reply.reason
        return f"Delivery is {after}: {reply.reason}" if changed and after is not before else ""

    def _move_agent(self, permit: Permit, reply: Reply, now: float) -> str:
        if reply.answer is Answer.AGENT_UNKNOWN:
            known = self._agents.get(permit.agent_id)
            self._agents[permit.agent_id] = _Pause(now + self._rest_s(Flow.PAUSED, 0.0), reply.reason)
            return "" if known else f"Delivery for agent {permit.agent_id} is paused: {reply.reason}"
        if not permit.is_agent_probe or permit.agent_id not in self._agents:
            return ""
        if reply.answer in _WORKS:
            del self._agents[permit.agent_id]
            return f"Delivery for agent {permit.agent_id} goes on."
        self._agents[permit.agent_id].until = now + self._rest_s(Flow.PAUSED, 0.0)
        return ""

    def _rest_s(self, flow: Flow, retry_after_s: float) -> float:
        if flow is Flow.THROTTLED:
            return max(backoff_s(self._rests, self._chance()), retry_after_s)
        rest_s = min(_PROBE_INTERVAL_S, 2.0 ** min(self._rests - 1, 16)) if flow is Flow.BROKEN else _PROBE_INTERVAL_S
        return max(rest_s * (1 + _PROBE_SPREAD * self._chance()), retry_after_s)

    def _trips(self) -> bool:
        """Five failures in a row, or half of the last twenty. One report alone is no evidence against the platform."""
        newest = list(self._recent)[-_IN_A_ROW:]
        failed_rows = {row for row, failed in self._recent if failed}
        if len(failed_rows) < 2:
            return False
        if len(newest) == _IN_A_ROW and all(failed for _, failed in newest):
            return len({row for row, _ in newest}) > 1
        return len(self._recent) == _WINDOW and sum(failed for _, failed in self._recent) * 2 >= _WINDOW

    def _another_got_through(self, row: int, now: float) -> bool:
        return any(other != row and now - at <= _SOMEBODY_GOT_THROUGH_S for other, at in self._through.items())

    # Surviving a restart

    def snapshot(self) -> dict[str, Any]:
        """What the next relay must know, so that a restart does not break a promise to wait."""
        return {
            "flow": self.flow.value,
            "until": self._until,
            "asked": self._is_asked,
            "rests": self._rests,
            "reason": self.reason,
        }

    def restore(self, snapshot: Mapping[str, Any], *, now: float) -> None:
        """Go on from what an earlier relay stored. The clock may have jumped: no wait is longer than usual.

        Raises KeyError, TypeError or ValueError for what is no such thing, and then changes nothing.
        """
        flow, reason, rests = Flow(snapshot["flow"]), str(snapshot["reason"]), int(snapshot["rests"])
        until, is_asked = float(snapshot["until"]), bool(snapshot.get("asked"))
        may_be_long = is_asked or flow is Flow.THROTTLED
        longest_s = MAX_RETRY_AFTER_S if may_be_long else _PROBE_INTERVAL_S * (1 + _PROBE_SPREAD)
        self.flow, self.reason, self._rests, self._is_asked = flow, reason, rests, is_asked
        self._until = min(until, now + longest_s)
