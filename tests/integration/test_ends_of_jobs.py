"""Every way in which a job ends on a real prefork worker gives one report, with the right outcome and what it spent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import chain, group

from tests.support import jobs
from tests.support.broker import Broker
from tests.support.waiting import until
from tests.support.worker import AGENT, Worker, start_worker
from xpander_celery.events import Ended, Started
from xpander_celery.fold import Final, fold, verdict
from xpander_celery.report import Outcome, Tokens


@pytest.fixture(scope="module")
def worker(redis_broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with start_worker(redis_broker, tmp_path_factory.mktemp("worker"), "--concurrency=2") as worker:
        yield worker


@pytest.fixture(autouse=True, scope="module")
def publisher(redis_broker: Broker) -> Iterator[None]:
    before = jobs.app.conf.broker_url, jobs.app.conf.result_backend
    jobs.app.conf.update(broker_url=redis_broker.url, result_backend=redis_broker.backend)
    yield
    jobs.app.conf.update(broker_url=before[0], result_backend=before[1])


def sent(signature: Any) -> str:
    job_id: str = signature.apply_async().id
    return job_id


def is_told_at_once(worker: Worker, job_id: str) -> bool:
    """Whether nothing is waited for once the worker's main process said how the job ended."""
    ends = [event for event in worker.journal.events(job_id) if isinstance(event, Ended)]
    return isinstance(verdict(fold(ends), now=ends[0].at, gone={}, redelivery_wait_s=3600), Final)


def test_a_job_that_returns_succeeds(worker: Worker) -> None:
    report = worker.journal.report(sent(jobs.add.s(1, y=2)))
    assert (report.agent_id, report.is_success, report.input, report.result) == (AGENT, True, '{"x":1,"y":2}', "3")
    facts = report.llm_response["celery"]
    assert facts["task"] == "tests.support.jobs.add"
    assert facts["queue"] == "celery"
    assert facts["queue_wait_s"] >= 0
    assert len(facts["trace_id"]) == 32


def test_a_job_that_raises_fails_with_the_users_frames_alone(worker: Worker) -> None:
    report = worker.journal.report(sent(jobs.fail.s("no luck")))
    assert not report.is_success
    assert report.input == "no luck"
    assert report.result is not None
    assert report.result.startswith("ValueError: no luck\n\nTraceback")
    assert "celery/app/trace.py" not in report.result


def test_a_retry_continues_the_record_and_adds_up(worker: Worker) -> None:
    job_id = sent(jobs.retry_once.s("how?"))
    report = worker.journal.report(job_id)
    assert (report.is_success, report.result, report.input) == (True, "how?", "how?")
    assert report.tokens == Tokens(prompt_tokens=20, completion_tokens=2)
    assert report.used_tools == ("tool-0", "tool-1")
    starts = [event for event in worker.journal.events(job_id) if event.kind == "started"]
    assert [len(event.carried) for event in starts] == [0, 1]
    assert starts[1].carried[0].attempt_id == starts[0].attempt_id
    assert starts[1].carried[0].tokens == Tokens(prompt_tokens=10, completion_tokens=1)
    assert starts[1].facts.parent_id is None


def test_autoretry_is_one_record(worker: Worker) -> None:
    report = worker.journal.report(sent(jobs.retry_by_itself.s()))
    assert (report.is_success, report.tokens) == (True, Tokens(prompt_tokens=30, completion_tokens=3))


def test_a_job_that_runs_out_of_retries_fails_with_its_own_error(worker: Worker) -> None:
    report = worker.journal.report(sent(jobs.give_up.s()))
    assert not report.is_success
    assert report.result is not None
    assert report.result.startswith("ConnectionError: still busy")


def test_a_hard_time_limit_keeps_what_was_spent(worker: Worker) -> None:
    job_id = sent(jobs.overrun.s())
    report = worker.journal.report(job_id)
    assert worker.journal.outcome(job_id) is Outcome.TIMED_OUT
    assert (report.is_success, report.result) == (False, "TimeLimitExceeded(1)")
    assert report.tokens == Tokens(prompt_tokens=10, completion_tokens=1)
    assert 0.5 < report.duration < 10


