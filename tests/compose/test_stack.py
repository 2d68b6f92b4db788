"""The stack as a user gets it: every kind of job is in the history, and killed containers lose nothing."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from tests.compose.stack import WORKER_CONCURRENCY, WORKERS, Stack
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(1200)

EXPECTED = {
    "stack.price": {"succeeded"},
    "stack.ask": {"succeeded"},
    "stack.digest": {"succeeded"},
    "stack.count_words": {"succeeded"},
    "stack.add_up": {"succeeded"},
    "stack.charge": {"succeeded", "failed"},
    "stack.render": {"succeeded", "lost"},
}


def facts(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of its job."""
    return dict(record["llm_response"]["celery"])


def find(records: dict[str, dict[str, Any]], task: str, outcome: str) -> dict[str, Any]:
    """A record of such a job."""
    found = (
        record for record in records.values() if (facts(record)["task"], facts(record)["outcome"]) == (task, outcome)
    )
    return next(found)


@pytest.fixture(scope="module")
def records(stack: Stack) -> dict[str, dict[str, Any]]:
    """The history, once every kind of job has ended in each of its ways."""

    def complete() -> dict[str, dict[str, Any]]:
        records = stack.records()
        seen = defaultdict(set)
        for record in records.values():
            seen[facts(record)["task"]].add(facts(record)["outcome"])
        retried = any(facts(record)["attempt"] > 1 for record in records.values())
        return records if retried and all(seen[task] >= outcomes for task, outcomes in EXPECTED.items()) else {}

    return until(complete, timeout_s=240, what="a record of every kind of job")


def test_the_published_port_shows_the_history(stack: Stack) -> None:
    page = stack.page()
    assert page.status_code == 200
    assert "text/html" in page.headers["content-type"]


def test_an_ordinary_job_has_its_input_and_result(records: dict[str, dict[str, Any]]) -> None:
    record = find(records, "stack.price", "succeeded")
    assert "chair" in record["input"]["text"]
    assert record["result"] == "397.0"


def test_the_jobs_of_all_workers_are_in_one_history(records: dict[str, dict[str, Any]]) -> None:
    assert len({facts(record)["worker"] for record in records.values()}) == WORKERS


def test_an_agents_tokens_and_tools_are_in_its_record(records: dict[str, dict[str, Any]]) -> None:
    record = find(records, "stack.ask", "succeeded")
    assert set(record["used_tools"]) == {"stock_of", "price_of"}
    assert record["tokens"]["prompt_tokens"] > 0
    assert record["tokens"]["completion_tokens"] > 0


def test_a_job_that_failed_says_why_and_keeps_its_secret(records: dict[str, dict[str, Any]]) -> None:
    record = find(records, "stack.charge", "failed")
    assert "ValueError: the card is blocked" in record["result"]
    assert "4242" not in record["input"]["text"]


def test_a_killed_job_is_lost_with_the_tokens_it_had_spent(records: dict[str, dict[str, Any]]) -> None:
    record = find(records, "stack.render", "lost")
    assert "SIGKILL" in record["result"]
    assert record["tokens"]["completion_tokens"] > 0


def test_a_killed_worker_and_a_killed_relay_lose_nothing(stack: Stack) -> None:
    (relay,) = stack.containers("relay")
    stack.crash(stack.containers("worker")[0])
    stack.crash(relay)
    began_before = len(stack.begun())
    until(lambda: len(stack.begun()) > began_before + 20, timeout_s=240, what="jobs after the kills")
    stack.stop_sending()

    def missing() -> set[str]:
        return stack.begun().keys() - stack.records().keys()

    until(lambda: not missing(), timeout_s=240, what="a record for every job that began")
    records = stack.records()
    untold = [
        job_id for job_id, state in stack.ended().items() if records[job_id]["is_success"] != (state == "SUCCESS")
    ]
    assert len(untold) <= WORKER_CONCURRENCY, (
        "only what the killed worker was just about to tell may be counted as lost"
    )
    assert {facts(records[job_id])["outcome"] for job_id in untold} <= {"lost"}
