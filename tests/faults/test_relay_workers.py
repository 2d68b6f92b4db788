"""Real Celery workers that stop, are killed and are renewed. The numbers are those of the table of faults."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import Celery

from tests.support.broker import Broker
from tests.support.relay_process import start_relay
from tests.support.sandbox import Sandbox
from tests.support.waiting import until
from tests.support.worker import AGENT, APP, Worker, start_worker
from xpander_celery.relay.config import VARIABLE, RelayConfig


@contextmanager
def working(broker: Broker, sandbox: Sandbox, directory: Path, *options: str, **environ: str) -> Iterator[Worker]:
    platform = {"XPANDER_BASE_URL": sandbox.url, "XPANDER_API_KEY": sandbox.api_key}
    with start_worker(broker, directory, *options, **{"TEST_RELAY": "auto", **platform, **environ}) as worker:
        yield worker


def send(broker: Broker, task: str, *arguments: Any, count: int = 1) -> list[str]:
    with Celery("client", broker=broker.url, set_as_current=False) as client:
        return [client.send_task(f"{APP}.{task}", arguments, ignore_result=True).id for _ in range(count)]


@pytest.mark.fault(8)
def test_8_what_a_warm_stop_finds_done_is_delivered_before_the_worker_has_ended(
    broker: Broker, sandbox: Sandbox, tmp_path: Path
) -> None:
    with working(broker, sandbox, tmp_path, "--concurrency=2") as worker:
        ids = send(broker, "add", 1, 2, count=20)
        until(lambda: worker.log.count(" succeeded in ") == 20, what="twenty jobs")
        worker.stop()
        assert {record["id"] for record in sandbox.records(AGENT)} == set(ids)


@pytest.mark.fault(8)
def test_8_or_by_the_next_relay(broker: Broker, sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.set_faults({"status": 503, "method": "POST"})
    with working(broker, sandbox, tmp_path, "--concurrency=1") as worker:
        ids = send(broker, "add", 1, 2, count=5)
        until(lambda: worker.log.count(" succeeded in ") == 5, what="five jobs")
        worker.stop()
    assert sandbox.records(AGENT) == []
    sandbox.set_faults()
    (again := tmp_path / "again").mkdir()
    with working(broker, sandbox, again, "--concurrency=1", XPANDER_CELERY_JOURNAL=str(tmp_path / "journal")):
        until(lambda: len(sandbox.records(AGENT)) == 5, timeout_s=90, what="five records")
    assert {record["id"] for record in sandbox.records(AGENT)} == set(ids)


def seconds_to_end_cold(worker: Worker) -> float:
    began = time.monotonic()
    worker.signal(signal.SIGQUIT)
    until(lambda: not worker.process.is_running, timeout_s=60, what="the worker's end")
    return time.monotonic() - began


@pytest.mark.fault(9)
@pytest.mark.parametrize("pool", ["prefork", "solo", "threads"])
def test_9_a_cold_stop_waits_for_nobody_and_the_next_relay_delivers_what_was_done(
    broker: Broker, sandbox: Sandbox, tmp_path: Path, pool: str
) -> None:
    sandbox.set_faults({"drop": "hang", "method": "POST"})  # nothing is delivered while the worker lives, or stops
    least_s = {"without us": float("inf"), "with us": float("inf")}
    ids: list[str] = []
    for number in range(4):  # other work of the machine only ever adds to what a stop takes
        for name, instrument in (("without us", "never"), ("with us", "always")):
            journal = {"XPANDER_CELERY_JOURNAL": str(tmp_path / "journal"), "TEST_INSTRUMENT": instrument}
            place, options = tmp_path / f"{name} {number}", (f"--pool={pool}", "--concurrency=2")
            with working(broker, sandbox, place, *options, **journal) as worker:
                sent = send(broker, "add", 1, 2, count=10)
                until(lambda: worker.log.count(" succeeded in ") == 10, what="ten jobs")
                least_s[name] = min(least_s[name], seconds_to_end_cold(worker))
        ids += sent
        if least_s["with us"] <= least_s["without us"] + 1:
            break
    else:
        pytest.fail(f"a cold stop takes {least_s}")
    sandbox.set_faults()
    sandbox.clear_requests()
    (directory,) = (path for path in (tmp_path / "journal").iterdir() if path.is_dir())
    config = RelayConfig(directory, api_key=sandbox.api_key, base_url=sandbox.url)
    with start_relay(config, "--once", ready=False) as relay:
        assert relay.wait(90) == 0
    assert {record["id"] for record in sandbox.records(AGENT)} == set(ids)


@pytest.mark.fault(10)
def test_10_a_job_that_overruns_its_hard_limit_leaves_one_record_that_says_so(
    broker: Broker, sandbox: Sandbox, tmp_path: Path
) -> None:
    with working(broker, sandbox, tmp_path, "--concurrency=2"):
        ids = send(broker, "overrun", count=3)
        (after,) = send(broker, "add", 1, 2)
        for job_id in ids:
            record = until(lambda: sandbox.record(job_id), timeout_s=60, what="the record")  # noqa: B023
            assert (record["status"] != "completed", record["result"]) == (True, "TimeLimitExceeded(1)")
            assert record["tokens"]["prompt_tokens"] == 10
        until(lambda: sandbox.record(after), what="the record of a job after them")
    assert sandbox.posts_by_id() == dict.fromkeys([*ids, after], 1)


@pytest.mark.fault(11)
def test_11_a_child_that_the_kernel_kills_leaves_one_lost_record_with_what_it_spent(
    broker: Broker, sandbox: Sandbox, tmp_path: Path
) -> None:
    with working(broker, sandbox, tmp_path, "--concurrency=1"):
        (job_id,) = send(broker, "die")
        record = until(lambda: sandbox.record(job_id), timeout_s=60, what="the record")
        assert record["status"] != "completed"
        assert "WorkerLostError" in record["result"]
        assert record["tokens"]["prompt_tokens"] == 10
        (after,) = send(broker, "add", 1, 2)
        until(lambda: sandbox.record(after), what="the record of a job after it")
    assert sandbox.posts_by_id() == {job_id: 1, after: 1}


CHILDREN = int(os.environ.get("XPANDER_TEST_CHILDREN", "300"))  # two thousand take about ten minutes


@pytest.mark.timeout(1800)
@pytest.mark.fault(12)
def test_12_each_of_many_children_leaves_a_record_and_no_descriptor(
    broker: Broker, sandbox: Sandbox, tmp_path: Path
) -> None:
    with working(broker, sandbox, tmp_path, "--concurrency=2", "--max-tasks-per-child=1") as worker:
        first = send(broker, "add", 1, 2, count=100)
        until(lambda: len(sandbox.posts_by_id()) == 100, timeout_s=120, what="the first hundred")
        (relay,) = relays_of(tmp_path)
        before = {process.pid: process.num_fds() for process in (psutil.Process(worker.pid), relay)}
        ids = first + send(broker, "add", 1, 2, count=CHILDREN - 100)
        until(lambda: len(sandbox.posts_by_id()) >= CHILDREN, timeout_s=0.8 * CHILDREN, what="a report of each")
        after = {process.pid: process.num_fds() for process in (psutil.Process(worker.pid), relay)}
        assert all(after[pid] <= before[pid] + 8 for pid in before), (before, after)
        # on a slow machine the broker delivers what was prefetched once more, and then a job really runs twice
        runs = Counter(re.findall(r"add\[(\S+)\] succeeded", worker.log))
    assert sorted(record["id"] for record in sandbox.records(AGENT)) == sorted(ids)
    assert {job_id: posts for job_id, posts in sandbox.posts_by_id().items() if posts > runs[job_id]} == {}
    assert len(list((tmp_path / "journal").rglob("*.alive"))) <= 4


def relays_of(directory: Path) -> list[psutil.Process]:
    """The relays that serve the journal in this directory."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "xpander_celery.relay" in (process.info["cmdline"] or []):
            try:
                if str(directory) in process.environ().get(VARIABLE, ""):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
    return [process for process in found if process.pid != os.getpid()]
