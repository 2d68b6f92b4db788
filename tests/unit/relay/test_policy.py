from __future__ import annotations

import bisect
import heapq
import random
from collections.abc import Iterator
from itertools import pairwise

import pytest

from xpander_celery.relay.policy import (
    FATES,
    MAX_ATTEMPTS,
    NEXT,
    Fate,
    Flow,
    Gate,
    Permit,
    RateLimit,
    Ruling,
    Try,
    backoff_s,
)
from xpander_celery.relay.replies import DELIVERED, Answer, Reply

START = 1_000_000.0
FAILED = Reply(Answer.FAILED, "HTTP 503")
BARRED = Reply(Answer.BARRED, "HTTP 401")
UNKNOWN = Reply(Answer.AGENT_UNKNOWN, "HTTP 404")
REFUSED = Reply(Answer.REFUSED, "HTTP 422")
TOO_LARGE = Reply(Answer.TOO_LARGE, "HTTP 413")


def throttled(seconds: float | None) -> Reply:
    return Reply(Answer.THROTTLED, "HTTP 429", seconds)


class Traffic:
    """A gate with a clock of its own, and chance that is always `chance`."""

    def __init__(self, per_minute: int | None = None, chance: float = 0.5) -> None:
        self.gate = Gate(per_minute=per_minute, chance=lambda: chance)
        self.now = START
        self._rows = iter(range(1, 10**9))

    def permit(self, row: int | None = None, agent_id: str = "agent") -> Permit | None:
        return self.gate.permit(next(self._rows) if row is None else row, agent_id, self.now)

    def send(self, reply: Reply, row: int | None = None, agent_id: str = "agent", before: Try | None = None) -> Ruling:
        permit = self.permit(row, agent_id)
        assert permit is not None, f"no permit while {self.gate.flow}"
        return self.gate.rule(permit, reply, before or Try(), self.now)

    def wait(self) -> float:
        """Let the clock go to where the gate opens; returns how long that took."""
        waited = max(0.0, self.gate.opens_at() - self.now)
        self.now += waited
        return waited

    def break_down(self) -> None:
        for _ in range(5):
            self.send(FAILED)
        assert self.gate.flow is Flow.BROKEN


def reached(flow: Flow) -> Traffic:
    traffic = Traffic()
    match flow:
        case Flow.THROTTLED:
            traffic.send(throttled(120))
        case Flow.BROKEN:
            traffic.break_down()
        case Flow.PAUSED:
            traffic.send(BARRED)
    assert traffic.gate.flow is flow
    return traffic


@pytest.mark.parametrize("flow", Flow)
@pytest.mark.parametrize("answer", Answer)
def test_the_table_is_complete_and_a_deciding_answer_follows_it(flow: Flow, answer: Answer) -> None:
    traffic = reached(flow)
    traffic.wait()
    ruling = traffic.send(Reply(answer, "why"))
    assert traffic.gate.flow is NEXT[flow][answer]
    assert ruling.fate is FATES[answer]


@pytest.mark.parametrize("flow", [Flow.THROTTLED, Flow.BROKEN, Flow.PAUSED])
def test_only_one_probe_goes_out_and_not_before_the_rest_is_over(flow: Flow) -> None:
    traffic = reached(flow)
    assert traffic.permit() is None
    assert traffic.wait() > 0
    assert traffic.permit(row=7) is not None
    assert traffic.permit() is None
    assert traffic.gate.opens_at() == float("inf")


@pytest.mark.parametrize("answer", [Answer.DELIVERED, Answer.FAILED, Answer.REFUSED, Answer.AGENT_UNKNOWN])
def test_an_answer_to_what_was_sent_before_the_flow_changed_is_no_news(answer: Answer) -> None:
    traffic = Traffic()
    early = traffic.permit(row=1)
    assert early is not None
    traffic.send(throttled(120))
    opens_at = traffic.gate.opens_at()
    traffic.gate.rule(early, Reply(answer, "why"), Try(), traffic.now)
    assert traffic.gate.flow is Flow.THROTTLED
    assert traffic.gate.opens_at() == opens_at == traffic.now + 120


