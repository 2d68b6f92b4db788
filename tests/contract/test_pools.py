"""The synchronous calls in workers whose threads are greenlets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery, group

from tests.support.broker import Broker, start_redis
from tests.support.sandbox import Sandbox
from tests.support.worker import start_worker

JOBS = 50
SLOWNESS_S = 0.5


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with start_redis() as running:
        yield running


@pytest.fixture(params=["gevent", "eventlet", "threads"])
def pool(request: pytest.FixtureRequest, sandbox: Sandbox, broker: Broker, tmp_path: Path) -> Iterator[str]:
    """A worker with this pool, and as many places as there are jobs."""
    options = ("--pool", request.param, "--concurrency", str(JOBS))
    with start_worker(
        broker,
        tmp_path,
        *options,
        app="tests.contract.pooled",
        XPANDER_API_KEY=sandbox.api_key,
        XPANDER_BASE_URL=sandbox.url,
        XPANDER_AGENT_ID=f"agent-{request.param}",
        OPENAI_API_KEY="any",
        PYTHONWARNINGS="ignore",  # eventlet says at import that it is deprecated
    ):
        yield request.param
    sandbox.set_faults()


def test_fifty_reports_at_once_are_fifty_records(pool: str, sandbox: Sandbox, broker: Broker) -> None:
    sandbox.set_faults({"path": "*/report_task", "delay_s": SLOWNESS_S})
    with Celery("client", broker=broker.url, backend=broker.backend) as client:
        started = time.monotonic()
        ids = group(client.signature("pooled.report", [number]) for number in range(JOBS))().get(timeout=60)
        took = time.monotonic() - started
    assert sorted(ids) == sorted(f"agent-{pool}-{number}" for number in range(JOBS))
    records = sandbox.records(f"agent-{pool}")
    assert {record["id"] for record in records} == set(ids)
    assert len(records) == JOBS
    assert [rule["applied"] for rule in sandbox.faults()] == [JOBS]
    assert took < JOBS * SLOWNESS_S / 2, "they were not sent at once"


def test_stored_agents_are_resolved_at_once(pool: str, broker: Broker) -> None:
    with Celery("client", broker=broker.url, backend=broker.backend) as client:
        names = group(client.signature("pooled.keywords", [number]) for number in range(10))().get(timeout=90)
    assert sorted(names) == sorted(f"agent {number}" for number in range(10))
