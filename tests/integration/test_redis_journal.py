"""Workers on machines of their own with a journal in Redis: one history, one relay that leads, others that stand by."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support import jobs
from tests.support.broker import Broker
from tests.support.redis_server import RedisServer, running_redis
from tests.support.sandbox import Sandbox, start_sandbox
from tests.support.waiting import until
from tests.support.worker import AGENT, Worker, start_worker
from xpander_celery import cli
from xpander_celery.demo.processes import ProcessError
from xpander_celery.relay.status import Status


@dataclass(frozen=True)
class Machine:
    """A worker with a disk of its own."""

    worker: Worker
    directory: Path
    environ: dict[str, str]

    @property
    def status(self) -> Status | None:
        """What the relay of this machine says."""
        return next((Status.read(path.parent) for path in self.directory.rglob("relay.json")), None)


@dataclass(frozen=True)
class Fleet:
    """Two machines; `first` takes jobs from the queue `one`, `second` from the queue `two`."""

    first: Machine
    second: Machine
    sandbox: Sandbox


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("journal"), "--appendonly", "yes", "--requirepass", "hunter2") as server:
        yield server


@pytest.fixture(scope="module")
def fleet(redis_broker: Broker, journal: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    before = jobs.app.conf.broker_url, jobs.app.conf.result_backend
    jobs.app.conf.update(broker_url=redis_broker.url, result_backend=redis_broker.backend)
    with contextlib.ExitStack() as stack:
        sandbox = stack.enter_context(start_sandbox())
        environ = {
            "XPANDER_BASE_URL": sandbox.url,
            "XPANDER_API_KEY": sandbox.api_key,
            "XPANDER_AGENT_ID": AGENT,
            "XPANDER_CELERY_JOURNAL": journal.url,
            "TEST_RELAY": "auto",
        }

        def machine(queue: str) -> Machine:
            directory = tmp_path_factory.mktemp(queue)
            options = ("--concurrency=1", "--queues", queue, f"--hostname={queue}@%h")
            worker = stack.enter_context(start_worker(redis_broker, directory, *options, **environ))
            return Machine(worker, directory, environ)

        yield Fleet(machine("one"), machine("two"), sandbox)
    jobs.app.conf.update(broker_url=before[0], result_backend=before[1])


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`xpander-celery` as on one of the machines; its exit code and what it prints."""

    def run(machine: Machine, *arguments: str) -> tuple[int, str]:
        for name, value in {**machine.environ, "XDG_STATE_HOME": str(machine.directory / "state")}.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        code = cli.main(arguments)
        said = capsys.readouterr()
        assert "hunter2" not in said.out + said.err
        return code, said.out

    return run


def record(fleet: Fleet, job_id: str, timeout_s: float = 60) -> dict[str, Any]:
    """The record of a job, once there is one, of which there was one report."""
    found = until(lambda: fleet.sandbox.record(job_id), timeout_s=timeout_s, what=f"the record of {job_id}")
    assert fleet.sandbox.posts_by_id()[job_id] == 1
    return found


def test_jobs_of_every_machine_are_delivered_by_the_one_relay_that_leads(fleet: Fleet) -> None:
    ids = [jobs.add.apply_async((1, 1), queue=queue).id for queue in ("one", "two") * 5]
    for job_id in ids:
        assert record(fleet, job_id)["status"] == "completed"

    def roles() -> list[bool]:
        return sorted(each.status.leads for each in (fleet.first, fleet.second) if each.status is not None)

    until(lambda: roles() == [False, True], what="one relay that leads and one that stands by")


def test_a_job_that_is_retried_on_another_machine_is_one_record_with_both_attempts(fleet: Fleet) -> None:
    job_id = jobs.retry_elsewhere.apply_async(("two",), queue="one").id
    found = record(fleet, job_id)
    assert found["result"] == "there"
    assert found["tokens"]["prompt_tokens"] == 2 * jobs.SPENT.prompt_tokens
    assert found["llm_response"]["celery"]["worker"].startswith("two@")


def test_a_relay_that_stands_by_is_well_and_any_machine_can_ask_the_one_that_leads(fleet: Fleet, run: Run) -> None:
    fleet.sandbox.set_faults({"status": 422, "method": "POST"})
    job_id = jobs.add.apply_async((2, 2), queue="one").id
    machines = (fleet.first, fleet.second)
    until(lambda: [each for each in machines if each.status and each.status.dead == 1], what="the refusal")
    fleet.sandbox.set_faults()
    for machine in machines:
        code, said = run(machine, "relay", "--check")
        assert code == 0
        assert ("stands by" in said) != ("waiting 0" in said)
        code, said = run(machine, "doctor")
        assert code == 0
        assert "the journal is in Redis at 127.0.0.1" in said
        assert "a relay leads: " in said
        code, said = run(machine, "journal", "list", "--json")
        assert [json.loads(line)["id"] for line in said.splitlines()] == [job_id]
    assert run(fleet.second, "journal", "requeue", job_id, "--json") == (0, '{"requeued": 1}\n')
    assert run(fleet.first, "journal", "drain") == (0, "Everything is delivered.\n")
    assert fleet.sandbox.record(job_id) is not None


def test_the_password_is_in_no_file_no_log_and_no_argument(fleet: Fleet) -> None:
    for machine in (fleet.first, fleet.second):
        for path in machine.directory.rglob("*"):
            assert not path.is_file() or b"hunter2" not in path.read_bytes(), path
    for process in psutil.process_iter(["cmdline"]):
        assert not any("hunter2" in word and "requirepass" not in word for word in _of_ours(process)), process


def _of_ours(process: psutil.Process) -> list[str]:
    command = process.info["cmdline"] or []
    return command if any("xpander_celery" in word for word in command) else []


def test_a_redis_that_drops_events_stops_a_worker_at_its_start(
    redis_broker: Broker, journal: RedisServer, tmp_path: Path
) -> None:
    journal.client.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        with (
            pytest.raises(ProcessError) as refusal,
            start_worker(redis_broker, tmp_path, XPANDER_CELERY_JOURNAL=journal.url),
        ):
            pass
    finally:
        journal.client.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert "This worker stops: Redis at 127.0.0.1" in str(refusal.value)
    assert "maxmemory-policy allkeys-lru" in str(refusal.value)
    assert "hunter2" not in str(refusal.value)
