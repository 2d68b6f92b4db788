"""The demo as its users run it: real worker, real broker, and nothing left behind however it ends."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.sandbox import start_sandbox

_DEMO = [sys.executable, "-m", "xpander_celery.cli", "demo"]
_ENDS_WITHIN_S = 100
_KEYS = ["id", "task", "status", "is_success", "duration", "tokens", "used_tools", "input", "result"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """An environment whose settings would break the demo if they reached its processes."""
    return {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "HOME": str(tmp_path / "home"),
        "XPANDER_API_KEY": "key-of-the-user",
        "XPANDER_BASE_URL": "not a url",
        "XPANDER_CELERY_CONCURRENCY": "not a number",
        "OTEL_SDK_DISABLED": "true",
        "HTTP_PROXY": "http://127.0.0.1:1",
        "ALL_PROXY": "http://127.0.0.1:1",
    }


def commands_of(tmp_path: Path) -> list[list[str]]:
    """The command of every process that was started with this test's temporary directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(tmp_path) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
        except psutil.Error:  # it ended by now
            continue
    return found


def wait_until_gone(tmp_path: Path) -> None:
    deadline = time.monotonic() + 30
    while left := commands_of(tmp_path):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_it_shows_every_kind_of_job_as_it_ended(tmp_path: Path, environ: dict[str, str]) -> None:
    done = subprocess.run(
        [*_DEMO, "--once", "--json"], capture_output=True, text=True, timeout=_ENDS_WITHIN_S, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    records: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(list(record) == _KEYS for record in records)
    by_task = {record["task"].removeprefix("demo."): record for record in records}
    assert len(records) == len({record["id"] for record in records}) == 10
    assert {name for name, record in by_task.items() if not record["is_success"]} == {
        "charge",
        "export",
        "convert_video",
    }
    assert by_task["greet"]["result"] == "Hello, Ada!"
    assert json.loads(by_task["quote"]["result"]) == {"items": 3, "net": 37.4, "gross": 44.51}
    assert by_task["charge"]["result"].startswith("ValueError: the bank declined 99.50")
    assert "4242" not in by_task["charge"]["input"]
    assert by_task["notify"]["result"] == "told ann@example.org"
    assert by_task["export"]["result"] == "TimeLimitExceeded(1)"
    assert "WorkerLostError" in by_task["convert_video"]["result"]
    assert [record["result"] for record in records if record["task"] == "demo.resize"] == [
        f"cover.png at {width} px" for width in (320, 768, 1440)
    ]
    assert sorted(by_task["ask_agent"]["used_tools"]) == ["convert", "exchange_rate"]
    assert by_task["ask_agent"]["tokens"]["prompt_tokens"] > by_task["ask_agent"]["tokens"]["cache_read_tokens"] > 0
    wait_until_gone(tmp_path)
    assert list(tmp_path.iterdir()) == []


def start(environ: dict[str, str], *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*_DEMO, "--once", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    )


def wait_for_jobs(tmp_path: Path, demo: "subprocess.Popen[str]") -> None:
    """Until the worker has taken a job, so that every process of the demo is there."""
    deadline = time.monotonic() + 60
    while not any("received" in log.read_text(errors="replace") for log in tmp_path.glob("*/worker.log")):
        assert demo.poll() is None, demo.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_a_demo_that_is_ended(tmp_path: Path, environ: dict[str, str], ending: signal.Signals) -> None:
    demo = start(environ)
    with demo:
        wait_for_jobs(tmp_path, demo)
        commands = " ".join(word for command in commands_of(tmp_path) for word in command)
        assert all(word in commands for word in ("xpander_celery.sandbox", "xpander_celery.demo.jobs", "--port"))
        demo.send_signal(ending)
        demo.wait(30)
        # -2 where an import was interrupted within exec(), as of a dataclass: CPython ends a `python -m` so by itself
        assert demo.returncode in {signal.SIGKILL: (-signal.SIGKILL,)}.get(ending, (130, -signal.SIGINT))
        wait_until_gone(tmp_path)
        assert list(tmp_path.glob("xpander-demo-*")) == []


def test_in_a_terminal_the_history_stays_until_ctrl_c(tmp_path: Path, environ: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    demo = subprocess.Popen(_DEMO, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, start_new_session=True)
    os.close(theirs)
    said = read_until(ours, "until you press Ctrl-C")
    url = said.partition("History page: ")[2].split()[0]
    assert "demo.ask_agent" in httpx.get(url, trust_env=False).text
    assert demo.poll() is None
    demo.send_signal(signal.SIGINT)
    assert demo.wait(30) == 0
    os.close(ours)
    wait_until_gone(tmp_path)


def read_until(terminal: int, word: str) -> str:
    said = ""
    deadline = time.monotonic() + _ENDS_WITHIN_S
    while word not in said:
        ready, _, _ = select.select([terminal], [], [], deadline - time.monotonic())
        assert ready, said
        said += os.read(terminal, 4096).decode(errors="replace")
    return said


def test_a_broker_that_does_not_answer_is_said_in_one_line(environ: dict[str, str]) -> None:
    done = subprocess.run(
        [*_DEMO, "--once", "--broker", "redis://127.0.0.1:1/0"],
        capture_output=True,
        text=True,
        timeout=_ENDS_WITHIN_S,
        env=environ,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("demo: The broker does not answer")
    assert len(done.stderr.splitlines()) == 1


def test_live_the_agent_calls_the_model_of_the_users_environment(environ: dict[str, str]) -> None:
    with start_sandbox() as model:
        environ |= {"OPENAI_API_KEY": "key-of-the-user", "OPENAI_BASE_URL": f"{model.url}/v1"}
        done = subprocess.run(
            [*_DEMO, "--once", "--json", "--live"],
            capture_output=True,
            text=True,
            timeout=_ENDS_WITHIN_S,
            env=environ,
            check=False,
        )
        served = model.served_usage()["total"]
    assert done.returncode == 0, done.stderr
    [agent] = [record for record in map(json.loads, done.stdout.splitlines()) if record["task"] == "demo.ask_agent"]
    assert {name: agent["tokens"][name] for name in served} == served
    assert served["prompt_tokens"] > 0


def test_live_without_a_key_is_said_in_one_line(environ: dict[str, str]) -> None:
    environ.pop("OPENAI_API_KEY", None)
    done = subprocess.run(
        [*_DEMO, "--live"], capture_output=True, text=True, timeout=_ENDS_WITHIN_S, env=environ, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "demo: --live needs OPENAI_API_KEY\n")
