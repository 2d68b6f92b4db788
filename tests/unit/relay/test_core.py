from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.relay import RelayHouse
from xpander_celery.errors import JournalError, NetworkError, NotFoundError, RequestRefusedError, ServerError
from xpander_celery.journal import Batch
from xpander_celery.relay.desk import Desk
from xpander_celery.relay.index import Index
from xpander_celery.relay.mailbox import tell
from xpander_celery.relay.policy import Flow
from xpander_celery.relay.rows import Phase
from xpander_celery.relay.schema import IndexFullError
from xpander_celery.relay.status import HEARTBEAT_S, Status
from xpander_celery.relay.upkeep import Upkeep
from xpander_celery.report import TaskReport


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[RelayHouse]:
    async with RelayHouse(tmp_path) as house:
        yield house


def failing(error: Exception, *, only: str | None = None) -> Callable[[TaskReport], None]:
    def answer(report: TaskReport) -> None:
        if only is None or report.id == only:
            raise error

    return answer


async def test_a_job_becomes_one_report_and_is_settled(house: RelayHouse) -> None:
    job_id = house.job(result="paid")
    await house.settle()
    assert house.platform.posts_by_id() == {job_id: 1}
    report = house.platform.records[job_id]
    assert (report.agent_id, report.input, report.result, report.is_success) == ("agent", "42", "paid", True)
    assert house.phase(job_id) is Phase.SETTLED
    assert house.index.counters["appended"] == 2
    assert house.index.counters["delivered"] == 1


async def test_a_running_job_is_not_reported(house: RelayHouse) -> None:
    house.started("a")
    await house.settle()
    assert house.platform.posts == []
    house.finished("a")
    await house.settle()
    assert house.platform.posts_by_id() == {"a": 1}


async def test_many_jobs_are_sent_side_by_side_but_never_more_than_concurrency(house: RelayHouse) -> None:
    for _ in range(1000):
        house.job()
    await house.settle()
    assert len(house.platform.records) == 1000
    assert set(house.platform.posts_by_id().values()) == {1}
    assert house.platform.most_in_flight == house.config.concurrency


async def test_events_that_say_nothing_new_send_nothing(house: RelayHouse) -> None:
    house.job("a")
    await house.settle()
    house.job("a")
    await house.settle()
    assert house.platform.posts_by_id() == {"a": 1}
    assert house.phase("a") is Phase.SETTLED
    assert house.index.counters["unchanged"] == 1


async def test_a_later_different_outcome_is_sent_again_under_the_same_id(house: RelayHouse) -> None:
    house.job("a")
    await house.settle()
    house.append("a", "1", house.journal, kind="progress", duration_s=1.0, tokens={"prompt_tokens": 7})
    house.clock.advance(1)
    house.append("a", "1", house.journal, kind="progress", duration_s=1.0, tokens={"prompt_tokens": 9})
    await house.settle()
    assert house.platform.posts_by_id() == {"a": 2}
    tokens = house.platform.records["a"].tokens
    assert tokens is not None
    assert tokens.prompt_tokens == 9


async def test_a_correction_while_the_report_is_on_its_way_is_sent_after_it(house: RelayHouse) -> None:
    answered = asyncio.Event()
    house.platform.answer = lambda report: answered.wait()
    house.job("a")
    await house.turn()
    assert house.platform.posts_by_id() == {"a": 1}
    house.append("a", "1", house.journal, kind="progress", duration_s=9.0, tokens={"prompt_tokens": 9})
    for _ in range(5):
        await house.turn()
    assert house.platform.posts_by_id() == {"a": 1}
    answered.set()
    await house.settle()
    assert house.platform.posts_by_id() == {"a": 2}
    assert house.platform.records["a"].tokens is not None
    assert house.phase("a") is Phase.SETTLED


def spent(house: RelayHouse, tokens: int) -> None:
    """A correction of the job `a`."""
    house.clock.advance(1)
    house.append("a", "1", house.journal, kind="progress", duration_s=1.0, tokens={"prompt_tokens": tokens})


def last_sent(house: RelayHouse) -> int | None:
    tokens = house.platform.posts[-1][1].tokens
    return tokens.prompt_tokens if tokens is not None else None


