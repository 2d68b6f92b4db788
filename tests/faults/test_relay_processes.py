"""Relays and workers that are really killed. The numbers are those of the table of faults."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.relay_process import AGENT, Jobs, counter, said, start_relay, status
from tests.support.sandbox import Sandbox, start_sandbox
from tests.support.waiting import until
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.launch import Launcher
from xpander_celery.relay.mailbox import tell
from xpander_celery.relay.schema import FILE
from xpander_celery.relay.status import EXIT_LEFT, EXIT_TAKEN, EXIT_UNUSABLE, RelayLock, is_running

_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with start_sandbox() as sandbox:
        yield sandbox


@pytest.fixture(autouse=True)
def _clean(sandbox: Sandbox) -> None:
    sandbox.set_faults()
    sandbox.clear_requests()
    sandbox.clear_records()


@pytest.fixture
def config(sandbox: Sandbox, tmp_path: Path) -> RelayConfig:
    return RelayConfig(tmp_path / "destination", api_key=sandbox.api_key, base_url=sandbox.url, loaded_at=time.time())


@pytest.fixture
def jobs(config: RelayConfig) -> Iterator[Jobs]:
    jobs = Jobs(config.directory)
    yield jobs
    jobs.close()


def with_settings(config: RelayConfig, **settings: object) -> RelayConfig:
    from dataclasses import replace

    return replace(config, search_path=(str(_ROOT),), **settings)  # type: ignore[arg-type]


def until_drained(config: RelayConfig) -> None:
    until(lambda: Launcher(config).flush(10.0, foreground=False), timeout_s=60, what="everything delivered")


@pytest.mark.fault(3)
def test_3_a_killed_worker_leaves_lost_jobs_that_the_next_relay_closes(
    sandbox: Sandbox, config: RelayConfig, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    command = [sys.executable, "-m", "tests.support.relay_process", "worker", str(config.directory), str(ledger), "3"]
    with subprocess.Popen(command, cwd=_ROOT) as worker:
        try:
            lines = until(lambda: (text := _read(ledger)).count("\n") == 3 and text, what="three started jobs")
        finally:
            worker.kill()
            for line in _read(ledger).splitlines():
                os.kill(int(line.split()[1]), signal.SIGKILL)
    began = time.monotonic()
    with start_relay(config) as relay:
        assert relay.wait(60) == 0  # it lingers for those jobs, and then for nothing
    assert time.monotonic() - began > 10
    records = {record["id"]: record for record in sandbox.records(AGENT)}
    assert set(records) == {line.split()[0] for line in lines.splitlines()}
    assert all("WorkerLostError" in record["result"] for record in records.values())
    assert set(sandbox.posts_by_id().values()) == {1}
    assert list(config.directory.glob("*-0*")) == []


@pytest.mark.fault(4)
def test_4_killed_between_the_answer_and_the_acknowledgement_it_sends_twice_and_leaves_one_record(
    sandbox: Sandbox, config: RelayConfig, jobs: Jobs
) -> None:
    config = with_settings(config, backend="tests.support.relay_process:DiesAfterSending", concurrency=1)
    jobs.job("a")
    with start_relay(config) as relay:
        assert relay.wait(30) == -signal.SIGKILL
    with start_relay(config):
        until_drained(config)
    assert sandbox.posts_by_id() == {"a": 2}
    assert [record["id"] for record in sandbox.records(AGENT)] == ["a"]


@pytest.mark.fault(5)
def test_5_killed_between_commit_and_unlink_it_reads_again_and_leaves_one_record(
    sandbox: Sandbox, config: RelayConfig
) -> None:
    jobs = Jobs(config.directory)
    ids = {f"job-{number}" for number in range(50)}
    for job_id in ids:
        jobs.job(job_id)
    jobs.close()  # the segment is finished
    with start_relay(config, role="die-before-settling") as relay:
        assert relay.wait(30) == -signal.SIGKILL
    assert len(list(config.directory.glob("*-0*"))) == 1
    with start_relay(config) as relay:
        assert relay.wait(30) == 0
    assert {record["id"] for record in sandbox.records(AGENT)} == ids
    assert set(sandbox.posts_by_id().values()) == {1}
    assert counter(config, "appended") == 100
    assert list(config.directory.glob("*-0*")) == []


@pytest.mark.fault(6)
def test_6_of_two_relays_one_holds_the_lock_and_the_other_ends_well(config: RelayConfig, jobs: Jobs) -> None:
    with start_relay(config) as first:
        with start_relay(config, ready=False) as second:
            assert second.wait(20) == 0
        with start_relay(config, "--once", ready=False) as third:
            assert third.wait(20) == EXIT_TAKEN
        assert first.poll() is None


@pytest.mark.parametrize(
    "settings",
    [
        {"before_send": "tests.support.relay_process:die_of_poison"},
        {"backend": "tests.support.relay_process:DiesOfPoisonousAnswers"},
    ],
    ids=["before it is sent", "with its answer"],
)
@pytest.mark.fault(21)
def test_21_a_report_that_kills_the_relay_is_dead_after_three_deaths_and_the_rest_flow(
    sandbox: Sandbox, config: RelayConfig, jobs: Jobs, settings: dict[str, str]
) -> None:
    config = with_settings(config, **settings)
    ids = [f"job-{number}" for number in range(100)]
    for job_id in ids[:50]:
        jobs.job(job_id)
    jobs.job("poison")
    for job_id in ids[50:]:
        jobs.job(job_id)
    codes = []
    for _ in range(6):
        with start_relay(config) as relay:
            until(lambda: relay.poll() is not None or status(config).dead == 1, timeout_s=60, what="death or its end")
            codes.append(relay.poll())
            if relay.poll() is None:
                until_drained(config)
                break
    assert codes == [-signal.SIGKILL] * 3 + [None]
    assert {record["id"] for record in sandbox.records(AGENT)} - {"poison"} == set(ids)


@pytest.mark.fault(21)
def test_21_a_report_that_is_on_its_way_whenever_the_relay_is_killed_is_not_its_cause(
    sandbox: Sandbox, config: RelayConfig, jobs: Jobs
) -> None:
    sandbox.set_faults({"drop": "hang", "method": "POST"})
    ids = {f"job-{number}" for number in range(3)}
    for job_id in ids:
        jobs.job(job_id)
    for _ in range(6):
        sandbox.clear_requests()
        with start_relay(config) as relay:
            until(lambda: set(sandbox.posts_by_id()) == ids, what="all of them on their way")
            relay.kill()
    sandbox.set_faults()
    with start_relay(config):
        until_drained(config)
    assert {record["id"] for record in sandbox.records(AGENT)} == ids
    assert (counter(config, "crashes"), status(config).dead) == (0, 0)


@pytest.mark.fault(21)
def test_21_nor_are_reports_the_cause_of_kills_at_random(sandbox: Sandbox, config: RelayConfig, jobs: Jobs) -> None:
    chance = random.Random(21)
    sandbox.set_faults({"delay_s": 0.05, "method": "POST"})
    ids = {f"job-{number}" for number in range(2500)}
    for job_id in ids:
        jobs.job(job_id)
    for _ in range(15):
        with start_relay(config) as relay:
            delivered = len(sandbox.posts_by_id())
            until(lambda: len(sandbox.posts_by_id()) > delivered, what="a relay at work")  # noqa: B023
            time.sleep(chance.random() / 2)
            relay.kill()
    sandbox.set_faults()
    with start_relay(config):
        until_drained(config)
    assert {record["id"] for record in sandbox.records(AGENT)} == ids
    assert status(config).dead == 0


@pytest.mark.fault(28)
def test_28_a_damaged_index_is_put_aside_and_what_was_not_read_is_delivered(
    sandbox: Sandbox, config: RelayConfig, jobs: Jobs
) -> None:
    for number in range(301):
        jobs.job(f"lost-{number}")
    with start_relay(with_settings(config, rate_limit_per_minute=1)):
        until(lambda: status(config).waiting == 300, what="everything but one report waiting")
    path = config.directory / FILE
    until(lambda: not is_running(config.directory), what="the end of the relay")
    for damaged in (path, path.with_name(f"{FILE}-wal")):
        damaged.write_bytes(b"garbage" * 1000)
    ids = {f"job-{number}" for number in range(50)}
    for job_id in ids:
        jobs.job(job_id)
    with start_relay(config):
        until_drained(config)
    assert ids <= {record["id"] for record in sandbox.records(AGENT)}
    assert "300 reports waited" in said(config)
    assert counter(config, "indexes_quarantined") == 1
    (kept,) = config.directory.glob("index.damaged-*.db")
    assert kept.read_bytes().startswith(b"garbage")


@pytest.mark.fault(28)
def test_28_damage_that_shows_while_the_relay_runs_is_survived_by_the_same_process(
    sandbox: Sandbox, config: RelayConfig, jobs: Jobs
) -> None:
    for number in range(2001):
        jobs.job(f"waits-{number}", input="x" * 3000)
    with start_relay(with_settings(config, rate_limit_per_minute=1)):
        until(lambda: status(config).waiting == 2000, what="everything but one report waiting")
    path = config.directory / FILE
    content = path.read_bytes()
    middle = len(content) // 4
    with path.open("r+b") as file:
        file.seek(middle)
        file.write(os.urandom(len(content) // 2))
    jobs.job("new")
    with start_relay(config) as relay:
        until_drained(config)
        assert relay.poll() is None
    assert "new" in {record["id"] for record in sandbox.records(AGENT)}
    assert counter(config, "indexes_quarantined") == 1


@pytest.mark.fault(29)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the names of open files are read from /proc")
def test_29_what_is_appended_is_safe_from_a_power_cut_half_a_second_later(
    sandbox: Sandbox, config: RelayConfig, jobs: Jobs
) -> None:
    """A relay at work under load: the sync is a part of its loop, so whatever else that does must not hold it up."""
    sandbox.set_faults({"delay_s": 0.02, "method": "POST"})
    written: list[tuple[float, int]] = []  # when the segment had which size
    with start_relay(config, role="note-syncs") as relay:
        until(lambda: status(config), what="the relay at work")
        segment = until(lambda: jobs.job("first") and next(config.directory.glob("*-0*")), what="a segment")
        for number in range(400):
            jobs.job(f"job-{number}", input="x" * 2000)
            written.append((time.monotonic(), segment.stat().st_size))
            time.sleep(0.005)  # as jobs come in
        syncs = config.directory.parent / "syncs"
        last = written[-1][1]
        until(lambda: any(size >= last for _, size in synced(syncs, segment.name)), what="the last one to be safe")
        assert relay.poll() is None
    done = synced(syncs, segment.name)
    waited = [next(at for at, size in done if size >= wanted) - when for when, wanted in written]
    assert max(waited) <= 0.5, f"{max(waited):.3f} s"


def synced(path: Path, name: str) -> list[tuple[float, int]]:
    """When the segment was safe, and up to where."""
    lines = [line.split() for line in _read(path).splitlines()]
    return [(float(at), int(size)) for at, what, size in lines if what == name]


# Stopping


def test_a_signal_lets_a_worker_that_ends_too_have_its_say(sandbox: Sandbox, config: RelayConfig) -> None:
    jobs = Jobs(config.directory)
    with start_relay(config) as relay:
        until(lambda: status(config), what="the relay at work")
        relay.send_signal(signal.SIGTERM)
        jobs.job("last")
        until(lambda: sandbox.record("last"), what="the last report")
        assert relay.poll() is None
        jobs.close()
        assert relay.wait(20) == 0


def test_a_second_signal_ends_it_though_workers_live_and_loses_nothing(
    sandbox: Sandbox, config: RelayConfig, jobs: Jobs
) -> None:
    sandbox.set_faults({"drop": "hang"})
    with start_relay(config) as relay:
        jobs.job("a")
        until(lambda: sandbox.requests(), what="a request")
        relay.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # both at once would be one
        relay.send_signal(signal.SIGTERM)
        assert relay.wait(10) == 0
    sandbox.set_faults()
    with start_relay(config):
        until_drained(config)
    assert sandbox.record("a") is not None


def test_it_ends_by_itself_when_the_last_worker_is_gone_and_all_is_delivered(
    sandbox: Sandbox, config: RelayConfig
) -> None:
    jobs = Jobs(config.directory)
    with start_relay(config) as relay:
        jobs.job("a")
        jobs.close()
        assert relay.wait(20) == 0
    assert sandbox.record("a") is not None


def test_once_it_delivers_what_is_there_and_says_whether_anything_is_left(
    sandbox: Sandbox, config: RelayConfig, jobs: Jobs
) -> None:
    jobs.job("a")
    with start_relay(config, "--once", ready=False) as relay:
        assert relay.wait(20) == 0
    assert sandbox.record("a") is not None
    sandbox.set_faults({"status": 503})
    jobs.job("b")
    with start_relay(config, "--once", "--for", "1", ready=False) as relay:
        assert relay.wait(20) == EXIT_LEFT


def test_a_relay_with_older_settings_makes_room_for_one_with_a_new_key(
    sandbox: Sandbox, config: RelayConfig, jobs: Jobs
) -> None:
    old = with_settings(config, api_key="revoked", loaded_at=config.loaded_at - 1)
    launcher = Launcher(config)
    with start_relay(old) as relay:
        jobs.job("a")
        until(lambda: status(config).flow == "paused", what="a paused delivery")

        def replaced() -> bool:
            launcher.tick()
            return relay.poll() is not None and is_running(config.directory)

        until(replaced, what="another relay")
        assert relay.poll() == 0
        until(lambda: sandbox.record("a"), timeout_s=90, what="the report, with the new key")
    jobs.close()
    until(lambda: not is_running(config.directory), what="the end of the relay")
    launcher.close()


def test_a_flush_delivers_what_a_stopping_worker_wrote_last(sandbox: Sandbox, config: RelayConfig, jobs: Jobs) -> None:
    with start_relay(config):
        ids = {f"job-{number}" for number in range(200)}
        for job_id in ids:
            jobs.job(job_id)
        assert Launcher(config).flush(20.0)
        assert {record["id"] for record in sandbox.records(AGENT)} == ids
    until(lambda: not is_running(config.directory), what="the end of the relay")
    jobs.job("late")
    assert Launcher(config).flush(20.0)  # by a relay of its own
    assert sandbox.record("late") is not None


# What it is made of


def test_it_loads_neither_celery_nor_telemetry_nor_settings(config: RelayConfig, jobs: Jobs) -> None:
    program = (
        "import sys, os; from xpander_celery.relay.process import main;"
        "code = main(['--once', '--for', '20'], os.environ);"
        "names = ('celery', 'kombu', 'billiard', 'opentelemetry', 'pydantic_settings', 'rich', 'pygments', 'click');"
        "print([name for name in names if name in sys.modules]); sys.exit(code)"
    )
    jobs.job("a")
    environ = {**os.environ, **config.to_environ()}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_key_is_in_no_file_no_log_and_no_argument(sandbox: Sandbox, config: RelayConfig, jobs: Jobs) -> None:
    jobs.job("a")
    with start_relay(config) as relay:
        until_drained(config)
        assert sandbox.api_key not in " ".join(psutil.Process(relay.pid).cmdline())
        for path in config.directory.parent.rglob("*"):
            if path.is_file():
                assert sandbox.api_key.encode() not in path.read_bytes(), path


def test_all_its_files_are_the_owners_alone(config: RelayConfig, jobs: Jobs) -> None:
    before = os.umask(0)
    try:
        with start_relay(config):
            tell(config.directory, "flush", within_s=5)
            jobs.job("a")
            until_drained(config)
    finally:
        os.umask(before)
    for path in [config.directory, *config.directory.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_settings_that_cannot_work_end_it_with_a_clear_word(config: RelayConfig, jobs: Jobs) -> None:
    with start_relay(with_settings(config, backend="no_such_module:backend"), ready=False) as relay:
        assert relay.wait(20) == EXIT_UNUSABLE
    assert "backend: no_such_module:backend cannot be imported" in said(config)


def test_an_index_of_a_later_release_is_left_alone_with_a_clear_word(config: RelayConfig, jobs: Jobs) -> None:
    import sqlite3

    database = sqlite3.connect(config.directory / FILE)
    database.execute("PRAGMA user_version = 99")
    database.commit()
    database.close()
    before = (config.directory / FILE).read_bytes()
    with start_relay(config, ready=False) as relay:
        assert relay.wait(20) == EXIT_UNUSABLE
    assert "a later release" in said(config)
    assert (config.directory / FILE).read_bytes() == before


def test_a_lock_held_by_a_command_keeps_a_relay_out_until_it_is_free(config: RelayConfig, jobs: Jobs) -> None:
    lock = RelayLock.acquire(config.directory)
    assert lock is not None
    with start_relay(config, ready=False) as relay:
        assert relay.wait(20) == 0
    lock.release()
    with start_relay(config) as relay:
        assert relay.poll() is None


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