def test_a_soft_time_limit_is_a_failure_of_the_job(worker: Worker) -> None:
    report = worker.journal.report(sent(jobs.overrun_softly.s()))
    assert report.result is not None
    assert report.result.startswith("SoftTimeLimitExceeded")


def test_a_killed_job_is_lost_with_what_was_spent(worker: Worker) -> None:
    job_id = sent(jobs.die.s())
    report = worker.journal.report(job_id)
    assert worker.journal.outcome(job_id) is Outcome.LOST
    assert report.result == "WorkerLostError: Worker exited prematurely: signal 9 (SIGKILL)"
    assert report.tokens == Tokens(prompt_tokens=10, completion_tokens=1)


def test_a_job_that_leaves_its_process_is_lost(worker: Worker) -> None:
    job_id = sent(jobs.leave.s())
    assert worker.journal.outcome(job_id) is Outcome.LOST


def test_a_redelivered_job_is_one_record_of_two_attempts(worker: Worker) -> None:
    job_id = sent(jobs.die_once.s())
    report = worker.journal.report(job_id, timeout_s=60)
    assert (report.is_success, report.result) == (True, "survived")
    assert report.tokens == Tokens(prompt_tokens=20, completion_tokens=2)
    starts = [event for event in worker.journal.events(job_id) if event.kind == "started"]
    assert len({event.attempt_id for event in starts}) == 2
    assert starts[0].facts.acks_late
    assert starts[0].facts.visibility_timeout_s == 5


def test_an_ignored_job_is_over(worker: Worker) -> None:
    job_id = sent(jobs.ignore.s())
    assert worker.journal.report(job_id).is_success
    assert worker.journal.outcome(job_id) is Outcome.IGNORED


def test_a_rejected_job_is_over(worker: Worker) -> None:
    job_id = sent(jobs.reject.s())
    assert not worker.journal.report(job_id).is_success
    assert worker.journal.outcome(job_id) is Outcome.REJECTED


def test_a_result_that_cannot_be_stored_is_a_failure(worker: Worker) -> None:
    report = worker.journal.report(sent(jobs.return_what_json_cannot_hold.s()))
    assert not report.is_success
    assert report.result is not None
    assert report.result.startswith("EncodeError")


def test_a_job_revoked_while_it_runs(worker: Worker) -> None:
    result = jobs.sleep.delay(60)
    until(lambda: worker.journal.events(result.id), what="the start of the job")
    result.revoke(terminate=True)
    report = worker.journal.report(result.id)
    assert worker.journal.outcome(result.id) is Outcome.REVOKED
    assert (report.is_success, report.result) == (False, "revoked: terminated by SIGTERM")
    assert not is_told_at_once(worker, result.id)


def test_a_job_revoked_before_it_starts(worker: Worker) -> None:
    result = jobs.add.apply_async((1, 1), countdown=5)
    until(lambda: any(jobs.app.control.inspect().scheduled().values()), what="the job at the worker")
    result.revoke()
    report = worker.journal.report(result.id)
    assert worker.journal.outcome(result.id) is Outcome.REVOKED
    assert (report.input, report.result) == ('{"x":1,"y":1}', "revoked")
    assert is_told_at_once(worker, result.id)


def test_an_expired_job(worker: Worker) -> None:
    job_id = jobs.add.apply_async((1, 1), countdown=1, expires=0.5).id
    assert worker.journal.report(job_id).result == "expired before it was run"
    assert worker.journal.outcome(job_id) is Outcome.EXPIRED
    assert is_told_at_once(worker, job_id)


def test_a_task_that_the_worker_does_not_have(worker: Worker) -> None:
    job_id = jobs.app.send_task("nobody.knows", args=("question",)).id
    report = worker.journal.report(job_id)
    assert report.result == "NotRegistered: this worker has no task 'nobody.knows'"
    assert report.llm_response["celery"]["task"] == "nobody.knows"
    assert is_told_at_once(worker, job_id)