@pytest.mark.parametrize("answered", ["in time", "late", "never"])
async def test_a_job_that_comes_to_its_former_report_again_is_sent_again(house: RelayHouse, answered: str) -> None:
    """The correction in between is on its way, or may have arrived though nobody said so."""
    house.job("a")
    spent(house, 8)
    await house.settle()
    answer = asyncio.Event()

    async def slow(report: TaskReport) -> None:
        await answer.wait()
        if answered == "never":
            house.platform.answer = lambda report: None
            raise NetworkError("the reply was lost")

    house.platform.answer = slow
    if answered == "in time":
        answer.set()
    spent(house, 1)
    await house.turn()
    assert last_sent(house) == 1
    if answered == "never":
        answer.set()
        await house.turn()
    spent(house, 8)
    await house.turn()
    answer.set()
    await house.go_on(120)
    assert last_sent(house) == 8
    assert house.phase("a") is Phase.SETTLED


async def test_it_is_sent_again_also_by_the_next_relay(house: RelayHouse) -> None:
    house.job("a")
    spent(house, 8)
    await house.settle()
    spent(house, 1)
    await house.turn()
    assert last_sent(house) == 1
    await house.die()  # before it is stored that this was delivered
    spent(house, 8)
    house.start()
    await house.go_on(120)
    assert last_sent(house) == 8


@pytest.mark.parametrize("error", [IndexFullError("the disk is full"), JournalError("the disk is broken")])
async def test_no_correction_is_sent_while_it_cannot_be_noted(
    house: RelayHouse, monkeypatch: pytest.MonkeyPatch, error: JournalError
) -> None:
    house.job("a")
    await house.settle()

    def fail(row: int) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(house.index, "doubt", fail)
        spent(house, 1)
        for _ in range(10):
            await house.turn()
            house.clock.advance(1)
        assert house.platform.posts_by_id() == {"a": 1}
    await house.settle()
    assert last_sent(house) == 1


async def test_of_what_waits_only_the_latest_revision_is_sent(house: RelayHouse) -> None:
    house.platform.answer = failing(NetworkError("down"))
    house.job("a")
    await house.settle()
    for count in (5, 6, 7):
        house.append("a", "1", house.journal, kind="progress", duration_s=float(count), tokens={"prompt_tokens": count})
        await house.settle()
    house.platform.answer = lambda report: None
    await house.go_on(300)
    assert [r.tokens.prompt_tokens for _, r in house.platform.posts if r.tokens] == [7]
    assert house.phase("a") is Phase.SETTLED


async def test_reports_in_the_queue_are_replaced_by_newer_ones(house: RelayHouse) -> None:
    """They were already fetched to be sent when a newer event came in."""
    gate = asyncio.Event()
    house.platform.answer = lambda report: gate.wait()
    ids = [house.job() for _ in range(50)]
    await house.turn()
    assert len(house.platform.posts) == 8
    last = ids[-1]
    house.append(last, "1", house.journal, kind="progress", duration_s=9.0, tokens={"prompt_tokens": 9})
    await house.turn()
    gate.set()
    await house.settle()
    assert house.platform.posts_by_id()[last] == 1
    assert house.platform.records[last].tokens is not None


async def test_a_failure_is_tried_again_and_the_wait_survives_a_restart(house: RelayHouse) -> None:
    house.platform.answer = failing(ServerError("x", status_code=503, retry_after="100"))
    house.job("a")
    await house.settle()
    await house.restart()
    house.platform.answer = lambda report: None
    await house.go_on(99)
    assert house.platform.posts_by_id() == {"a": 1}
    await house.go_on(2)
    assert house.platform.posts_by_id() == {"a": 2}
    assert house.index.counters["retried"] == 1


async def test_a_refused_report_is_dead_with_its_reason_and_its_neighbours_pass(house: RelayHouse) -> None:
    house.platform.answer = failing(RequestRefusedError("no", status_code=422), only="bad")
    house.job("bad")
    others = [house.job() for _ in range(20)]
    await house.go_on(600, step_s=30)
    assert house.platform.posts_by_id() == {"bad": 1} | dict.fromkeys(others, 1)
    assert house.phase("bad") is Phase.DEAD
    assert "422" in str(house.row("bad").reason)
    assert house.relay.gate.flow is Flow.FLOWING


async def test_a_dead_job_lives_again_when_something_new_is_known_of_it(house: RelayHouse) -> None:
    house.platform.answer = failing(RequestRefusedError("no", status_code=422))
    house.job("a")
    await house.settle()
    house.platform.answer = lambda report: None
    house.append("a", "1", house.journal, kind="progress", duration_s=9.0, tokens={"prompt_tokens": 9})
    await house.settle()
    assert house.phase("a") is Phase.SETTLED


