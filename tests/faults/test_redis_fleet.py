"""Relays and workers on machines of their own, one Redis between them, and what of that is killed or frozen."""

from __future__ import annotations

import bisect
import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import Celery

from tests.support.broker import Broker
from tests.support.redis_server import RedisServer
from tests.support.relay_process import AGENT, Jobs, start_relay
from tests.support.sandbox import Sandbox
from tests.support.waiting import until
from tests.support.worker import APP, start_worker
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.redis.keys import Keys
from xpander_celery.journal.redis.writer import RedisJournal
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.journals import ask
from xpander_celery.relay.status import EXIT_TAKEN, Status

DESTINATION = "destination"
_TAKES_OVER_WITHIN_S = 30.0


@pytest.fixture
def relay_on(sandbox: Sandbox, redis: RedisServer, tmp_path: Path) -> Callable[..., RelayConfig]:
    """The configuration of the relay of one machine."""

    def config(machine: str, **settings: Any) -> RelayConfig:
        directory = tmp_path / machine / DESTINATION
        platform = {"api_key": sandbox.api_key, "base_url": sandbox.url, "loaded_at": time.time()}
        return RelayConfig(directory, journal=redis.url, **platform, **settings)

    return config


@pytest.fixture
def jobs(redis: RedisServer, tmp_path: Path) -> Iterator[Jobs]:
    directory = tmp_path / "worker" / DESTINATION
    jobs = Jobs(directory, RedisJournal(redis.url, DESTINATION, spill=FileJournal(directory)))
    yield jobs
    jobs.close()


def leads(config: RelayConfig) -> bool:
    status = Status.read(config.directory)
    return status is not None and status.leads


def stands_by(config: RelayConfig) -> bool:
    status = Status.read(config.directory)
    return status is not None and bool(status.leader)


def ids(sandbox: Sandbox) -> set[str]:
    return {record["id"] for record in sandbox.records(AGENT)}


def is_empty(redis: RedisServer) -> bool:
    return redis.client.ask("XLEN", Keys(DESTINATION).stream) == 0


def test_a_standby_takes_over_within_30_s_and_delivers_what_the_dead_relay_had_on_its_disk(
    sandbox: Sandbox, redis: RedisServer, relay_on: Callable[..., RelayConfig], jobs: Jobs
) -> None:
    first, second = relay_on("first"), relay_on("second")
    first.directory.mkdir(parents=True)
    second.directory.mkdir(parents=True)
    with start_relay(first, "--stay") as active:
        until(lambda: leads(first), what="a relay that leads")
        with start_relay(second, "--stay"):
            until(lambda: stands_by(second), what="a relay that stands by")
            delivered = [f"delivered-{number}" for number in range(50)]
            for job_id in delivered:
                jobs.job(job_id)
            until(lambda: ids(sandbox) == set(delivered) and is_empty(redis), what="fifty records")
            sandbox.set_faults({"status": 503})
            waiting = [f"waits-{number}" for number in range(50)]
            for job_id in waiting:
                jobs.job(job_id)
            jobs.started("runs")
            until(lambda: (status := Status.read(first.directory)) and status.waiting == 50, what="fifty that wait")
            active.kill()
            active.wait()
            killed_at = time.monotonic()
            shutil.rmtree(first.directory)
            sandbox.set_faults()
            until(lambda: leads(second), timeout_s=_TAKES_OVER_WITHIN_S, what="the standby at work")
            took_s = time.monotonic() - killed_at
            jobs.finished("runs")
            until(lambda: ids(sandbox) == {*delivered, *waiting, "runs"}, what="a record of every job")
            until(lambda: is_empty(redis), what="an empty stream")
    assert took_s < _TAKES_OVER_WITHIN_S
    print(f"took over after {took_s:.1f} s")
    assert {sandbox.posts_by_id()[job_id] for job_id in delivered} == {1}