def test_a_late_429_lengthens_the_wait_and_never_shortens_it() -> None:
    traffic = Traffic()
    permits = [traffic.permit(row=row) for row in range(3)]
    for permit, asked in zip(permits, (120, 300, 5), strict=True):
        assert permit is not None
        traffic.gate.rule(permit, throttled(asked), Try(), traffic.now)
    assert traffic.wait() == 300


# The breaker


def test_five_failures_in_a_row_open_the_breaker() -> None:
    traffic = Traffic()
    for _ in range(4):
        traffic.send(FAILED)
    assert traffic.gate.flow is Flow.FLOWING
    ruling = traffic.send(FAILED)
    assert traffic.gate.flow is Flow.BROKEN
    assert "HTTP 503" in ruling.notice


def test_half_of_the_last_twenty_opens_the_breaker() -> None:
    traffic = Traffic()
    for sent in range(1, 20):
        traffic.send(FAILED if sent % 2 else DELIVERED)
        assert traffic.gate.flow is Flow.FLOWING
    traffic.send(DELIVERED)
    assert traffic.gate.flow is Flow.FLOWING
    traffic.send(FAILED)
    assert traffic.gate.flow is Flow.BROKEN


def test_fewer_than_half_leave_it_closed() -> None:
    traffic = Traffic()
    for sent in range(300):
        traffic.send(FAILED if sent % 3 == 0 else DELIVERED)
    assert traffic.gate.flow is Flow.FLOWING


def test_one_report_that_always_fails_does_not_open_it() -> None:
    traffic = Traffic()
    for _ in range(50):
        traffic.send(FAILED, row=7)
    assert traffic.gate.flow is Flow.FLOWING


def test_the_breaker_rests_from_one_second_to_one_minute() -> None:
    traffic = Traffic(chance=0.0)
    traffic.break_down()
    rests = []
    for _ in range(10):
        rests.append(traffic.wait())
        traffic.send(FAILED)
    assert rests == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]


def test_its_rests_start_anew_after_a_success() -> None:
    traffic = Traffic(chance=0.0)
    traffic.break_down()
    for _ in range(5):
        traffic.wait()
        traffic.send(FAILED)
    traffic.wait()
    ruling = traffic.send(DELIVERED)
    assert "again" in ruling.notice
    assert traffic.gate.flow is Flow.FLOWING
    assert traffic.permit() is not None
    traffic.break_down()
    assert traffic.wait() == 1


def test_in_a_long_outage_there_is_at_most_one_request_a_minute() -> None:
    traffic = Traffic(chance=0.0)
    traffic.break_down()
    times = []
    while traffic.now < START + 6 * 3600:
        traffic.wait()
        times.append(traffic.now)
        traffic.send(FAILED)
    later = [at for at in times if at > START + 120]
    assert min(b - a for a, b in pairwise(later)) >= 60
    assert len(times) <= 360 + 6


# Back-off, attempts, crashes


def test_backoff_is_uniform_up_to_two_to_the_n_and_five_minutes() -> None:
    assert [backoff_s(tries, 1.0) for tries in (1, 2, 3, 8, 9, 10**6)] == [2, 4, 8, 256, 300, 300]
    assert backoff_s(5, 0.0) == 0
    chance = random.Random(1)
    waits = [backoff_s(20, chance.random()) for _ in range(10_000)]
    assert 140 < sum(waits) / len(waits) < 160
    assert max(waits) <= 300


def test_the_wait_is_the_larger_of_backoff_and_retry_after() -> None:
    traffic = Traffic(chance=1.0)
    assert traffic.send(Reply(Answer.FAILED, "x", 100.0), before=Try(tries=2)).wait_s == 100
    assert traffic.send(Reply(Answer.FAILED, "x", 1.0), before=Try(tries=2)).wait_s == 8


