"""The whole way: a real worker, its relay and a platform; a thousand jobs are a thousand records, each sent once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from tests.support.broker import Broker, start_rabbitmq
from tests.support.sandbox import Sandbox, start_sandbox
from tests.support.waiting import until
from tests.support.worker import AGENT, APP, start_worker

COUNT = 1000


@pytest.fixture(params=["redis", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    if request.param == "redis":
        broker = request.getfixturevalue("redis_broker")
        yield broker
        return
    with start_rabbitmq() as broker:
        yield broker


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with start_sandbox() as sandbox:
        yield sandbox


def test_a_thousand_jobs_are_a_thousand_records(broker: Broker, sandbox: Sandbox, tmp_path: Path) -> None:
    with start_worker(
        broker,
        tmp_path,
        "--concurrency=2",
        "--prefetch-multiplier=16",
        TEST_RELAY="auto",
        XPANDER_BASE_URL=sandbox.url,
        XPANDER_API_KEY=sandbox.api_key,
    ) as worker:
        with Celery("client", broker=broker.url, set_as_current=False) as client:
            sent = [client.send_task(f"{APP}.add", (number, 1), ignore_result=True).id for number in range(COUNT)]
        until(lambda: len(sandbox.posts_by_id()) >= COUNT, timeout_s=90, what=f"{COUNT} reports")
        worker.stop()
    records = {record["id"]: record for record in sandbox.records(AGENT)}
    assert set(records) == set(sent)
    assert Counter(record["status"] for record in records.values()) == {"completed": COUNT}
    assert set(sandbox.posts_by_id().values()) == {1}
