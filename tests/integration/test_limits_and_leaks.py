"""What reporting must not change: a soft time limit reaches the job, and nothing leaks from one job into the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import jobs
from tests.support.broker import Broker
from tests.support.worker import Worker, start_worker
from xpander_celery.report import Tokens


@pytest.fixture(scope="module")
def worker(redis_broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    before = jobs.app.conf.broker_url, jobs.app.conf.result_backend
    jobs.app.conf.update(broker_url=redis_broker.url, result_backend=redis_broker.backend)
    with start_worker(redis_broker, tmp_path_factory.mktemp("worker"), "--concurrency=1") as worker:
        yield worker
    jobs.app.conf.update(broker_url=before[0], result_backend=before[1])


def test_a_soft_limit_reaches_a_job_that_never_leaves_our_code(worker: Worker) -> None:
    """It calls `add_usage` and `tool_call` without end, so the limit lands in there."""
    for _ in range(3):
        result = jobs.count_until_limit.delay()
        assert result.get(timeout=30) == "the limit arrived"
        assert worker.journal.report(result.id).is_success


def test_a_soft_limit_reaches_a_job_that_publishes_without_end(worker: Worker) -> None:
    for _ in range(5):
        said = jobs.publish_until_limit.delay().get(timeout=30)
        if said != "the limit hit Celery's dispatch":  # which loses it around the call of any receiver
            break
    assert said == "the limit arrived"


def test_the_next_job_does_not_inherit_what_one_left_attached(worker: Worker) -> None:
    leaked = worker.journal.report(jobs.leak_a_context.delay().id)
    for job in (jobs.spend_in_a_span, jobs.spend_in_a_span_isolated):
        report = worker.journal.report(job.delay().id)
        assert report.tokens == Tokens(prompt_tokens=10, completion_tokens=1)
        assert report.llm_response["celery"]["trace_id"] != leaked.llm_response["celery"]["trace_id"]
    assert leaked.tokens is None
