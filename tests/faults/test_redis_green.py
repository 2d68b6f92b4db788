"""Workers whose jobs are greenlets of one process, with the journal in a Redis that stands still for a while."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery import Celery
from celery.result import AsyncResult

from tests.matrix.environments import VERSIONS, python_of
from tests.support.broker import Broker
from tests.support.redis_server import RedisServer
from tests.support.sandbox import Sandbox
from tests.support.waiting import until
from tests.support.worker import AGENT, APP, start_worker
from xpander_celery.journal.redis.writer import TIMEOUT_S

_JOBS = 40
_GREENLETS = 10
_AT_MOST_HELD_UP_S = 0.8 * TIMEOUT_S  # a job that does not wait for Redis itself


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

        def send(steps: int) -> AsyncResult:
            return client.send_task(f"{APP}.doze", (steps,), queue=pool)

        def run() -> set[str]:
            """One batch of jobs, to its end."""
            sent = [send(5) for _ in range(_JOBS)]
            for each in sent:
                each.get(timeout=60)
            return {each.id for each in sent}

        def records() -> dict[str, int]:
            return {
                each["id"]: each["tokens"]["prompt_tokens"]
                for each in sandbox.records(AGENT)
                if each["status"] == "completed"
            }

        finished = run()
        until(lambda: records() == dict.fromkeys(finished, 10), what="a record of each job")
        watcher = send(500)
        until(lambda: watcher.state == "STARTED", what="a job that sleeps")
        redis.freeze()
        try:
            finished |= run()
            assert watcher.state == "STARTED", "it slept while the others met the Redis that stands still"
        finally:
            redis.thaw()
        longest_s = watcher.get(timeout=60)
        print(f"longest step {longest_s:.3f} s")
        finished.add(watcher.id)
        until(lambda: records() == dict.fromkeys(finished, 10), timeout_s=90, what="a record of each job")
        failing = [client.send_task(f"{APP}.fail", ("no",), queue=pool).id for _ in range(_JOBS)]
        until(lambda: all(map(sandbox.record, failing)), timeout_s=60, what="a record of each failure")
    assert longest_s < _AT_MOST_HELD_UP_S
    assert {sandbox.record(job_id)["status"] for job_id in failing} == {"error"}  # type: ignore[index]
    assert set(sandbox.posts_by_id().values()) == {1}
    assert len(sandbox.records(AGENT)) == len(finished) + len(failing)