def test_while_the_whole_destination_waits_a_report_has_no_wait_of_its_own() -> None:
    for reply in (FAILED, throttled(None), BARRED):
        traffic = reached(Flow.BROKEN)
        traffic.wait()
        assert traffic.send(reply, before=Try(tries=9)).wait_s == 0


def test_a_report_that_has_an_outage_for_itself_probes_at_most_once_a_minute() -> None:
    traffic = Traffic(chance=0.01)
    assert traffic.send(FAILED, row=1, before=Try(tries=20)).wait_s == 60
    traffic.send(DELIVERED, row=2)
    assert traffic.send(FAILED, row=1, before=Try(tries=20)).wait_s == 3


def test_attempts_count_only_while_another_report_got_through() -> None:
    traffic = Traffic()
    assert not traffic.send(FAILED, row=1).counts
    traffic.send(DELIVERED, row=1)
    assert not traffic.send(FAILED, row=1).counts
    traffic.send(DELIVERED, row=2)
    assert traffic.send(FAILED, row=1).counts
    traffic.now += 61
    assert not traffic.send(FAILED, row=1).counts


def test_no_attempt_counts_while_the_breaker_is_open() -> None:
    traffic = Traffic()
    traffic.send(DELIVERED)
    traffic.break_down()
    traffic.wait()
    assert not traffic.send(FAILED).counts


def test_a_429_or_a_refused_key_uses_no_attempt() -> None:
    for reply in (throttled(1), BARRED):
        traffic = Traffic()
        traffic.send(DELIVERED)
        assert not traffic.send(reply).counts


def test_a_report_that_alone_fails_twelve_times_is_dead() -> None:
    traffic = Traffic()
    fates = []
    for attempts in range(MAX_ATTEMPTS):
        traffic.send(DELIVERED)
        ruling = traffic.send(FAILED, row=1_000_000, before=Try(tries=attempts, attempts=attempts))
        fates.append(ruling.fate)
    assert fates == [Fate.RETRY] * 11 + [Fate.DEAD]
    assert "HTTP 503" in ruling.reason
    assert traffic.gate.flow is Flow.FLOWING


def test_a_refused_report_is_dead_at_once_and_a_large_one_after_trimming() -> None:
    traffic = Traffic()
    assert traffic.send(REFUSED).fate is Fate.DEAD
    assert traffic.send(TOO_LARGE).fate is Fate.TRIM
    assert traffic.send(TOO_LARGE, before=Try(trimmed=True)).fate is Fate.DEAD
    assert traffic.gate.flow is Flow.FLOWING


# Pauses


def test_a_refused_key_pauses_everything_says_so_once_and_probes_once_a_minute() -> None:
    traffic = Traffic(chance=0.0)
    notices = [traffic.send(BARRED).notice]
    rests = []
    for _ in range(120):
        rests.append(traffic.wait())
        ruling = traffic.send(BARRED)
        assert ruling.fate is Fate.RETRY
        assert not ruling.counts
        notices.append(ruling.notice)
    assert set(rests) == {60}
    assert [notice for notice in notices if notice] == ["Delivery is paused: HTTP 401"]
    traffic.wait()
    assert "again" in traffic.send(DELIVERED).notice
    assert traffic.gate.flow is Flow.FLOWING


def test_an_unknown_agent_pauses_only_its_own_reports() -> None:
    traffic = Traffic(chance=0.0)
    ruling = traffic.send(UNKNOWN, agent_id="lost")
    assert ruling.fate is Fate.HELD
    assert "lost" in ruling.notice
    assert traffic.permit(agent_id="lost") is None
    assert traffic.permit(agent_id="agent") is not None
    assert traffic.gate.held_agents() == {"lost": "HTTP 404"}
    assert traffic.gate.agents_to_probe(traffic.now) == []
    traffic.now += 60
    assert traffic.gate.agents_to_probe(traffic.now) == ["lost"]