def test_a_relay_that_was_frozen_sends_nothing_once_another_one_leads(
    sandbox: Sandbox, redis: RedisServer, relay_on: Callable[..., RelayConfig], jobs: Jobs
) -> None:
    first, second = relay_on("first"), relay_on("second")
    first.directory.mkdir(parents=True)
    second.directory.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        frozen = stack.enter_context(start_relay(first, "--stay"))
        until(lambda: leads(first), what="a relay that leads")
        stack.enter_context(start_relay(second, "--stay"))
        until(lambda: stands_by(second), what="a relay that stands by")
        frozen.send_signal(signal.SIGSTOP)
        expected = [f"job-{number}" for number in range(100)]
        for job_id in expected:
            jobs.job(job_id)
        until(lambda: ids(sandbox) == set(expected), timeout_s=_TAKES_OVER_WITHIN_S + 10, what="a hundred records")
        frozen.send_signal(signal.SIGCONT)
        until(lambda: stands_by(first), what="the frozen relay standing by")
        jobs.job("later")
        until(lambda: "later" in ids(sandbox) and is_empty(redis), what="one more record")
        assert leads(second)
    assert set(sandbox.posts_by_id().values()) == {1}


@pytest.mark.timeout(300)
def test_no_minute_sees_more_than_600_reports_over_takeovers_of_each_kind(
    sandbox: Sandbox, relay_on: Callable[..., RelayConfig], jobs: Jobs
) -> None:
    """Killed, then ended in order, so that the last one begins at once; measured where the reports arrive."""
    machines = [relay_on(name, rate_limit_per_minute=600) for name in ("first", "second", "third")]
    for number in range(1500):
        jobs.job(f"job-{number}")
    with contextlib.ExitStack() as stack:
        relays = []
        for config in machines:
            config.directory.mkdir(parents=True)
            relays.append(stack.enter_context(start_relay(config, "--stay")))
        began = time.monotonic()
        for end in (signal.SIGKILL, signal.SIGTERM):
            place = until(lambda: [n for n, each in enumerate(machines) if leads(each)], timeout_s=40, what="a leader")[
                0
            ]
            before = sum(sandbox.posts_by_id().values())
            until(lambda before=before: sum(sandbox.posts_by_id().values()) >= before + 150, what="150 reports")
            relays[place].send_signal(end)
            relays[place].wait()
            (machines[place].directory / "relay.json").unlink()
        until(lambda: time.monotonic() - began > 80, timeout_s=90, what="80 s")
        times = sorted(each["at"] for each in sandbox.requests() if each["method"] == "POST")
    assert len(times) > 550
    most = max(bisect.bisect_left(times, first + 60) - place for place, first in enumerate(times))
    print(f"{len(times)} reports, at most {most} in a minute")
    assert most <= 600


def test_to_run_once_beside_a_relay_that_leads_says_that_it_does(
    sandbox: Sandbox, relay_on: Callable[..., RelayConfig], jobs: Jobs
) -> None:
    first, second = relay_on("first"), relay_on("second")
    first.directory.mkdir(parents=True)
    second.directory.mkdir(parents=True)
    with start_relay(first, "--stay"):
        until(lambda: leads(first), what="a relay that leads")
        with start_relay(second, "--once") as once:
            assert once.wait(60) == EXIT_TAKEN


def test_a_job_that_is_delivered_again_to_another_machine_is_one_record_with_both_attempts(
    broker: Broker, redis: RedisServer, sandbox: Sandbox, tmp_path: Path
) -> None:
    """The first machine goes away in the middle of it; no message tells the second what was spent there."""
    environ = {
        "XPANDER_BASE_URL": sandbox.url,
        "XPANDER_API_KEY": sandbox.api_key,
        "XPANDER_CELERY_JOURNAL": redis.url,
        "TEST_RELAY": "auto",
    }
    options = ("--concurrency=1", "--queues=lately")
    with start_worker(broker, tmp_path / "one", *options, **environ) as first:
        with Celery("client", broker=broker.url, set_as_current=False) as client:
            job_id = client.send_task(f"{APP}.sleep_late", (600,), ignore_result=True, queue="lately").id
        (state,) = until(lambda: list((tmp_path / "one").rglob("relay.json")), what="the first relay")
        config = RelayConfig(state.parent, journal=redis.url)

        def spent() -> bool:
            answer = ask(config, "show", timeout_s=5, job_id=job_id)
            return answer is not None and "prompt_tokens" in str(answer)

        until(spent, what="what the first attempt has spent")
        main = psutil.Process(first.pid)
        for process in (*main.children(recursive=True), main):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        with start_worker(broker, tmp_path / "two", *options, **environ, TEST_SHORT="1"):
            record = until(lambda: sandbox.record(job_id), timeout_s=60, what="the record")
    assert record["result"] == "slept"
    assert record["tokens"]["prompt_tokens"] == 2 * 10
    assert sandbox.posts_by_id()[job_id] == 1
