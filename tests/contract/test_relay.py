"""The relay delivers through the official client where its back-end is named."""

from __future__ import annotations

from pathlib import Path

from celery import Celery

from tests.support.broker import start_redis
from tests.support.sandbox import Sandbox
from tests.support.waiting import until
from tests.support.worker import start_worker


def test_jobs_reach_history_through_the_official_backend(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.clear_requests()
    with (
        start_redis() as broker,
        start_worker(
            broker,
            tmp_path,
            "--concurrency=1",
            TEST_RELAY="auto",
            XPANDER_API_KEY=sandbox.api_key,
            XPANDER_BASE_URL=sandbox.url,
            XPANDER_AGENT_ID="agent-relayed",
            XPANDER_CELERY_BACKEND="tests.contract.official_backend:make",
        ),
        Celery("client", broker=broker.url, backend=broker.backend) as client,
    ):
        sent = client.send_task("tests.support.jobs.add", [2, 3])
        record = until(lambda: sandbox.record(sent.id), timeout_s=60, what="the job's record")
    assert (record["agent_id"], record["status"], record["result"]) == ("agent-relayed", "completed", "5")
    [delivery] = [request for request in sandbox.requests() if request["path"].endswith("/report_task")]
    assert delivery["headers"]["user-agent"].startswith("python-httpx/")
