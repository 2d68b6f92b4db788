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


def run(
    code: str, sandbox: Sandbox, directory: Path, *arguments: str, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    program = directory / "program.py"  # a file, for processes that are spawned load it anew
    program.write_text(code)
    environ = clean_environ(
        XPANDER_API_KEY=sandbox.api_key,
        XPANDER_BASE_URL=sandbox.url,
        XPANDER_AGENT_ID="agent-of-programs",
        XPANDER_CELERY_JOURNAL=str(directory / "journal"),
    )
    command = [python, "-W", "error", str(program), *arguments]
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


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="this interpreter finds the package by itself")
def test_the_relay_is_found_where_the_program_found_the_package(sandbox: Sandbox, tmp_path: Path) -> None:
    outside = sys._base_executable  # type: ignore[attr-defined]  # the interpreter behind this virtual environment
    vendored = f"import pathlib, sys; sys.path[:0] = {[entry for entry in sys.path if entry]!r}; "
    vendored += "sys.path.append(pathlib.Path('/nowhere'))"
    done = run(vendored + DIGEST.replace("digest-1", "vendored-1"), sandbox, tmp_path, python=outside)
    assert done.stderr == ""
    assert sandbox.posts_by_id()["vendored-1"] == 1


@pytest.mark.parametrize("program", ["", "from celery import Celery; app = Celery('shop'); xc.instrument(app); "])
def test_flush_delivers_what_others_on_this_machine_left(sandbox: Sandbox, tmp_path: Path, program: str) -> None:
    job_id = f"left-{len(program)}"
    run(DIGEST.replace("digest-1", job_id) + "import os; os._exit(0)", sandbox, tmp_path)
    assert sandbox.record(job_id) is None
    done = run(f"import xpander_celery as xc; {program}print(xc.flush(30))", sandbox, tmp_path)
    assert done.stdout == "True\n"
    assert sandbox.posts_by_id()[job_id] == 1


def test_flush_leaves_no_trace_where_nothing_was_recorded(sandbox: Sandbox, tmp_path: Path) -> None:
    done = run("import xpander_celery as xc; print(xc.flush(10))", sandbox, tmp_path)
    assert done.stdout == "True\n"
    assert not (tmp_path / "journal").exists()


def test_a_program_that_fails_is_delivered_as_failed(sandbox: Sandbox, tmp_path: Path) -> None:
    code = DIGEST.replace("digest-1", "digest-3") + "    raise ValueError('no luck')"
    with pytest.raises(subprocess.CalledProcessError) as failure:
        run(code, sandbox, tmp_path)
    assert "ValueError: no luck" in failure.value.stderr
    record = sandbox.record("digest-3")
    assert record is not None
    assert record["status"] in ("error", "failed")


def test_a_program_that_was_forked_delivers_when_it_ends(sandbox: Sandbox, tmp_path: Path) -> None:
    code = """
import os
import xpander_celery as xc
with xc.job("before", id="fork-1"): pass
child = os.fork()
if child == 0:
    with xc.job("after", id="fork-2"): pass
else:
    assert os.waitpid(child, 0)[1] == 0
    os._exit(0)  # this one delivers nothing
"""
    run(code, sandbox, tmp_path)
    assert (sandbox.posts_by_id()["fork-1"], sandbox.posts_by_id()["fork-2"]) == (1, 1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_of_multiprocessing_delivers_when_it_ends(sandbox: Sandbox, tmp_path: Path, method: str) -> None:
    code = """
import multiprocessing, sys
import xpander_celery as xc
def digest(id):
    with xc.job("digest", id=id): pass
if __name__ == "__main__":
    method = sys.argv[1]
    process = multiprocessing.get_context(method).Process(target=digest, args=(f"process-{method}",))
    process.start()
    process.join()
    assert process.exitcode == 0
"""
    run(code, sandbox, tmp_path, method)
    assert sandbox.posts_by_id()[f"process-{method}"] == 1


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