async def test_a_report_that_is_too_large_is_sent_once_more_without_its_texts(house: RelayHouse) -> None:
    house.platform.answer = lambda report: (
        failing(RequestRefusedError("large", status_code=413))(report) if len(report.result or "") > 4000 else None
    )
    house.job("a", result="x" * 50_000, llm_response={"raw": "y" * 50_000})
    await house.settle()
    assert house.platform.posts_by_id() == {"a": 2}
    record = house.platform.records["a"]
    assert "50000 bytes" in str(record.result)
    assert record.llm_response["celery"]["task"] == "shop.charge"
    assert record.llm_response["response"] is None
    assert house.phase("a") is Phase.SETTLED


async def test_a_report_that_stays_too_large_is_dead_after_two_tries(house: RelayHouse) -> None:
    house.platform.answer = failing(RequestRefusedError("large", status_code=413))
    house.job("a")
    await house.go_on(600, step_s=30)
    assert house.platform.posts_by_id() == {"a": 2}
    assert house.phase("a") is Phase.DEAD


async def test_an_unknown_agent_holds_its_own_reports_until_it_is_known(house: RelayHouse) -> None:
    def answer(report: TaskReport) -> None:
        if report.agent_id == "lost":
            raise NotFoundError("no such agent", status_code=404)

    house.platform.answer = answer
    held = [house.job(agent_id="lost") for _ in range(1200)]
    others = [house.job() for _ in range(20)]
    await house.go_on(600, step_s=10)
    assert set(others) <= set(house.platform.records)
    probes = [at for at, report in house.platform.posts if report.agent_id == "lost"]
    assert len(probes) <= 8 + 10  # those on their way when it turned out, then one a minute
    assert house.index.count(Phase.HELD) == 1200
    await house.restart()
    house.platform.answer = lambda report: None
    await house.go_on(70, step_s=1)
    assert set(held) <= set(house.platform.records)
    assert house.index.count(Phase.HELD) == 0


async def test_what_met_the_pause_of_an_agent_while_its_probe_was_out_is_sent_too(house: RelayHouse) -> None:
    house.platform.answer = failing(NotFoundError("no such agent", status_code=404))
    house.job("first")
    await house.settle()
    assert house.phase("first") is Phase.HELD
    house.clock.advance(70)
    is_known = asyncio.Event()
    house.platform.answer = lambda report: is_known.wait()
    await house.turn()
    assert house.relay.delivery.is_sending
    house.job("second")
    await house.turn()
    is_known.set()
    house.clock.advance(0.05)  # what came of the second one is not stored yet
    await house.go_on(5)
    assert set(house.platform.records) == {"first", "second"}
    assert house.phase("second") is Phase.SETTLED


async def test_jobs_of_a_dead_worker_are_closed_as_lost(house: RelayHouse) -> None:
    worker = house.journal.another_process()
    worker.open()
    house.started("a", journal=worker)
    await house.settle()
    worker.kill()
    await house.go_on(9)
    assert house.platform.posts == []
    await house.go_on(5)
    report = house.platform.records["a"]
    assert not report.is_success
    assert "WorkerLostError" in str(report.result)


async def test_it_says_whether_an_open_job_waits_for_the_end_of_a_process(house: RelayHouse) -> None:
    worker = house.journal.another_process()
    worker.open()
    house.started("a", journal=worker)
    await house.settle()
    assert house.relay.is_watching
    worker.kill()
    await house.go_on(2)
    assert not house.relay.is_watching  # the death is noted, and when the job falls due
    assert house.relay.next_look() < float("inf")


async def test_what_a_dead_worker_had_written_counts_however_long_it_takes_to_read(house: RelayHouse) -> None:
    worker = house.journal.another_process()
    worker.open()
    house.started("a", journal=worker)
    worker.kill()
    for _ in range(2000):
        house.job()
    house.finished("a", journal=worker)
    while not house.row_exists("a") or house.phase("a") is Phase.OPEN:
        await house.turn()
        house.clock.advance(11)
    await house.settle()
    assert house.platform.posts_by_id()["a"] == 1
    assert house.platform.records["a"].is_success