def test_an_agent_is_probed_by_one_report_and_goes_on_once_it_is_known() -> None:
    traffic = Traffic(chance=0.0)
    traffic.send(UNKNOWN, agent_id="lost")
    traffic.now += 60
    assert not traffic.send(UNKNOWN, agent_id="lost").notice
    traffic.now += 60
    permit = traffic.permit(agent_id="lost")
    assert permit is not None
    assert traffic.permit(agent_id="lost") is None
    assert "lost" in traffic.gate.rule(permit, DELIVERED, Try(), traffic.now).notice
    assert traffic.gate.held_agents() == {}
    assert traffic.permit(agent_id="lost") is not None


def test_an_agent_whose_probe_failed_otherwise_stays_paused_for_another_minute() -> None:
    traffic = Traffic(chance=0.0)
    traffic.send(UNKNOWN, agent_id="lost")
    traffic.now += 60
    traffic.send(FAILED, agent_id="lost")
    assert traffic.permit(agent_id="lost") is None
    traffic.now += 60
    assert traffic.permit(agent_id="lost") is not None


# Rate and restart


class Road:
    """Reports that a rate limit lets out, and that arrive at a random moment between permit and answer."""

    def __init__(self, per_minute: int | None, *, slowest_s: float, chance: random.Random, at_once: int = 8) -> None:
        self.rate = RateLimit(per_minute)
        self.now = 50.0
        self.arrivals: list[float] = []
        self._answers: list[float] = []
        self._slowest_s = slowest_s
        self._chance = chance
        self._at_once = at_once

    def drive(self, seconds: float) -> None:
        """Send as much as is allowed."""
        until = self.now + seconds
        while self.now < until:
            while self.now >= self.rate.opens_at() and len(self._answers) < self._at_once:
                self.rate.take()
                takes_s = self._chance.choice([0.0, self._chance.uniform(0, self._slowest_s)])
                self.arrivals.append(self.now + self._chance.uniform(0, takes_s))
                heapq.heappush(self._answers, self.now + takes_s)
            opens_at = self.rate.opens_at() if len(self._answers) < self._at_once else float("inf")
            self.now = min([opens_at, *self._answers[:1], until])
            while self._answers and self._answers[0] <= self.now:
                self.rate.answered(heapq.heappop(self._answers))

    def die(self) -> None:
        """What is on its way arrives or not, by now; the next relay assumes the worst."""
        self.arrivals = [min(at, self.now) for at in self.arrivals]
        self._answers.clear()


def most_in_a_minute(arrivals: list[float]) -> int:
    ordered = sorted(arrivals)
    return max(bisect.bisect_left(ordered, first + 60 - 1e-6) - place for place, first in enumerate(ordered))


@pytest.mark.parametrize("slowest_s", [0.0, 0.05, 2.0, 30.0])
@pytest.mark.parametrize("per_minute", [1, 2, 7, 60, 250, 600])
def test_no_minute_sees_more_arrivals_than_the_rate_limit(per_minute: int, slowest_s: float) -> None:
    road = Road(per_minute, slowest_s=slowest_s, chance=random.Random(per_minute))
    for pause_s in (0, 100, 3, 100):  # what follows a pause begins with a burst
        road.now += pause_s
        road.drive(200)
    assert most_in_a_minute(road.arrivals) <= per_minute


@pytest.mark.parametrize("per_minute", [1, 2, 7, 60, 250])
def test_the_rate_limit_is_used_up(per_minute: int) -> None:
    road = Road(per_minute, slowest_s=0.05, chance=random.Random(1))
    road.drive(600)
    assert len(road.arrivals) >= per_minute * 8.9


@pytest.mark.parametrize("slowest_s", [0.0, 0.05, 2.0, 30.0])
@pytest.mark.parametrize("per_minute", [1, 7, 60, 600])
def test_nor_does_a_minute_in_which_another_relay_takes_over(per_minute: int, slowest_s: float) -> None:
    chance = random.Random(per_minute)
    for lived_s in (0.5, 5, 59, 100):
        road = Road(per_minute, slowest_s=slowest_s, chance=chance)
        for _ in range(4):
            road.drive(lived_s)
            road.die()
            road.rate = RateLimit(per_minute)
            road.rate.assume_spent(road.now)
        road.drive(200)
        assert most_in_a_minute(road.arrivals) <= per_minute