def test_a_nested_eager_job_is_a_job_of_its_own(worker: Worker) -> None:
    job_id = sent(jobs.call_within.s(4))
    report = worker.journal.report(job_id)
    assert (report.result, report.llm_response["response"]) == ("10", {"inner": 5})
    inner = [end.report for end in worker.journal.verdicts().values() if end.report and end.report.result == "5"]
    assert [each.llm_response["celery"]["parent_id"] for each in inner] == [job_id]


def test_a_job_replaced_by_another_one_is_one_record(worker: Worker) -> None:
    job_id = sent(jobs.replace_by_one.s(6))
    report = worker.journal.report(job_id)
    assert (report.is_success, report.result) == (True, "7")
    assert report.tokens == Tokens(prompt_tokens=10, completion_tokens=1)


@pytest.mark.parametrize(("job", "result"), [(jobs.replace_by_group, "[2,4]"), (jobs.replace_by_chain, "12")])
def test_a_job_replaced_by_several_is_continued_under_its_id(worker: Worker, job: Any, result: str) -> None:
    job_id = sent(job.s())
    report = worker.journal.report(job_id)
    assert (report.is_success, report.result, report.agent_id) == (True, result, AGENT)
    assert report.tokens == Tokens(prompt_tokens=10, completion_tokens=1)


def test_groups_chains_and_chords_are_one_record_for_each_job(worker: Worker) -> None:
    in_group = group(jobs.add.s(n, n) for n in range(3)).apply_async()
    in_chain = chain(jobs.add.s(1, 1), jobs.add.s(10)).apply_async()
    in_chord = jobs.chord_of(3)
    for number, result in enumerate(in_group.results):
        report = worker.journal.report(result.id)
        assert (report.result, report.llm_response["celery"]["group_id"]) == (str(2 * number), in_group.id)
    assert worker.journal.report(in_chain.id).result == "12"
    assert worker.journal.report(in_chain.parent.id).result == "2"
    assert worker.journal.report(in_chord.id).result == "6"
    tasks = {end.report.llm_response["celery"]["task"] for end in worker.journal.verdicts().values() if end.report}
    assert not any(task.startswith("celery.") and task != "celery.accumulate" for task in tasks)


def test_options_of_a_task_and_of_a_call(worker: Worker) -> None:
    own = worker.journal.report(sent(jobs.own_agent.s("secret-word", "why?")))
    assert (own.agent_id, json.loads(own.input or "")["question"]) == ("own-agent", "why?")
    assert "secret-word" not in own.model_dump_json()
    assert worker.journal.report(sent(jobs.decorated.s("why?"))).agent_id == "decorated-agent"
    above = worker.journal.report(sent(jobs.decorated_above.s("why?")))
    assert (above.agent_id, above.input) == ("above-agent", None)
    called = jobs.add.apply_async((1, 1), headers={"xpander_agent_id": "agent-of-the-call"})
    assert worker.journal.report(called.id).agent_id == "agent-of-the-call"


def test_what_the_author_hid_stays_hidden(worker: Worker) -> None:
    job_id = jobs.fail.apply_async(("my pin is 1234",), argsrepr="('<hidden>',)").id
    report = worker.journal.report(job_id)
    assert report.input == "('<hidden>',)"


def test_what_the_author_hid_stays_hidden_in_a_retry(worker: Worker) -> None:
    job_id = jobs.retry_once.apply_async(("my pin is 1234",), argsrepr="('<hidden>',)").id
    assert worker.journal.report(job_id).input == "('<hidden>',)"
    started = [event for event in worker.journal.events(job_id) if isinstance(event, Started)]
    assert [event.facts.input for event in started] == ["('<hidden>',)"] * 2


def test_nothing_of_ours_went_wrong(worker: Worker) -> None:
    assert "hook" not in worker.log
    assert "xpander_celery" not in worker.log
