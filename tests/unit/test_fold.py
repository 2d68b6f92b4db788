"""The merge rules as tables, and as properties: arrival has no part in what a job's record says."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpander_celery.events import (
    CarriedAttempt,
    Ended,
    Event,
    Finished,
    JobFacts,
    Progress,
    Started,
    attempt_id_of,
    carry,
)
from xpander_celery.fold import Final, JobState, Open, fold, verdict
from xpander_celery.job_state import FINGERPRINTS, FULL, KEPT
from xpander_celery.report import Outcome, TaskReport, Tokens

WAIT = 7200.0
CHILD, OWNER = "child-1", "owner-1"


def facts(**known: Any) -> JobFacts:
    return JobFacts(
        **{"task": "t.work", "agent_id": "agent-1", "input": "{}", "queue": "celery", "worker": "w@h", **known}
    )


def started(
    attempt: str = "a1", at: float = 100.0, *, carried: Any = (), one_process: bool = False, **known: Any
) -> Started:
    child = OWNER if one_process else CHILD
    return Started(
        job_id="job", attempt_id=attempt, at=at, child=child, owner=OWNER, facts=facts(**known), carried=tuple(carried)
    )


def progress(
    attempt: str = "a1", at: float = 101.0, spent: int = 0, tools: tuple[str, ...] = (), **more: Any
) -> Progress:
    tokens = Tokens(prompt_tokens=spent)
    return Progress(job_id="job", attempt_id=attempt, at=at, tokens=tokens, used_tools=tools, **more)


def finished(
    attempt: str = "a1", outcome: str = "succeeded", at: float = 102.0, spent: int = 0, **more: Any
) -> Finished:
    more = {"duration_s": 2.0, "tokens": Tokens(prompt_tokens=spent), **more}
    return Finished(job_id="job", attempt_id=attempt, at=at, outcome=Outcome(outcome), **more)


def ended(attempt: str = "a1", outcome: str = "lost", at: float = 105.0, *, carried: Any = (), **more: Any) -> Ended:
    known = {key: more.pop(key) for key in tuple(more) if key in JobFacts.model_fields}
    return Ended(
        job_id="job",
        attempt_id=attempt,
        at=at,
        owner=OWNER,
        outcome=Outcome(outcome),
        facts=facts(**known),
        carried=tuple(carried),
        **more,
    )


def judged(*events: Event, now: float = 1e6, gone: dict[str, float] | None = None, wait: float = WAIT) -> Final | Open:
    return verdict(fold(events), now=now, gone=gone or {}, redelivery_wait_s=wait)


def final(*events: Event, **given_: Any) -> Final:
    result = judged(*events, **given_)
    assert isinstance(result, Final), result
    return result


def report(*events: Event, **given_: Any) -> TaskReport:
    result = final(*events, **given_)
    assert result.report is not None
    return result.report


def spent(*events: Event, **given_: Any) -> int:
    tokens = report(*events, **given_).tokens
    return tokens.prompt_tokens if tokens is not None else 0


# What a report says


def test_a_report_is_filed_under_the_job_id_with_what_the_child_said() -> None:
    sent = report(
        started(trace_id="ab", queue_wait_s=0.5, retries=0, root_id="job"),
        finished(result="42", spent=7, used_tools=("search",), llm_response={"id": "r1"}),
    )
    assert sent == TaskReport(
        agent_id="agent-1",
        id="job",
        input="{}",
        llm_response={
            "celery": {
                "attempt": 1,
                "task": "t.work",
                "queue": "celery",
                "worker": "w@h",
                "retries": 0,
                "root_id": "job",
                "queue_wait_s": 0.5,
                "trace_id": "ab",
                "outcome": "succeeded",
            },
            "response": {"id": "r1"},
        },
        tokens=Tokens(prompt_tokens=7),
        is_success=True,
        result="42",
        duration=2.0,
        used_tools=("search",),
    )


def test_without_metadata_the_raw_response_stands_alone() -> None:
    assert report(started(job_metadata=False), finished(llm_response=[1])).llm_response == [1]


def test_what_the_job_set_itself_replaces_what_its_message_says() -> None:
    sent = report(started(), finished(input="the question", agent_id="agent-2"))
    assert (sent.input, sent.agent_id) == ("the question", "agent-2")


def test_what_the_deciding_attempt_does_not_know_is_taken_from_another() -> None:
    sent = report(started(), finished(outcome="retried", input="asked"), ended("a2", "revoked", input=None, retries=1))
    assert sent.input == "asked"


def test_a_job_without_an_agent_is_final_and_has_no_report() -> None:
    assert final(started(agent_id=None), finished()) == Final(None, Outcome.SUCCEEDED, inferred=False)


def test_no_tokens_are_no_zeros() -> None:
    assert report(started(), finished()).tokens is None


# Who decides an attempt

LIMIT = "TimeLimitExceeded(30)"
PREMATURE = "WorkerLostError: signal 9 (SIGKILL)"


@pytest.mark.parametrize(
    ("events", "outcome", "text"),
    [
        ([finished(result="ok")], "succeeded", "ok"),
        ([finished(outcome="failed", result="ValueError: no")], "failed", "ValueError: no"),
        ([finished(outcome="failed")], "failed", "failed"),
        ([finished(outcome="ignored")], "ignored", "ignored"),
        ([finished(outcome="rejected")], "rejected", "rejected"),
        ([ended(outcome="timed_out", result=LIMIT)], "timed_out", LIMIT),
        ([ended(outcome="lost", result=PREMATURE)], "lost", PREMATURE),
        ([ended(outcome="revoked")], "revoked", "revoked"),
        ([ended(outcome="expired")], "expired", "expired"),
        # interrupted is weaker than any word of the parent
        ([finished(outcome="interrupted", result="SystemExit: 1"), ended(result=PREMATURE)], "lost", PREMATURE),
        ([finished(outcome="interrupted"), ended(outcome="timed_out", result=LIMIT)], "timed_out", LIMIT),
        # a definite word of the child is stronger than any of the parent
        ([finished(result="ok"), ended(outcome="timed_out", result=LIMIT)], "succeeded", "ok"),
        ([finished(outcome="failed", result="no"), ended(outcome="lost")], "failed", "no"),
        ([finished(outcome="ignored"), ended(outcome="revoked")], "ignored", "ignored"),
        # but the result may fail to be stored, whoever says so
        ([finished(result="ok"), finished(outcome="failed", result="no", at=103)], "failed", "no"),
        ([finished(result="ok"), ended(outcome="failed", result="no")], "failed", "no"),
        ([finished(outcome="interrupted"), finished(outcome="failed", result="no")], "failed", "no"),
        # ends of one attempt: revoked > timed_out > lost
        ([ended(outcome="lost"), ended(outcome="timed_out", result=LIMIT)], "timed_out", LIMIT),
        ([ended(outcome="timed_out", result=LIMIT), ended(outcome="revoked", result="revoked")], "revoked", "revoked"),
        ([ended(outcome="lost"), ended(outcome="revoked", result="revoked", at=99)], "revoked", "revoked"),
        # the same end twice is one end
        ([ended(result="first", at=1), ended(result="second", at=2)], "lost", "first"),
    ],
)
@pytest.mark.parametrize("with_start", [True, False])
def test_the_strongest_word_decides_in_any_order(
    events: list[Event], outcome: str, text: str, with_start: bool
) -> None:
    known = [started(), *events] if with_start else [ended("a0", "requeued", at=1), *events]
    for order in itertools.permutations(known):
        result = final(*order)
        assert (result.outcome, result.inferred) == (outcome, False)
        assert result.report is not None
        assert (result.report.result, result.report.is_success) == (text, outcome in ("succeeded", "ignored"))


@pytest.mark.parametrize("strong", ["requeued", "retried"])
@pytest.mark.parametrize("weak", ["revoked", "timed_out", "lost"])
def test_a_parent_that_put_the_job_back_overrules_its_other_verdicts(strong: str, weak: str) -> None:
    for order in itertools.permutations([started(), ended(outcome=strong, at=110), ended(outcome=weak, at=105)]):
        assert judged(*order, now=200) == Open(110 + WAIT, frozenset())


# What is not final


@pytest.mark.parametrize(
    "end",
    [
        finished(outcome="retried", at=200),
        finished(outcome="rejected", continues=True, at=200),
        finished(outcome="ignored", continues=True, at=200),
        ended(outcome="requeued", at=200),
        ended(outcome="retried", at=200),
        ended(outcome="rejected", continues=True, at=200),
    ],
)
class TestContinuing:
    def test_the_next_attempt_is_waited_for(self, end: Event) -> None:
        assert judged(started(), end, now=200 + WAIT - 1) == Open(200 + WAIT, frozenset())

    def test_a_death_of_the_worker_changes_nothing(self, end: Event) -> None:
        gone = {CHILD: 201.0, OWNER: 202.0}
        assert judged(started(), end, now=200 + WAIT - 1, gone=gone) == Open(200 + WAIT, frozenset())

    def test_when_none_comes_the_job_is_closed_with_what_is_known(self, end: Event) -> None:
        result = final(started(), end, progress(spent=5, at=300), now=200 + WAIT)
        assert result.inferred
        assert result.report is not None
        assert result.report.tokens == Tokens(prompt_tokens=5)
        assert ", and no further attempt came" in str(result.report.result)

    def test_the_next_attempt_decides(self, end: Event) -> None:
        events = [started(), end, started("a2", 300, retries=1)]
        assert judged(*events, now=400) == Open(None, frozenset((CHILD, OWNER)))
        result = final(*events, finished("a2", at=301, result="ok"))
        assert result.report is not None
        assert (result.outcome, result.report.result, result.inferred) == (Outcome.SUCCEEDED, "ok", False)


@pytest.mark.parametrize("outcome", ["retried", "failed", "ignored"])
def test_the_next_attempt_is_waited_for_from_when_it_is_due(outcome: str) -> None:
    due = 200 + 10 * WAIT
    events = started(), finished(outcome=outcome, at=200, continues=True, goes_on_at=due)
    assert judged(*events, now=due) == Open(due + WAIT, frozenset())
    assert judged(*events, now=due, gone={CHILD: 201.0, OWNER: 202.0}) == Open(due + WAIT, frozenset())
    assert final(*events, now=due + WAIT).inferred
    later = started("a2", due + 1, retries=1), finished("a2", at=due + 2)
    assert final(*events, *later, now=due + 10).outcome is Outcome.SUCCEEDED


def test_a_next_attempt_that_was_due_before_the_end_is_waited_for_from_the_end() -> None:
    assert judged(started(), finished(outcome="retried", at=200, goes_on_at=150.0), now=200) == Open(
        200 + WAIT, frozenset()
    )


def test_a_job_that_goes_on_after_it_was_given_up_is_waited_for_again() -> None:
    """It was killed when it had published its retry, which is retried once more."""
    events = [started(), ended(at=105), started("a2", 110, retries=1), finished("a2", "retried", at=111, spent=5)]
    for order in itertools.permutations(events):
        assert judged(*order, now=112) == Open(111 + WAIT, frozenset())
    third = finished("a3", "failed", at=121), started("a3", 120, retries=2)
    assert final(*events, *third).outcome is Outcome.FAILED
    assert final(*events, now=111 + WAIT).outcome is Outcome.LOST  # an end that was seen


def test_the_reason_of_a_retry_is_in_the_text_of_a_closed_job() -> None:
    assert report(started(), finished(outcome="retried", result="OSError: down")).result == (
        "retried, and no further attempt came\n\nOSError: down"
    )


def test_a_replaced_task_that_never_came_is_no_success() -> None:
    """A part of what replaced it failed, and Celery stores a failure of the job itself."""
    never_came = report(started(), finished(outcome="ignored", continues=True))
    assert (never_came.is_success, never_came.result) == (False, "replaced, and no further attempt came")


# One request, several children


def run_by(child: str, at: float, **more: Any) -> Started:
    event = started(attempt_id_of("a1", child), at, **more)
    return event.model_copy(update={"child": child})


def told(child: str, outcome: str, at: float, **more: Any) -> Finished:
    return finished(attempt_id_of("a1", child), outcome, at, **more)


def heard(child: str, at: float, **more: Any) -> Progress:
    return progress(attempt_id_of("a1", child), at, **more)


@pytest.mark.parametrize(
    ("events", "gone", "outcome", "tokens"),
    [
        ([run_by("c1", 100), heard("c1", 101, spent=5), ended(at=105)], {}, "lost", 5),
        ([run_by("c1", 100), told("c1", "succeeded", 102, spent=5), ended(at=105)], {}, "succeeded", 5),
        ([run_by("c1", 100), told("c1", "interrupted", 102, spent=5), ended(at=105)], {}, "lost", 5),
        # the pool gave the request to a second child, since it had not read that the first one took it
        (
            [run_by("c1", 100), heard("c1", 101, spent=5), run_by("c2", 110), told("c2", "succeeded", 111, spent=7)],
            {"c1": 102.0},
            "succeeded",
            12,
        ),
        (
            [run_by("c1", 100), heard("c1", 101, spent=5), run_by("c2", 110), heard("c2", 111, spent=7), ended(at=115)],
            {"c1": 102.0, "c2": 112.0},
            "lost",
            12,
        ),
        (
            [
                run_by("c1", 100),
                told("c1", "succeeded", 101, spent=5),  # it had run to its end
                run_by("c2", 110),
                told("c2", "failed", 111, spent=7),
            ],
            {"c1": 102.0},
            "failed",
            12,
        ),
        (
            [run_by("c1", 100), heard("c1", 101, spent=5), run_by("c2", 110), heard("c2", 111, spent=7)],
            {"c1": 102.0, "c2": 112.0, OWNER: 112.0},
            "lost",
            12,
        ),
    ],
)
def test_every_child_that_ran_a_request_is_an_attempt_and_the_parents_word_is_on_the_newest(
    events: list[Event], gone: dict[str, float], outcome: str, tokens: int
) -> None:
    for order in itertools.permutations(events):
        result = final(*order, gone=gone)
        assert result.outcome == outcome
        assert spent(*order, gone=gone) == tokens


def test_the_second_child_is_waited_for_as_long_as_it_lives() -> None:
    events = [run_by("c1", 100), run_by("c2", 110)]
    assert judged(*events, gone={"c1": 102.0}) == Open(None, frozenset(("c2", OWNER)))
    again = [run_by("c1", 100), told("c1", "succeeded", 101), run_by("c2", 110)]
    assert judged(*again, gone={"c1": 102.0}) == Open(None, frozenset(("c2", OWNER)))


def test_a_request_that_was_put_back_in_the_queue_is_continued_by_the_next_one() -> None:
    events = [
        run_by("c1", 100),
        heard("c1", 101, spent=5),
        ended(outcome="requeued", at=105),
        started("a2/c2", 120),
        finished("a2/c2", at=121, spent=7),
    ]
    for order in itertools.permutations(events):
        assert spent(*order) == 12
        assert report(*order).llm_response["celery"]["attempt"] == 2


def test_what_a_second_child_ran_longer_counts_in_the_duration() -> None:
    sent = report(
        run_by("c1", 100),
        heard("c1", 101, duration_s=1.5),
        run_by("c2", 110),
        ended(at=114),
        gone={"c1": 102.0, "c2": 112.0},
    )
    assert sent.duration == 5.5


def test_a_request_that_kills_its_children_for_ever_stays_small_and_its_sums_exact() -> None:
    state: JobState | None = None
    for n in range(300):
        child, at = f"c{n:04}", 100.0 + n
        events = [run_by(child, at, input="x" * 500), heard(child, at + 0.5, spent=1)]
        state = JobState.model_validate_json(fold(events, state).model_dump_json())
    state = fold([ended(at=1000.0)], state)
    assert len(state.model_dump_json()) < 60_000
    assert state.usage().tokens == Tokens(prompt_tokens=300)
    result = verdict(state, now=1e6, gone={CHILD: 1.0}, redelivery_wait_s=WAIT)
    assert isinstance(result, Final)
    assert result.outcome is Outcome.LOST


def test_what_parents_said_of_a_long_history_stays_small_and_its_sums_exact() -> None:
    state: JobState | None = None
    events: list[Event] = []
    for n in range(200):
        attempt, at = f"a{n}", 100.0 + 10 * n
        events += [started(f"{attempt}/c", at), progress(f"{attempt}/c", at + 1, spent=1)]
        events += [ended(attempt, "requeued", at + 2, result="x" * 500)]
    for event in events:
        state = fold([event], state)
    assert state is not None
    assert len(state.joined()) <= KEPT
    assert len(state.model_dump_json()) < 80_000
    assert state.usage().tokens == Tokens(prompt_tokens=200)
    again = fold(events[-3 * KEPT - 60 :], state)
    assert again.usage() == state.usage()


# Waiting for a word


@pytest.mark.parametrize(
    ("events", "gone", "until", "watch"),
    [
        ([started()], {}, None, {CHILD, OWNER}),
        ([started(one_process=True)], {}, None, {OWNER}),
        ([started()], {"somebody else": 1.0}, None, {CHILD, OWNER}),
        ([started()], {CHILD: 500.0}, 560, {OWNER}),
        ([started()], {OWNER: 500.0}, 510, set()),
        ([started()], {CHILD: 490.0, OWNER: 500.0}, 510, set()),
        ([started(one_process=True)], {OWNER: 500.0}, 510, set()),
        ([started(), finished(outcome="interrupted", at=400)], {}, 460, {OWNER}),
        ([started(), finished(outcome="interrupted", at=400)], {CHILD: 401.0}, 460, {OWNER}),
        ([started(one_process=True), finished(outcome="interrupted", at=400)], {}, 410, {OWNER}),
        ([started(), finished(outcome="interrupted", at=400)], {OWNER: 405.0}, 415, set()),
        ([started(acks_late=True, visibility_timeout_s=3600)], {OWNER: 500.0}, 500 + 7200, set()),
        ([started(acks_late=True, visibility_timeout_s=1)], {OWNER: 500.0}, 510, set()),
        ([started(acks_late=True)], {OWNER: 500.0}, 500 + WAIT, set()),
        ([started(acks_late=True, visibility_timeout_s=3600)], {CHILD: 500.0}, 560, {OWNER}),
        ([progress(at=400)], {}, 400 + WAIT, set()),
    ],
)
def test_a_job_without_an_end_stays_open_as_long_as_a_word_may_come(
    events: list[Event], gone: dict[str, float], until: float | None, watch: set[str]
) -> None:
    assert judged(*events, now=400, gone=gone) == Open(until, frozenset(watch))
    if until is not None:
        assert isinstance(judged(*events, now=until - 0.001, gone=gone), Open)
        assert final(*events, now=until, gone=gone).inferred


@pytest.mark.parametrize(
    ("events", "gone", "expected"),
    [
        ([started(), ended(at=105)], {}, Open(107, frozenset((CHILD,)))),
        ([ended(at=105)], {}, Open(107, frozenset())),  # what its child said may not be read yet
        ([ended(outcome="expired", at=105, before_start=True)], {}, "expired"),  # no child was given it
        ([ended(outcome="revoked", at=105, before_start=True)], {}, "revoked"),
        ([ended(outcome="failed", at=105, before_start=True)], {}, "failed"),
        ([started(), finished(outcome="retried"), ended("a2", "revoked", 105, before_start=True)], {}, "revoked"),
        ([started(), ended(at=105)], {CHILD: 105.5}, "lost"),
        ([started(), ended(at=105), finished(outcome="interrupted", at=105.5)], {}, "lost"),
        ([started(), ended(at=105), finished(at=105.5)], {}, "succeeded"),
    ],
)
def test_a_child_that_is_being_killed_may_still_say_how_far_it_came(
    events: list[Event], gone: dict[str, float], expected: Open | str
) -> None:
    result = judged(*events, now=106, gone=gone)
    assert (result.outcome if isinstance(result, Final) else result) == expected
    assert isinstance(judged(*events, now=107, gone=gone), Final)


@pytest.mark.parametrize(
    ("events", "gone", "outcome", "text"),
    [
        ([started()], {OWNER: 5.0}, "lost", "WorkerLostError: the worker went away without a word"),
        ([started()], {CHILD: 5.0}, "lost", "WorkerLostError: the worker went away without a word"),
        ([started(), finished(outcome="interrupted")], {}, "interrupted", "interrupted: it ended without an outcome"),
        (
            [started(), finished(outcome="interrupted", result="SystemExit: 3")],
            {OWNER: 5.0},
            "lost",
            "WorkerLostError: the worker went away without a word\n\nSystemExit: 3",
        ),
    ],
)
def test_an_end_that_nobody_saw_is_inferred(
    events: list[Event], gone: dict[str, float], outcome: str, text: str
) -> None:
    result = final(*events, gone=gone)
    assert (result.outcome, result.inferred) == (outcome, True)
    assert result.report is not None
    assert (result.report.result, result.report.is_success) == (text, False)


def test_a_job_that_was_taken_for_lost_ends_as_its_redelivery_does() -> None:
    gone = {OWNER: 300.0}
    first = [started(acks_late=True, visibility_timeout_s=5)]
    assert final(*first, gone=gone).outcome is Outcome.LOST
    second = Started(**{**started("a2", 400).model_dump(), "owner": "owner-2", "child": "child-2"})
    assert judged(*first, second, gone=gone) == Open(None, frozenset(("owner-2", "child-2")))
    assert final(*first, second, finished("a2", at=401), gone=gone).outcome is Outcome.SUCCEEDED


# Several attempts


def test_the_count_of_retries_outranks_a_clock_that_is_ahead() -> None:
    events = [started(at=5000), ended(outcome="lost", at=5001), ended("a2", "revoked", at=100, retries=1)]
    assert final(*events).outcome is Outcome.REVOKED


def test_an_end_that_was_seen_outranks_one_that_is_only_inferred() -> None:
    events = [started(at=100), finished(), started("a2", 200)]
    assert final(*events, gone={OWNER: 300.0}).outcome is Outcome.SUCCEEDED


def test_a_redelivery_that_runs_while_the_first_attempt_does_reports_when_it_ends() -> None:
    events = [started(at=100), started("a2", 200), finished("a2", at=210, result="second")]
    assert report(*events).result == "second"
    assert report(*events, finished(at=220, result="first", spent=3)).tokens == Tokens(prompt_tokens=3)


def test_a_replacement_counts_its_retries_from_zero_and_still_comes_later() -> None:
    events = [
        started(retries=2),
        finished(outcome="ignored", continues=True, at=105),
        started("b1", 110, task="t.other"),
        finished("b1", "retried", at=115),
        started("b2", 120, task="t.other", retries=1),
    ]
    assert judged(*events, now=1e6) == Open(None, frozenset((CHILD, OWNER)))
    sent = report(*events, finished("b2", at=121))
    assert sent.llm_response["celery"]["attempt"] == 3


def test_a_record_says_what_its_first_message_asked_for() -> None:
    sent = report(
        started(input="original", task="t.first", agent_id="agent-1"),
        finished(outcome="ignored", continues=True),
        started("b1", 110, task="celery.accumulate", input="[]", agent_id="agent-of-all", queue="other"),
        finished("b1", at=111, result="[1,2]"),
    )
    assert (sent.input, sent.agent_id, sent.result) == ("original", "agent-1", "[1,2]")
    assert (sent.llm_response["celery"]["task"], sent.llm_response["celery"]["queue"]) == ("t.first", "other")


def test_what_the_newest_attempt_set_itself_counts() -> None:
    sent = report(
        started(),
        finished(outcome="retried", input="first", agent_id="agent-2"),
        started("a2", 200, retries=1),
        finished("a2", at=201, input="second"),
    )
    assert (sent.input, sent.agent_id) == ("second", "agent-2")


def test_a_long_history_keeps_what_was_asked_for() -> None:
    events: list[Event] = [started("first", 1.0, input="original"), finished("first", "retried")]
    events += [e for n in range(1, 3 * KEPT) for e in (started(f"b{n}", 100.0 + n, retries=n, input="x"),)]
    assert report(*events, gone={OWNER: 1.0}).input == "original"


# Usage


def test_usage_is_cumulative_so_the_last_word_holds() -> None:
    events = [started(), progress(at=101, spent=5), progress(at=103, spent=9, tools=("a",)), progress(at=102, spent=7)]
    for order in itertools.permutations(events):
        sent = report(*order, gone={OWNER: 1.0})
        assert (sent.tokens, sent.used_tools) == (Tokens(prompt_tokens=9), ("a",))


def test_a_late_progress_corrects_the_report_of_a_finished_job() -> None:
    events = [started(), finished(at=102, spent=5)]
    state = fold(events)
    corrected = fold([progress(at=104, spent=9, duration_s=2.0)], state)
    for known in (corrected, fold([*events, *events], corrected)):
        result = verdict(known, now=1e6, gone={}, redelivery_wait_s=WAIT)
        assert isinstance(result, Final)
        assert result.report is not None
        assert (result.report.tokens, result.report.duration) == (Tokens(prompt_tokens=9), 2.0)


def test_usage_and_duration_are_summed_over_attempts_and_tools_are_distinct_in_order_of_first_use() -> None:
    sent = report(
        started("a2", 200, retries=1),
        finished("a2", at=202, spent=10, used_tools=("search", "mail"), duration_s=0.2),
        started("z1", 100),
        finished("z1", "retried", at=102, spent=5, used_tools=("calc", "search"), duration_s=0.1),
    )
    assert (sent.tokens, sent.duration) == (Tokens(prompt_tokens=15), 0.3)
    assert sent.used_tools == ("calc", "search", "mail")


@pytest.mark.parametrize(
    ("events", "duration"),
    [
        ([ended(outcome="timed_out", at=130)], 30.0),
        ([ended(outcome="timed_out", at=130), finished(outcome="interrupted", duration_s=29.5)], 29.5),
        ([progress(duration_s=12.0)], 12.0),
        ([], 0.0),
        ([ended(outcome="lost", at=40)], 0.0),
    ],
)
def test_the_duration_of_a_killed_attempt_goes_up_to_what_was_last_seen_of_it(
    events: list[Event], duration: float
) -> None:
    assert report(started(at=100), *events, gone={OWNER: 200.0}).duration == duration


def test_a_job_revoked_before_it_started_took_no_time() -> None:
    assert report(ended(outcome="revoked", at=130)).duration == 0.0


def carried(attempt: str, tokens: int, **more: Any) -> CarriedAttempt:
    return CarriedAttempt(job_id="job", attempt_id=attempt, tokens=Tokens(prompt_tokens=tokens), duration_s=1.0, **more)


def test_a_retry_on_another_host_brings_the_usage_of_earlier_attempts() -> None:
    history = [carried("a1", 5, used_tools=("calc",)), carried("a2", 7)]
    sent = report(
        started("a3", carried=history, retries=2), finished("a3", spent=1, used_tools=("mail",), duration_s=2.0)
    )
    assert (sent.tokens, sent.duration) == (Tokens(prompt_tokens=13), 4.0)
    assert sent.used_tools == ("calc", "mail")
    assert sent.llm_response["celery"]["attempt"] == 3


def test_where_journal_and_message_know_an_attempt_the_journal_holds() -> None:
    own = [started(), finished(outcome="retried", spent=6)]
    second = [started("a2", 200, carried=[carried("a1", 5)], retries=1), finished("a2", at=201, spent=1)]
    for order in itertools.permutations([*own, *second]):
        assert spent(*order) == 7


def test_usage_carried_from_another_job_is_not_counted() -> None:
    foreign = CarriedAttempt(job_id="other", attempt_id="o1", tokens=Tokens(prompt_tokens=5))
    assert spent(started(carried=[foreign]), finished(spent=1)) == 1


def test_what_a_job_revoked_on_another_host_had_spent_is_carried_too() -> None:
    assert spent(ended("a2", "revoked", carried=[carried("a1", 5)], retries=1)) == 5


def long_history(attempts: int) -> list[list[Event]]:
    """A job that fails `attempts` - 1 times, each attempt spending its own number; events by attempt."""
    history: tuple[CarriedAttempt, ...] = ()
    events: list[list[Event]] = []
    for n in range(1, attempts + 1):
        name, at = f"a{n}", 100.0 * n
        outcome = "succeeded" if n == attempts else "retried"
        end = finished(name, outcome, at + 1, spent=n, duration_s=1.0, result=f"try {n}", used_tools=(f"tool{n % 50}",))
        events.append([started(name, at, carried=history, retries=n - 1), end])
        history = carry(history, carried(name, n, used_tools=(f"tool{n % 50}",)))
    return events


@pytest.mark.parametrize(
    "seen",
    [
        [40],  # one attempt here, 39 elsewhere
        [39, 40],
        [1, 40],
        [5, 20, 40],
        [1, 2, 3, 38, 40],
        list(range(1, 41)),  # all here
        list(range(20, 41)),
        list(range(2, 41, 2)),
    ],
)
def test_a_merged_history_counts_every_attempt_once_whichever_of_them_ran_here(seen: list[int]) -> None:
    attempts = long_history(40)
    events = [event for n in seen for event in attempts[n - 1]]
    for seed in range(5):
        random.Random(seed).shuffle(events)
        sent = report(*events)
        assert sent.tokens == Tokens(prompt_tokens=sum(range(1, 41)))
        assert sent.duration == 40.0
        assert set(sent.used_tools) == {f"tool{n}" for n in range(1, 41)}
        assert sent.llm_response["celery"]["attempt"] == 40


# The attempt that published the next one may end after that did

RETRY: list[Event] = [started("a2", 110, carried=[carried("a1", 5)], retries=1), finished("a2", at=111, spent=1)]


@pytest.mark.parametrize(
    ("earlier", "gone", "now", "expected"),
    [
        ([started()], {}, 111.0, Open(113, frozenset((OWNER,)))),
        ([started()], {CHILD: 110.5}, 111.0, Open(113, frozenset((OWNER,)))),  # its parent has yet to speak
        ([started()], {OWNER: 110.5}, 111.0, 6),
        ([started()], {}, 113.0, 6),
        ([started(), progress(spent=4)], {}, 111.0, Open(113, frozenset((OWNER,)))),
        ([progress(spent=4)], {}, 111.0, Open(113, frozenset())),
        ([started(), finished(outcome="retried", at=111.5, spent=7)], {}, 111.5, 8),
        ([started(), finished(outcome="ignored", at=111.5, spent=7, continues=True)], {}, 111.5, 8),
        ([started(), ended(at=111.5)], {}, 111.5, 6),
        ([], {}, 110.9, Open(111, frozenset())),  # its events may have come when its segment was already read
        ([], {}, 111.0, 6),  # it ran elsewhere
    ],
)
def test_a_retry_that_was_quicker_than_the_end_of_the_attempt_before_it_waits_for_that(
    earlier: list[Event], gone: dict[str, float], now: float, expected: Open | int
) -> None:
    for order in itertools.permutations([*earlier, *RETRY]):
        result = judged(*order, now=now, gone=gone)
        if isinstance(expected, Open):
            assert result == expected
        else:
            assert spent(*order, now=now, gone=gone) == expected


def test_an_attempt_before_is_waited_for_until_all_is_read() -> None:
    for events in (RETRY, [started(), *RETRY]):
        result = verdict(fold(events), now=1e6, gone={}, redelivery_wait_s=WAIT, is_read=False)
        assert isinstance(result, Open)
        assert result.until == 1e6


def test_a_job_with_one_attempt_waits_for_nothing_else() -> None:
    state = fold([started(), finished(at=102)])
    assert isinstance(verdict(state, now=102, gone={}, redelivery_wait_s=WAIT, is_read=False), Final)


@settings(max_examples=80, deadline=None)
@given(attempts=st.integers(2, 12), seed=st.randoms(use_true_random=False), replaces=st.booleans())
def test_however_a_backlog_is_read_nothing_is_final_before_every_attempt_has_said_its_end(
    attempts: int, seed: random.Random, *, replaces: bool
) -> None:
    processes = long_history(attempts)  # each attempt is of another one, which writes in order
    if replaces:
        for number, (begin, end) in enumerate(processes[:-1]):
            processes[number] = [begin, end.model_copy(update={"outcome": Outcome.IGNORED, "continues": True})]
    state = None
    while processes:
        written = seed.choice(processes)
        state = fold([written.pop(0)], state)
        if not written:
            processes.remove(written)
        result = verdict(state, now=1e6, gone={}, redelivery_wait_s=1e6, is_read=False)
        assert isinstance(result, Final) is (not processes)


# Bounds


def test_a_state_of_hundreds_of_retries_stays_small_and_its_sums_exact() -> None:
    state: JobState | None = None
    for events in long_history(600):
        state = JobState.model_validate_json(fold(events, state).model_dump_json())
    assert state is not None
    assert len(state.attempts) <= KEPT
    assert len(state.model_dump_json()) < 40_000
    result = verdict(state, now=1e6, gone={}, redelivery_wait_s=WAIT)
    assert isinstance(result, Final)
    assert result.report is not None
    assert result.report.tokens == Tokens(prompt_tokens=sum(range(1, 601)))
    assert result.report.duration == 600.0
    assert result.report.llm_response["celery"]["attempt"] == 600
    assert result.report.result == "try 600"


def test_a_message_that_kills_its_worker_for_ever_stays_small() -> None:
    state: JobState | None = None
    for n in range(600):
        events = [started(f"a{n}", float(n), input="x" * 500), progress(f"a{n}", n + 0.5, spent=1)]
        state = fold(events, state)
    assert state is not None
    assert len(state.model_dump_json()) < 40_000
    assert isinstance(verdict(state, now=1e6, gone={}, redelivery_wait_s=WAIT), Open)
    result = verdict(state, now=1e6, gone={OWNER: 5e5}, redelivery_wait_s=WAIT)
    assert isinstance(result, Final)
    assert result.report is not None
    assert result.report.tokens == Tokens(prompt_tokens=600)


def test_events_of_merged_attempts_are_not_counted_again() -> None:
    attempts = long_history(3 * FINGERPRINTS)
    events = [event for each in attempts for event in each]
    state = fold(events)
    again = fold(events[: 2 * FINGERPRINTS], state)
    assert again.usage() == state.usage()
    assert len(again.attempts) == len(state.attempts)


def test_long_texts_are_kept_of_recent_attempts_only() -> None:
    events: list[Event] = []
    for n in range(KEPT):
        text = "x" * 10_000
        events += [started(f"a{n}", 100.0 * n, retries=n, input=text), finished(f"a{n}", "retried", result=text)]
    assert len(fold(events).model_dump_json()) < (FULL + 1) * 20_000 + 40_000


def test_the_end_that_was_seen_keeps_its_text_among_many_later_attempts_without_one() -> None:
    events: list[Event] = [started(), finished(result="42", input="asked")]
    events += [started(f"b{n}", 200.0 + n) for n in range(2 * KEPT)]
    sent = report(*events, gone={OWNER: 1.0})
    assert (sent.result, sent.input) == ("42", "asked")


def test_the_state_of_an_ordinary_job_is_small() -> None:
    state = fold(
        [
            started(
                "8d4b1f2e6a3c4d5e8f901a2b3c4d5e6f",
                input="x" * 300,
                root_id="6c1f2f6e-7d0e-4a0c-9f58-3d4f3c1a2b11",
                trace_id="0af7651916cd43dd8448eb211c80319c",
                queue_wait_s=0.0123,
            ),
            finished("8d4b1f2e6a3c4d5e8f901a2b3c4d5e6f", result="y" * 300, spent=2140, used_tools=("search",)),
        ]
    )
    assert len(state.model_dump_json()) < 1500


# Refusals


def test_no_event_makes_no_state() -> None:
    with pytest.raises(ValueError, match="no event"):
        fold([])


def test_events_of_two_jobs_are_refused() -> None:
    with pytest.raises(ValueError, match="several jobs"):
        fold([started(), Progress(job_id="other", attempt_id="x", at=1.0)])


# Arrival has no part in it

times = st.sampled_from([100.0, 100.5, 101.0, 102.0, 160.0, 7301.0])
ids = st.sampled_from(["a1", "a2", "a3", "a4", "a1/c1", "a1/c2", "a2/c1", "a5/c1"])
tokens = st.builds(Tokens, prompt_tokens=st.integers(0, 3), completion_tokens=st.integers(0, 2))
tools = st.lists(st.sampled_from("xyz"), max_size=2).map(tuple)
texts = st.sampled_from([None, "one", "two"])
durations = st.sampled_from([0.0, 0.5, 2.0])
known_facts = st.builds(
    JobFacts,
    task=st.sampled_from(["t.one", "t.two"]),
    agent_id=st.sampled_from([None, "agent-1", "agent-2"]),
    input=texts,
    retries=st.integers(0, 2),
    acks_late=st.booleans(),
    visibility_timeout_s=st.sampled_from([None, 1.0, 30.0]),
)
carried_lists = st.lists(
    st.builds(
        CarriedAttempt,
        job_id=st.sampled_from(["job", "job", "other"]),
        attempt_id=ids,
        attempts=st.sampled_from([1, 1, 1, 3]),
        tokens=tokens,
        used_tools=tools,
        duration_s=durations,
    ),
    max_size=3,
).map(tuple)
common: dict[str, Any] = {"job_id": st.just("job"), "attempt_id": ids, "at": times}
spending: dict[str, Any] = {"tokens": tokens, "used_tools": tools, "duration_s": durations}
any_event: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        Started,
        **common,
        child=st.sampled_from(["c1", "c2", "o1"]),
        owner=st.sampled_from(["o1", "o2"]),
        facts=known_facts,
        carried=carried_lists,
    ),
    st.builds(Progress, **common, **spending),
    st.builds(
        Finished,
        **common,
        **spending,
        outcome=st.sampled_from(Outcome),
        result=texts,
        llm_response=st.sampled_from([None, {"a": [1]}]),
        input=texts,
        agent_id=st.sampled_from([None, "agent-3"]),
        continues=st.booleans(),
    ),
    st.builds(
        Ended,
        **common,
        owner=st.just("o1"),
        outcome=st.sampled_from(Outcome),
        result=texts,
        facts=known_facts,
        carried=carried_lists,
        continues=st.booleans(),
        before_start=st.booleans(),
    ),
)
histories = st.lists(any_event, min_size=1, max_size=14)
liveness = st.dictionaries(st.sampled_from(["c1", "c2", "o1", "o2"]), times)


def in_batches(events: list[Event], cuts: list[int], *, stored: bool) -> JobState:
    state: JobState | None = None
    edges = sorted({0, len(events), *(cut % (len(events) + 1) for cut in cuts)})
    for begin, end in itertools.pairwise(edges):
        state = fold(events[begin:end], state)
        if stored:
            state = JobState.model_validate_json(state.model_dump_json())
    assert state is not None
    return state


@settings(max_examples=120, deadline=None)
@given(
    events=histories,
    again=st.lists(st.integers(0, 13), max_size=6),
    seed=st.randoms(use_true_random=False),
    cuts=st.lists(st.integers(0, 20), max_size=4),
    gone=liveness,
    now=times,
)
def test_order_repetition_and_batches_of_arrival_change_nothing(
    events: list[Event], again: list[int], seed: random.Random, cuts: list[int], gone: dict[str, float], now: float
) -> None:
    once = fold(events)
    arrived = [*events, *(events[n % len(events)] for n in again)]
    seed.shuffle(arrived)
    state = in_batches(arrived, cuts, stored=True)
    assert state == once
    assert state.model_dump_json() == once.model_dump_json()
    kept = {"now": now, "gone": gone, "redelivery_wait_s": WAIT}
    assert verdict(state, **kept) == verdict(once, **kept)


@settings(max_examples=80, deadline=None)
@given(first=histories, second=histories, third=histories)
def test_folding_is_associative(first: list[Event], second: list[Event], third: list[Event]) -> None:
    assert (
        fold(third, fold(second, fold(first)))
        == fold([*second, *third], fold(first))
        == fold([*first, *second, *third])
    )


@settings(max_examples=120, deadline=None)
@given(events=histories, gone=liveness, now=times, later=st.floats(0, 1e6))
def test_a_verdict_that_is_open_names_what_will_close_it(
    events: list[Event], gone: dict[str, float], now: float, later: float
) -> None:
    state = fold(events)
    result = verdict(state, now=now, gone=gone, redelivery_wait_s=WAIT)
    if isinstance(result, Final):
        assert verdict(state, now=now + later, gone=gone, redelivery_wait_s=WAIT) == result
        return
    assert result.until is None or result.until > now
    assert result.until is not None or result.watch
    assert not result.watch & gone.keys()
    for _ in range(2 * len(events)):  # every wait ends, once all processes are dead
        gone = {**gone, **dict.fromkeys(result.watch, now)}
        now = max(now, result.until or 0.0)
        result = verdict(state, now=now, gone=gone, redelivery_wait_s=WAIT)
        if isinstance(result, Final):
            return
    pytest.fail("still open")


@settings(max_examples=80, deadline=None)
@given(seen=st.sets(st.integers(1, 45), min_size=1), seed=st.randoms(use_true_random=False))
def test_totals_are_exact_for_any_part_of_a_long_history_that_includes_its_end(
    seen: set[int], seed: random.Random
) -> None:
    attempts = long_history(45)
    events = [event for n in sorted(seen | {45}) for event in attempts[n - 1]]
    seed.shuffle(events)
    assert fold(events).usage().tokens == Tokens(prompt_tokens=sum(range(1, 46)))