def test_what_a_relay_sent_long_ago_is_spent_no_more() -> None:
    rate = RateLimit(60)
    rate.assume_spent(100.0)
    assert 100.0 < rate.opens_at() < 102.0
    for _ in range(5):  # six at once is the burst, and by now it may be had again
        assert rate.opens_at() < 110.0
        rate.take()


def test_many_small_steps_at_a_time_of_day_do_not_drift() -> None:
    rate, now, taken = RateLimit(50_000), 1_800_000_000.0, 0
    for _ in range(9000):
        while now >= rate.opens_at():
            rate.take()
            rate.answered(now)
            taken += 1
        now += 0.1
    at_once, minutes = 5000, 8999 / 600
    assert taken == pytest.approx(at_once + (50_000 - at_once + 1) * minutes, abs=2)


def test_without_a_rate_limit_there_is_no_wait() -> None:
    rate = RateLimit(None)
    rate.assume_spent(5.0)
    for _ in range(1000):
        assert rate.opens_at() <= 5.0
        rate.take()
    for _ in range(1000):
        rate.answered(5.0)
    assert rate.opens_at() <= 5.0


def test_a_gate_gives_no_permit_once_another_relay_may_give_them() -> None:
    traffic = Traffic()
    traffic.gate.close_at(START + 10)
    assert traffic.permit() is not None
    traffic.now += 10
    assert traffic.permit() is None
    traffic.gate.close_at(START + 20)
    assert traffic.permit() is not None


@pytest.mark.parametrize("flow", [Flow.BROKEN, Flow.PAUSED])
def test_a_restart_keeps_any_wait_that_the_platform_asked_for(flow: Flow) -> None:
    traffic = reached(flow)
    traffic.wait()
    answer = Answer.FAILED if flow is Flow.BROKEN else Answer.THROTTLED
    traffic.send(Reply(answer, "HTTP", retry_after_s=1800.0))
    assert traffic.gate.flow is flow
    after = Gate(per_minute=None, chance=lambda: 0.0)
    after.restore(traffic.gate.snapshot(), now=traffic.now + 1)
    assert after.opens_at() == traffic.now + 1800


@pytest.mark.parametrize(("jump_s", "left_s"), [(0, 120), (100, 20), (3600, 0), (-3600, 3600)])
def test_a_restart_keeps_the_promise_to_wait_whatever_the_clock_did(jump_s: float, left_s: float) -> None:
    traffic = Traffic(chance=0.0)
    traffic.send(throttled(120))
    later = Gate(per_minute=None, chance=lambda: 0.0)
    later.restore(traffic.gate.snapshot(), now=traffic.now + jump_s)
    assert later.flow is Flow.THROTTLED
    assert max(0, later.opens_at() - traffic.now - jump_s) == left_s


def test_a_pause_outlives_a_restart_but_is_probed_within_its_minute() -> None:
    traffic = Traffic(chance=0.0)
    traffic.send(BARRED)
    later = Gate(per_minute=None, chance=lambda: 0.0)
    later.restore(traffic.gate.snapshot(), now=traffic.now - 3600)
    assert (later.flow, later.reason) == (Flow.PAUSED, "HTTP 401")
    assert later.opens_at() <= traffic.now - 3600 + 66


def replies(seed: int) -> Iterator[Reply]:
    chance = random.Random(seed)
    kinds = [DELIVERED, FAILED, throttled(3), throttled(None), BARRED, UNKNOWN, REFUSED, TOO_LARGE]
    while True:
        yield chance.choice(kinds)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_platform_answers_the_gate_opens_again_within_the_longest_wait(seed: int) -> None:
    traffic = Traffic(chance=0.9)
    answers = replies(seed)
    for sent in range(500):
        waited = traffic.wait()
        assert waited <= 300
        agent_id = f"agent-{sent}"  # a paused agent does not close the gate for others
        traffic.send(next(answers), agent_id=agent_id)
