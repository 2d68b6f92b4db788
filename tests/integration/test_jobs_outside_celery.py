"""`job()` in a program that is no worker: delivered when the program ends, or by `flush()`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sandbox import Sandbox, start_sandbox
from xpander_celery.demo.processes import clean_environ

DIGEST = """
import sys, threading
import xpander_celery as xc
with xc.job("nightly-digest", input="2026-01-31", id="digest-1") as job:
    job.add_usage(xc.Tokens(prompt_tokens=7, completion_tokens=2))
    with xc.tool_call("search"):
        job.result = {"orders": 3}
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with start_sandbox() as sandbox:
        yield sandbox


def run(code: str, sandbox: Sandbox, directory: Path) -> subprocess.CompletedProcess[str]:
    environ = clean_environ(
        XPANDER_API_KEY=sandbox.api_key,
        XPANDER_BASE_URL=sandbox.url,
        XPANDER_AGENT_ID="agent-of-programs",
        XPANDER_CELERY_JOURNAL=str(directory / "journal"),
    )
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)


def test_what_a_program_recorded_is_delivered_when_it_ends(sandbox: Sandbox, tmp_path: Path) -> None:
    done = run(DIGEST, sandbox, tmp_path)
    assert (done.stdout, done.stderr) == ("", "")
    record = sandbox.record("digest-1")
    assert record is not None
    assert (record["status"], record["result"]) == ("completed", '{"orders":3}')
    assert sandbox.posts_by_id()["digest-1"] == 1


def test_flush_delivers_at_once(sandbox: Sandbox, tmp_path: Path) -> None:
    done = run(DIGEST.replace("digest-1", "digest-2") + "print(xc.flush(10))", sandbox, tmp_path)
    assert done.stdout == "True\n"
    assert sandbox.record("digest-2") is not None


def test_a_program_that_fails_is_delivered_as_failed(sandbox: Sandbox, tmp_path: Path) -> None:
    code = DIGEST.replace("digest-1", "digest-3") + "    raise ValueError('no luck')"
    with pytest.raises(subprocess.CalledProcessError) as failure:
        run(code, sandbox, tmp_path)
    assert "ValueError: no luck" in failure.value.stderr
    record = sandbox.record("digest-3")
    assert record is not None
    assert record["status"] in ("error", "failed")


def test_eager_jobs_alone_start_no_process(sandbox: Sandbox, tmp_path: Path) -> None:
    code = """
from celery import Celery
import xpander_celery as xc
app = Celery("shop", broker="memory://", backend="cache+memory://")
xc.instrument(app)
@app.task
def add(x, y): return x + y
assert add.apply((1, 2), task_id="eager-1").get() == 3
"""
    run(code, sandbox, tmp_path)
    assert sandbox.record("eager-1") is None
    [directory] = (tmp_path / "journal").iterdir()
    assert not (directory / "relay.log").exists()
