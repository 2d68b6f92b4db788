from __future__ import annotations

import argparse
import contextlib
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.relay_process import Jobs, start_relay, status
from tests.support.sandbox import Sandbox, start_sandbox
from tests.support.waiting import until
from xpander_celery.errors import JournalError
from xpander_celery.relay.commands import add_parsers
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.schema import FILE
from xpander_celery.relay.status import EXIT_LEFT, is_running

Run = Callable[..., tuple[int, list[Any]]]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with start_sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def config(sandbox: Sandbox, tmp_path: Path) -> RelayConfig:
    sandbox.set_faults()
    sandbox.clear_records()
    sandbox.clear_requests()
    return RelayConfig(tmp_path / "destination", api_key=sandbox.api_key, base_url=sandbox.url, loaded_at=time.time())


@pytest.fixture
def jobs(config: RelayConfig) -> Iterator[Jobs]:
    jobs = Jobs(config.directory)
    yield jobs
    jobs.close()


@pytest.fixture
def run(config: RelayConfig, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; its exit code, and its lines, as JSON where they are."""

    def run(*argv: str) -> tuple[int, list[Any]]:
        parser = argparse.ArgumentParser()
        add_parsers(parser.add_subparsers())
        arguments = parser.parse_args(argv)
        capsys.readouterr()
        code = arguments.run_with_config(arguments, config)
        lines = capsys.readouterr().out.splitlines()
        return code, [json.loads(line) for line in lines] if "--json" in argv else lines

    return run


@pytest.fixture(params=["beside a relay", "alone"])
def dead(request: pytest.FixtureRequest, sandbox: Sandbox, config: RelayConfig, jobs: Jobs) -> Iterator[Sandbox]:
    """Three dead reports, one settled and one running job; the platform is well again."""
    sandbox.set_faults({"status": 422, "id": "a"}, {"status": 422, "id": "b"}, {"status": 400, "id": "c"})
    for job_id in ("a", "b", "c", "fine"):
        jobs.job(job_id)
    jobs.started("runs")
    with start_relay(config) as relay:
        until(lambda: status(config).dead == 3 and sandbox.record("fine"), what="three dead reports")
        sandbox.set_faults()
        if request.param == "alone":
            until(lambda: status(config).counters.get("delivered"), what="the acknowledgement")
            relay.kill()
            relay.wait()
        yield sandbox


def test_dead_reports_are_listed_with_their_reason(run: Run, dead: Sandbox) -> None:
    code, listed = run("journal", "list", "--json")
    assert code == 0
    assert {job["id"]: job["phase"] for job in listed} == dict.fromkeys("abc", "dead")
    assert {job["id"] for job in listed if "HTTP 422" in job["reason"]} == {"a", "b"}
    assert len(run("journal", "list", "--limit", "2")[1]) == 2
    assert "HTTP 422" in "".join(run("journal", "list", "--limit", "0")[1])


def test_other_phases_are_listed_too(run: Run, dead: Sandbox) -> None:
    assert [job["id"] for job in run("journal", "list", "--phase", "settled", "--json")[1]] == ["fine"]
    assert [job["id"] for job in run("journal", "list", "--phase", "running", "--json")[1]] == ["runs"]
    assert run("journal", "list", "--phase", "waiting")[1] == []
    assert run("journal", "list", "--phase", "held", "--json")[1] == []


def test_a_job_is_shown_with_the_report_as_it_would_be_sent(run: Run, dead: Sandbox) -> None:
    _, (shown,) = run("journal", "show", "a", "--json")
    assert shown["report"]["id"] == "a"
    assert shown["report"]["result"] == "done"
    assert shown["phase"] == "dead"
    text = "\n".join(run("journal", "show", "a")[1])
    assert "HTTP 422" in text
    assert '"result": "done"' in text
    _, (running,) = run("journal", "show", "runs", "--json")
    assert running["report"] is None
    with pytest.raises(JournalError, match="nothing is known"):
        run("journal", "show", "nobody")


def test_one_dead_report_is_requeued_by_its_id(run: Run, dead: Sandbox) -> None:
    assert run("journal", "requeue", "a", "--json") == (0, [{"requeued": 1}])
    assert run("journal", "drain")[0] == 0
    assert dead.record("a") is not None
    assert dead.record("b") is None
    with pytest.raises(JournalError, match="not among the dead"):
        run("journal", "requeue", "fine")


def test_dead_reports_are_requeued_by_reason_or_all(run: Run, dead: Sandbox) -> None:
    assert run("journal", "requeue", "--reason", "HTTP 422", "--json")[1] == [{"requeued": 2}]
    assert run("journal", "drain", "--json")[1][0]["drained"]
    assert dead.record("a") is not None
    assert dead.record("c") is None
    assert run("journal", "requeue", "--all", "--json")[1] == [{"requeued": 1}]
    assert run("journal", "drain")[0] == 0
    assert dead.record("c") is not None


def test_what_dies_again_at_once_is_requeued_once(run: Run, dead: Sandbox) -> None:
    dead.set_faults({"status": 422})
    assert run("journal", "requeue", "--all", "--json")[1] == [{"requeued": 3}]


def test_dead_reports_are_purged(run: Run, dead: Sandbox) -> None:
    assert run("journal", "purge", "a", "--json")[1] == [{"purged": 1}]
    assert run("journal", "purge", "--reason", "HTTP 400", "--json")[1] == [{"purged": 1}]
    assert [job["id"] for job in run("journal", "list", "--json")[1]] == ["b"]
    assert run("journal", "purge", "--all")[1] == ["1 purged"]
    assert run("journal", "list")[1] == []


def test_draining_says_when_something_is_left(run: Run, sandbox: Sandbox, config: RelayConfig, jobs: Jobs) -> None:
    sandbox.set_faults({"status": 503})
    jobs.job("a")
    code, (said,) = run("journal", "drain", "--timeout", "5", "--json")  # a relay has to start within that
    assert code == EXIT_LEFT
    assert (said["drained"], said["waiting"]) == (False, 1)
    assert "Not everything" in run("journal", "drain", "--timeout", "1")[1][0]


def test_draining_nothing_is_done_at_once(run: Run, config: RelayConfig) -> None:
    assert run("journal", "drain", "--timeout", "1") == (0, ["Everything is delivered."])


def test_where_nothing_was_recorded_that_is_said(run: Run) -> None:
    with pytest.raises(JournalError, match="nothing was recorded"):
        run("journal", "list")


def test_the_check_says_how_the_relay_stands(run: Run, sandbox: Sandbox, config: RelayConfig, jobs: Jobs) -> None:
    assert run("relay", "--check")[0] == 1
    with start_relay(config):
        jobs.job("a")
        until(lambda: status(config).counters.get("delivered"), what="a delivery")
        code, lines = run("relay", "--check")
        assert code == 0
        assert "runs" in lines[0]
        assert "delivered 1" in lines[-1]
        code, (said,) = run("relay", "--check", "--json")
        assert (code, said["well"], said["counters"]["appended"], said["waiting"]) == (0, True, 2, 0)
        assert said["counters"]["dropped"] == said["counters"]["died"] == said["counters"]["retried"] == 0
    until(lambda: not is_running(config.directory), what="the end of the relay")
    code, lines = run("relay", "--check")
    assert code == 1
    assert "does not run" in lines[0]


def test_the_check_says_why_delivery_is_paused(run: Run, sandbox: Sandbox, config: RelayConfig, jobs: Jobs) -> None:
    sandbox.set_faults({"status": 401})
    with start_relay(config):
        jobs.job("a")
        until(lambda: status(config).flow == "paused", what="a pause")
        assert any("XPANDER_API_KEY" in line for line in run("relay", "--check")[1])


def test_what_scripts_count_is_all_there(run: Run, sandbox: Sandbox, config: RelayConfig, jobs: Jobs) -> None:
    sandbox.set_faults(
        {"status": 503, "id": "late", "count": 1}, {"status": 422, "id": "bad"}, {"status": 401, "id": "x"}
    )
    with start_relay(config):
        for job_id in ("good", "late", "bad"):
            jobs.job(job_id)
        until(lambda: status(config).counters.get("delivered") == 2 and status(config).dead == 1, what="three ends")
        jobs.job("x")
        until(lambda: status(config).flow == "paused" and status(config).oldest_waiting_s > 1, what="a pause")
        _, (said,) = run("relay", "--check", "--json")
    counters = said["counters"]
    assert {name: counters[name] for name in ("appended", "delivered", "died", "dropped")} == {
        "appended": 8, "delivered": 2, "died": 1, "dropped": 0,
    }  # fmt: skip
    assert counters["retried"] >= 2
    assert (said["waiting"], said["dead"], said["flow"]) == (1, 1, "paused")
    assert 1 < said["oldest_waiting_s"] < 60
    assert "XPANDER_API_KEY" in said["reason"]


def test_an_index_of_a_later_release_is_left_alone_by_commands_too(run: Run, config: RelayConfig, jobs: Jobs) -> None:
    path = config.directory / FILE
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
        database.commit()
    before = path.read_bytes()
    for command in (("list",), ("show", "a"), ("requeue", "--all"), ("purge", "--all")):
        with pytest.raises(JournalError, match="a later release of xpander-celery wrote"):
            run("journal", *command)
    assert path.read_bytes() == before
    assert not is_running(config.directory)


@pytest.mark.parametrize("options", [["--once"], []])
def test_the_relay_runs_in_the_foreground(
    sandbox: Sandbox, config: RelayConfig, jobs: Jobs, options: list[str]
) -> None:
    program = (
        "import argparse, os, sys; from xpander_celery.relay.commands import add_parsers;"
        "from xpander_celery.relay.config import RelayConfig; parser = argparse.ArgumentParser();"
        "add_parsers(parser.add_subparsers()); arguments = parser.parse_args(sys.argv[1:]);"
        "sys.exit(arguments.run_with_config(arguments, RelayConfig.from_environ(os.environ)))"
    )
    jobs.job("a")
    command = [sys.executable, "-c", program, "relay", *options]
    with subprocess.Popen(command, env=config.to_environ(), stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: sandbox.record("a"), what="the report")
            if options:
                assert process.wait(20) == 0
            else:
                jobs.close()
                assert process.poll() is None  # it stays without workers
                process.terminate()
                assert process.wait(20) == 0
        finally:
            process.kill()


def test_nobody_may_requeue_without_saying_which(run: Run) -> None:
    with pytest.raises(SystemExit):
        run("journal", "requeue")


def test_a_bar_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from xpander_celery.relay.commands import _Progress

    with _Progress(4) as progress:
        progress.show(2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with _Progress(4) as progress:
        progress.show(2)
    assert "50%  2/4" in capsys.readouterr().err
