"""Workers whose jobs are greenlets of one process, with the journal in a Redis that stands still for a while."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from tests.matrix.environments import VERSIONS, python_of
from tests.support.broker import Broker, start_redis
from tests.support.redis_server import RedisServer, running_redis
from tests.support.sandbox import Sandbox, start_sandbox
from tests.support.waiting import until
from tests.support.worker import AGENT, APP, start_worker

_JOBS = 40
_GREENLETS = 10
_AT_MOST_HELD_UP_S = 0.3  # others than those that wait for Redis themselves


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with start_redis() as broker:
        yield broker


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with start_sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path / "redis", "--appendonly", "yes") as server:
        yield server


@pytest.mark.fault(24)
@pytest.mark.timeout(300)
@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_greenlets_go_on_while_redis_stands_still_and_every_job_is_one_record(
    pool: str, broker: Broker, redis: RedisServer, sandbox: Sandbox, tmp_path: Path
) -> None:
    environ = {
        "XPANDER_BASE_URL": sandbox.url,
        "XPANDER_API_KEY": sandbox.api_key,
        "XPANDER_CELERY_JOURNAL": redis.url,
        "TEST_RELAY": "auto",
    }
    options = (f"--pool={pool}", f"--concurrency={_GREENLETS}", f"--queues={pool}")
    python = str(python_of(VERSIONS[-1]))
    client = Celery("client", broker=broker.url, backend=broker.backend, set_as_current=False)
    with client, start_worker(broker, tmp_path / "worker", *options, python=python, **environ):

        def run() -> dict[str, float]:
            """The jobs of one batch, with the longest that any of their short sleeps took, in seconds."""
            began = time.monotonic()
            sent = [client.send_task(f"{APP}.doze", (20,), queue=pool) for _ in range(_JOBS)]
            longest = {each.id: each.get(timeout=60) for each in sent}
            print(f"{_JOBS} jobs in {time.monotonic() - began:.2f} s, longest step {max(longest.values()):.3f} s")
            return longest

        def records() -> dict[str, int]:
            return {
                each["id"]: each["tokens"]["prompt_tokens"]
                for each in sandbox.records(AGENT)
                if each["status"] == "completed"
            }

        calm = run()
        until(lambda: records() == dict.fromkeys(calm, 10), what="a record of each job")
        redis.freeze()
        try:
            frozen = run()
        finally:
            redis.thaw()
        until(lambda: records() == dict.fromkeys({**calm, **frozen}, 10), timeout_s=90, what="a record of each job")
        failing = [client.send_task(f"{APP}.fail", ("no",), queue=pool).id for _ in range(_JOBS)]
        until(lambda: all(map(sandbox.record, failing)), timeout_s=60, what="a record of each failure")
    assert max(frozen.values()) < max(calm.values()) + _AT_MOST_HELD_UP_S
    assert {sandbox.record(job_id)["status"] for job_id in failing} == {"error"}  # type: ignore[index]
    assert set(sandbox.posts_by_id().values()) == {1}
    assert len(sandbox.records(AGENT)) == 3 * _JOBS