async def test_the_last_words_of_a_process_count_that_died_while_the_journal_was_read(
    house: RelayHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = house.journal.another_process()
    child.open()
    facts = {"task": "shop.charge", "agent_id": "agent"}
    processes = {"child": child.process_id, "owner": house.journal.process_id}
    house.append("a", "1", house.journal, kind="started", facts=facts, **processes)
    await house.settle()
    poll = house.relay._reader.poll

    def poll_before_the_end(limit: int) -> Batch:
        batch = poll(limit)
        if batch.events and house.relay._reader.is_alive(child.process_id):
            house.finished("a", journal=child, outcome="interrupted", duration_s=9.0)
            child.kill()
        return batch

    monkeypatch.setattr(house.relay._reader, "poll", poll_before_the_end)
    house.clock.advance(1)
    house.append(
        "a", "1", house.journal, kind="ended", owner=house.journal.process_id, outcome="timed_out", facts=facts
    )
    await house.settle()
    assert [report.duration for _, report in house.platform.posts] == [9.0]


async def test_a_retry_is_sent_once_however_long_after_it_the_attempt_before_it_is_read(house: RelayHouse) -> None:
    house.started("a")
    house.started("a", attempt_id="2", retries=1)
    house.finished("a", attempt_id="2")
    for _ in range(2000):
        house.job()
    house.finished("a", outcome="retried")
    while not house.row_exists("a") or house.phase("a") is Phase.OPEN:
        await house.turn()
        house.clock.advance(11)
    await house.settle()
    assert house.platform.posts_by_id()["a"] == 1
    assert house.platform.records["a"].duration == 1.0


async def test_a_retry_is_sent_though_the_attempt_before_it_never_ends(house: RelayHouse) -> None:
    house.started("a")
    house.started("a", attempt_id="2", retries=1)
    house.finished("a", attempt_id="2")
    await house.go_on(1)
    assert house.platform.posts == []
    await house.go_on(2)
    assert house.platform.posts_by_id() == {"a": 1}


async def test_the_wait_after_a_workers_death_goes_on_over_a_restart(house: RelayHouse) -> None:
    worker = house.journal.another_process()
    worker.open()
    house.started("a", journal=worker, acks_late=True, visibility_timeout_s=100)
    await house.settle()
    worker.kill()
    for _ in range(5):
        await house.go_on(30)
        await house.restart()
    assert house.platform.posts == []
    await house.go_on(55)
    assert house.platform.posts_by_id() == {"a": 1}


async def test_a_record_that_already_ended_wins_over_an_inferred_end(house: RelayHouse) -> None:
    worker = house.journal.another_process()
    worker.open()
    house.started("a", journal=worker)
    await house.settle()
    worker.kill()
    house.platform.ended = lambda report: True
    await house.go_on(15)
    assert house.platform.posts == []
    assert house.phase("a") is Phase.SETTLED
    assert house.index.counters["left_as_recorded"] == 1


async def test_an_inferred_end_of_our_own_does_not_win_over_what_is_known_later(house: RelayHouse) -> None:
    house.platform.ended = lambda report: report.id in house.platform.records
    for attempt, spent in (("1", 100), ("2", 900)):
        worker = house.journal.another_process()
        worker.open()
        house.started("a", attempt_id=attempt, journal=worker)
        house.append("a", attempt, worker, kind="progress", tokens={"prompt_tokens": spent}, duration_s=1)
        await house.settle()
        worker.kill()
        await house.go_on(60)
    (tokens,) = (record.tokens for record in house.platform.records.values())
    assert tokens is not None
    assert tokens.prompt_tokens == 1000


async def test_what_is_heard_of_a_report_that_is_looked_at_again_counts(house: RelayHouse) -> None:
    def unreachable(report: TaskReport) -> bool:
        raise NetworkError("down")

    worker = house.journal.another_process()
    worker.open()
    house.started("a", journal=worker)
    await house.settle()
    worker.kill()
    house.platform.ended = unreachable
    await house.go_on(15)
    assert house.phase("a") is Phase.DUE
    house.clock.advance(-14)  # so that it is not over, by the clock of now
    house.relay.delivery._reopened.append(house.row("a"))
    house.finished("a", journal=worker)
    await house.turn()
    assert house.phase("a") is Phase.DUE
    await house.go_on(600)
    assert house.platform.posts_by_id() == {"a": 1}
    assert house.phase("a") is Phase.SETTLED


async def test_an_inferred_end_waits_while_the_platform_cannot_be_asked(house: RelayHouse) -> None:
    def unreachable(report: TaskReport) -> bool:
        raise NetworkError("down")

    worker = house.journal.another_process()
    worker.open()
    house.started("a", journal=worker)
    await house.settle()
    worker.kill()
    house.platform.ended = unreachable
    await house.go_on(120)
    assert house.platform.posts == []
    assert house.phase("a") is Phase.DUE
    house.platform.ended = lambda report: False
    await house.go_on(400)
    assert house.platform.posts_by_id() == {"a": 1}


async def test_a_retried_job_is_closed_when_no_further_attempt_comes(tmp_path: Path) -> None:
    async with RelayHouse(tmp_path, redelivery_wait_s=600) as house:
        house.started("a")
        house.finished("a", outcome="retried", continues=True, result="ValueError: again")
        await house.go_on(590, step_s=10)
        assert house.platform.posts == []
        await house.go_on(20, step_s=10)
        assert house.platform.posts_by_id() == {"a": 1}
        assert "no further attempt" in str(house.platform.records["a"].result)


async def test_a_redelivered_job_finds_its_record_and_sums_its_attempts(tmp_path: Path) -> None:
    async with RelayHouse(tmp_path, redelivery_wait_s=600) as house:
        house.job("a", tokens={"prompt_tokens": 5})
        await house.go_on(500, step_s=50)
        house.started("a", attempt_id="2")
        await house.settle()
        house.finished("a", attempt_id="2", tokens={"prompt_tokens": 6})
        await house.settle()
        tokens = house.platform.records["a"].tokens
        assert tokens is not None
        assert tokens.prompt_tokens == 11


async def test_settled_jobs_are_forgotten_after_the_redelivery_wait(tmp_path: Path) -> None:
    async with RelayHouse(tmp_path, redelivery_wait_s=600) as house:
        house.job("a")
        await house.go_on(590, step_s=50)
        assert house.row_exists("a")
        await house.go_on(60, step_s=50)
        assert not house.row_exists("a")


async def test_a_job_without_an_agent_is_settled_silently(house: RelayHouse) -> None:
    house.started("a", agent_id=None)
    house.finished("a")
    await house.settle()
    assert house.platform.posts == []
    assert house.phase("a") is Phase.SETTLED
    assert house.index.counters["unreported"] == 1


async def test_a_report_older_than_the_age_limit_is_dead(tmp_path: Path) -> None:
    async with RelayHouse(tmp_path, max_age_s=3600) as house:
        house.platform.answer = failing(NetworkError("down"))
        house.job("a")
        await house.go_on(3500, step_s=100)
        assert house.phase("a") is Phase.DUE
        house.platform.answer = lambda report: None
        house.clock.advance(400)
        await house.settle()
        assert house.phase("a") is Phase.DEAD
        assert "3600" in str(house.row("a").reason)


# before_send


async def test_before_send_has_the_last_word(tmp_path: Path) -> None:
    async with RelayHouse(tmp_path, hook=lambda report: report.model_copy(update={"result": "hidden"})) as house:
        house.job("a")
        await house.settle()
        house.job("a")
        await house.settle()
        assert [report.result for _, report in house.platform.posts] == ["hidden"]


async def test_before_send_may_withhold_a_report(tmp_path: Path) -> None:
    async with RelayHouse(tmp_path, hook=lambda report: None) as house:
        house.job("a")
        await house.settle()
        assert house.platform.posts == []
        assert house.phase("a") is Phase.SETTLED
        assert house.index.counters["withheld"] == 1


async def test_a_failing_before_send_keeps_the_report_as_dead(tmp_path: Path) -> None:
    def broken(report: TaskReport) -> TaskReport:
        raise KeyError("secret")

    async with RelayHouse(tmp_path, hook=broken) as house:
        house.job("a")
        await house.settle()
        assert house.platform.posts == []
        assert house.phase("a") is Phase.DEAD
        assert "before_send" in str(house.row("a").reason)


# Dying


async def test_what_was_delivered_but_not_acknowledged_is_sent_again(house: RelayHouse) -> None:
    house.job("a")
    await house.turn()
    assert house.platform.posts_by_id() == {"a": 1}
    await house.restart()
    await house.settle()
    assert house.platform.posts_by_id() == {"a": 2}
    assert len(house.platform.records) == 1


async def test_after_a_crash_the_suspect_is_sent_alone_and_nobody_else_is_suspected(house: RelayHouse) -> None:
    forever = asyncio.Event()

    def hang(report: TaskReport) -> Any:
        if report.id == "suspect":
            house.is_killed_here()
        return forever.wait()

    house.platform.answer = hang
    house.job("suspect")
    for _ in range(30):
        house.job()
    await house.turn()
    assert house.platform.in_flight.total() == 8
    await house.restart()
    assert [job_id for job_id in house.platform.posts_by_id() if house.row(job_id).crashes] == ["suspect"]
    together: list[set[str]] = []

    def answer(report: TaskReport) -> None:
        together.append({job_id for job_id, count in house.platform.in_flight.items() if count})

    house.platform.answer = answer
    await house.settle()
    assert len(house.platform.records) == 31
    assert {"suspect"} in together
    assert all("suspect" not in ids or len(ids) == 1 for ids in together)
    assert any(len(ids) > 1 for ids in together)


async def test_a_report_that_kills_the_relay_three_times_is_dead_and_the_rest_flow(house: RelayHouse) -> None:
    killer = "killer"
    died = False

    async def answer(report: TaskReport) -> None:
        nonlocal died
        if report.id == killer:
            await asyncio.sleep(0)  # it is what is done with the answer that kills
            died = True
            house.is_killed_here()
            await asyncio.Event().wait()

    house.platform.answer = answer
    house.job(killer)
    others = [house.job() for _ in range(20)]
    for _ in range(200):
        await house.turn()
        house.clock.advance(0.2)
        if died:
            died = False
            await house.restart()
    await house.settle()
    assert house.platform.posts_by_id()[killer] == 3
    assert house.phase(killer) is Phase.DEAD
    assert set(others) == set(house.platform.records)
    assert all(house.phase(job_id) is Phase.SETTLED for job_id in others)


async def test_a_report_whose_answer_is_waited_for_is_not_to_blame_for_any_number_of_deaths(house: RelayHouse) -> None:
    forever = asyncio.Event()
    house.platform.answer = lambda report: forever.wait()
    ids = {house.job() for _ in range(12)}
    for _ in range(10):
        await house.turn()
        assert house.platform.in_flight.total() == 8
        await house.restart()
    assert house.index.counters["crashes"] == 0
    house.platform.answer = lambda report: None
    await house.settle()
    assert set(house.platform.records) == ids
    assert house.index.count(Phase.DEAD) == 0


async def test_what_was_waited_for_when_the_relay_died_goes_behind_what_is_due(house: RelayHouse) -> None:
    forever = asyncio.Event()
    house.platform.answer = lambda report: forever.wait()
    first = [house.job() for _ in range(8)]
    await house.turn()
    house.clock.advance(1)
    others = [house.job() for _ in range(8)]
    await house.turn()
    house.clock.advance(1)
    house.platform.posts.clear()
    house.platform.answer = lambda report: None
    await house.restart()
    await house.settle()
    sent = [str(report.id) for _, report in house.platform.posts]
    assert set(sent[:8]) == set(others)
    assert set(sent[8:]) == set(first)


async def test_events_are_counted_once_whenever_the_relay_dies(house: RelayHouse) -> None:
    for _ in range(700):
        house.job()
    await house.turn()
    await house.restart()
    await house.settle()
    await house.restart()
    await house.settle()
    assert house.index.counters["appended"] == 1400


async def test_an_event_that_cannot_be_folded_is_set_aside_and_counted(
    house: RelayHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpander_celery.relay import ingest

    real: Any = ingest.fold

    def fold(events: Any, state: Any) -> Any:
        if events[0].job_id == "strange":
            raise RecursionError("strange")
        return real(events, state)

    monkeypatch.setattr(ingest, "fold", fold)
    house.job("strange")
    others = [house.job() for _ in range(5)]
    await house.settle()
    assert set(house.platform.records) == set(others)
    assert house.index.counters["unfoldable"] == 2
    (kept,) = (house.config.directory / "corrupt").iterdir()
    assert kept.read_text().count("strange") >= 2


# A full index


async def test_at_its_cap_the_index_stops_taking_in_and_the_journal_keeps_the_rest(tmp_path: Path) -> None:
    async with RelayHouse(tmp_path, max_index_bytes=2 * 1024**2) as house:
        house.platform.answer = failing(NetworkError("down"))
        ids = [house.job(result="x" * 20_000) for _ in range(200)]
        for _ in range(20):
            await house.turn()
            house.clock.advance(5)
        assert 0 < house.index.count(Phase.DUE) < 200
        assert house.journal.backlog_bytes() > 0
        house.platform.answer = lambda report: None
        for _ in range(300):
            await house.turn()
            house.clock.advance(5)
        assert set(house.platform.records) == set(ids)
        assert house.journal.backlog_bytes() == 0


@pytest.mark.parametrize(
    "error",
    [
        NetworkError("down " + "x" * 200),
        NotFoundError("no such agent " + "x" * 150, status_code=404),
    ],
)
@pytest.mark.parametrize(("jobs", "size"), [(6000, 100), (1500, 2000)])
async def test_from_its_cap_it_comes_back_once_the_platform_does(
    tmp_path: Path, error: Exception, jobs: int, size: int
) -> None:
    async with RelayHouse(tmp_path, max_index_bytes=2 * 1024**2) as house:
        house.platform.answer = failing(error)
        ids = {house.job(result="x" * size) for _ in range(jobs)}
        for _ in range(200):
            await house.turn()
            house.clock.advance(5)
        assert house.journal.backlog_bytes() > 0
        assert (tmp_path / "index.db").stat().st_size <= 2 * 1024**2
        house.platform.answer = lambda report: None
        await house.restart()
        for _ in range(600):
            await house.turn()
            house.clock.advance(5)
            if set(house.platform.records) == ids:
                break
        assert set(house.platform.records) == ids
        assert house.journal.backlog_bytes() == 0
        assert len(house.platform.posts) < jobs + 100  # nothing is sent again and again


async def test_refused_reports_at_its_cap_are_dead_and_stay_known(tmp_path: Path) -> None:
    async with RelayHouse(tmp_path, max_index_bytes=2 * 1024**2) as house:
        house.platform.answer = failing(RequestRefusedError("no " + "x" * 900, status_code=422))
        for _ in range(4000):
            house.job()
        for _ in range(200):
            await house.turn()
            house.clock.advance(5)
        assert not house.relay.delivery._results
        assert house.index.count(Phase.DEAD) == len(house.platform.posts_by_id())


def full(*args: Any, **kwargs: Any) -> None:
    raise IndexFullError("database or disk is full")


async def test_a_relay_that_begins_on_a_full_disk_gives_the_reserve_back(
    house: RelayHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.job("a")
    await house.settle()
    reserve = house.config.directory / "index.reserve"
    assert reserve.exists()
    clamp = Index.clamp_waits

    def needs_room(self: Index, now: float, *, longest_s: float) -> None:
        if reserve.exists():
            full()
        clamp(self, now, longest_s=longest_s)

    monkeypatch.setattr(Index, "clamp_waits", needs_room)
    await house.restart()
    house.job("b")
    await house.settle()
    assert set(house.platform.records) == {"a", "b"}


@pytest.mark.parametrize("step", ["clamp_waits", "note_crashes", "put_last"])
async def test_a_relay_begins_without_any_room(house: RelayHouse, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    house.platform.answer = lambda report: asyncio.Event().wait()
    house.job("a")
    await house.turn()
    monkeypatch.setattr(Index, step, full)
    await house.restart()
    house.platform.answer = lambda report: None
    await house.settle()
    assert house.phase("a") is Phase.SETTLED


async def test_what_somebody_asks_of_a_full_index_is_answered_with_an_error(
    house: RelayHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.platform.answer = failing(RequestRefusedError("bad", status_code=422))
    house.job("a")
    await house.settle()
    monkeypatch.setattr(house.index, "requeue", full)
    question = tell(house.config.directory, "requeue", within_s=60, job_id="a")
    assert question is not None
    await house.turn()
    assert "full" in json.loads(question.with_suffix(".answer").read_bytes())["error"]


async def test_held_reports_go_once_there_is_room_again(house: RelayHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    house.platform.answer = failing(NotFoundError("no such agent", status_code=404))
    house.job("a")
    house.job("b")
    await house.settle()
    house.platform.answer = lambda report: None
    with monkeypatch.context() as patch:
        patch.setattr(house.index, "release_held", full)
        await house.go_on(70)
        assert len(house.platform.records) == 1
    await house.go_on(10)
    assert set(house.platform.records) == {"a", "b"}


async def test_upkeep_goes_on_with_a_full_index(
    house: RelayHouse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    upkeep = Upkeep(
        house.config,
        index=house.index,
        reader=house.journal,
        gate=house.relay.gate,
        clock=house.clock.now,
        leads=lambda: True,
    )
    monkeypatch.setattr(house.index, "forget_gone", full)
    upkeep.tend(house.clock.now())
    assert "cannot keep its files" in caplog.text


async def test_a_flush_is_answered_when_everything_written_is_delivered(house: RelayHouse) -> None:
    question = tell(house.config.directory, "flush", within_s=1e9)
    assert question is not None
    house.job("a")
    for _ in range(10):
        await house.turn()
        if question.with_suffix(".answer").exists():
            break
        house.clock.advance(0.02)
    assert question.with_suffix(".answer").read_text() == '{"drained": true}'
    assert house.platform.posts_by_id() == {"a": 1}
    assert house.phase("a") is Phase.SETTLED


async def test_a_flush_in_an_outage_is_answered_at_once(house: RelayHouse) -> None:
    house.platform.answer = failing(NetworkError("down"))
    for _ in range(10):
        house.job()
    await house.settle()
    assert house.relay.gate.flow is Flow.BROKEN
    question = tell(house.config.directory, "flush", within_s=1e9)
    assert question is not None
    for _ in range(3):
        await house.turn()
    assert question.with_suffix(".answer").read_text() == '{"drained": false}'


async def test_the_rate_limit_holds_over_a_restart(tmp_path: Path) -> None:
    async with RelayHouse(tmp_path, rate_limit_per_minute=60) as house:
        for _ in range(200):
            house.job()
        for lived_s in (1, 20, 1, 65):
            await house.go_on(lived_s, step_s=1.0)
            status = Status(0, "", "", 0.0, 0.0, at=house.clock.now() - HEARTBEAT_S)  # its last word is a while ago
            status.write(tmp_path)
            await house.restart()
        times = [at for at, _ in house.platform.posts]
        assert len(times) > 60
        assert max(sum(first <= at < first + 60 for at in times) for first in times) <= 60


async def test_after_a_long_rest_the_rate_limit_allows_a_burst_again(tmp_path: Path) -> None:
    async with RelayHouse(tmp_path, rate_limit_per_minute=60) as house:
        Status(0, "", "", 0.0, 0.0, at=house.clock.now() - 600).write(tmp_path)
        await house.restart()
        for _ in range(10):
            house.job()
        await house.settle()
        assert len(house.platform.posts) == 6


# Clocks, and what others wrote


async def test_a_clock_that_was_set_forward_stalls_no_job(house: RelayHouse) -> None:
    house.started("killed")
    await house.settle()
    house.clock.jump(3600)
    at, owner, facts = house.clock.wall(), house.journal.process_id, {"task": "shop.charge", "agent_id": "agent"}
    known = {"child": owner, "owner": owner, "facts": facts}
    word = {"outcome": "timed_out", "result": "TimeLimitExceeded(30)", "owner": owner, "facts": facts}
    house.append("killed", "1", house.journal, kind="ended", at=at, **word)
    house.append("retried", "1", house.journal, kind="started", at=at, **known)
    house.append("retried", "2", house.journal, kind="started", at=at + 1, **known)
    house.append("retried", "2", house.journal, kind="finished", at=at + 2, outcome="succeeded", duration_s=1.0)
    await house.go_on(300)
    assert house.platform.posts_by_id() == {"killed": 1, "retried": 1}


async def test_a_retry_that_is_due_late_is_waited_for_also_by_a_clock_that_was_set_forward(tmp_path: Path) -> None:
    async with RelayHouse(tmp_path, redelivery_wait_s=600) as house:
        house.started("a")
        await house.settle()
        house.clock.jump(3600)
        at = house.clock.wall()
        end = {"outcome": "retried", "continues": True, "duration_s": 1.0, "goes_on_at": at + 14_400}
        house.append("a", "1", house.journal, kind="finished", at=at, **end)
        await house.go_on(14_400, step_s=60)
        assert house.platform.posts == []


async def test_dead_reports_are_requeued_and_purged_also_by_a_clock_that_is_behind(house: RelayHouse) -> None:
    house.platform.answer = failing(RequestRefusedError("bad", status_code=422))
    for _ in range(3):
        house.job()
    await house.settle()
    desk = Desk(house.index, now=lambda: house.clock.now() - 3600, redelivery_wait_s=7200)
    assert desk.answer("requeue", {"job_id": "job-1"})["done"] == 1
    assert desk.answer("purge", {})["done"] == 2


async def test_a_request_that_no_release_makes_is_answered_with_an_error(house: RelayHouse) -> None:
    assert (
        "no such request"
        in Desk(house.index, now=house.clock.now, redelivery_wait_s=1).answer(
            ["list"],  # type: ignore[arg-type]
            {},
        )["error"]
    )


@pytest.mark.parametrize(
    "stored", [{}, {"flow": "resting", "settings": ""}, {"flow": "flowing", "reason": "", "rests": "x"}]
)
async def test_a_state_of_the_destination_that_cannot_be_read_is_passed_over(
    house: RelayHouse, stored: dict[str, Any]
) -> None:
    house.index.store_gate(stored)
    await house.restart()
    house.job("a")
    await house.settle()
    assert house.platform.posts_by_id() == {"a": 1}
