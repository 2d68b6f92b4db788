"""The sandbox as a process: its command line, its end, and the faults that need a real connection."""

import os
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

REPORT: dict[str, Any] = {
    "id": "job-1",
    "input": None,
    "llm_response": None,
    "tokens": None,
    "is_success": True,
    "result": "done",
    "duration": 0.1,
    "used_tools": [],
}
PATH = "/agent-execution/agent-1/report_task"


def test_sigterm_stops_it_cleanly_even_with_a_request_that_never_ends() -> None:
    with start_sandbox() as sandbox:
        sandbox.set_faults({"path": "/agents/*", "drop": "hang"})
        with pytest.raises(httpx.ReadTimeout):
            sandbox.client.get("/agents/a", timeout=0.2)
        sandbox.process.send_signal(signal.SIGTERM)
        assert sandbox.process.wait(10) == 0


def test_a_file_keeps_the_history_over_a_restart(tmp_path: Path) -> None:
    for expected in (1, 2):
        with start_sandbox("--db", str(tmp_path / "history.db")) as sandbox:
            sandbox.client.post(PATH, json={**REPORT, "id": f"job-{expected}"}).raise_for_status()
            assert len(sandbox.records("agent-1")) == expected


def test_a_lost_reply_is_served_but_not_answered() -> None:
    with start_sandbox() as sandbox:
        sandbox.set_faults({"path": PATH, "drop": "reply", "count": 1})
        with pytest.raises(httpx.RemoteProtocolError):
            sandbox.client.post(PATH, json=REPORT)
        assert sandbox.client.post(PATH, json=REPORT).status_code == 200
        assert [request["status"] for request in sandbox.requests()] == ["dropped", 200]
        assert sandbox.posts_by_id() == {"job-1": 2}
        assert [record["reports"] for record in sandbox.records("agent-1")] == [2]


def test_a_dropped_request_is_not_served() -> None:
    with start_sandbox() as sandbox:
        sandbox.set_faults({"path": PATH, "drop": "request"})
        with pytest.raises(httpx.RemoteProtocolError):
            sandbox.client.post(PATH, json=REPORT)
        assert sandbox.records("agent-1") == []


def test_a_delayed_request_is_served_late_and_others_go_on() -> None:
    with start_sandbox() as sandbox:
        sandbox.set_faults({"id": "slow", "delay_s": 30})
        with pytest.raises(httpx.ReadTimeout):
            sandbox.client.post(PATH, json={**REPORT, "id": "slow"}, timeout=0.3)
        assert sandbox.client.post(PATH, json=REPORT, timeout=5).status_code == 200


_PARENT = """
import sys, time
from tests.support.sandbox import start_sandbox
with start_sandbox() as sandbox:
    print(sandbox.process.pid, flush=True)
    time.sleep(600)
"""


def test_no_sandbox_outlives_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert parent.stdout is not None
    with parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(10)
        assert _ended(child)


def _ended(process: psutil.Process) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_port_that_is_taken_is_said_and_not_waited_for() -> None:
    with start_sandbox() as sandbox:
        command = [sys.executable, "-m", "xpander_celery.sandbox", "--port", sandbox.url.rsplit(":", 1)[1]]
        second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode != 0
    assert "address already in use" in second.stderr
