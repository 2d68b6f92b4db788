"""The demo from nothing to history: starts what is needed, publishes the jobs, waits for their records, shows them."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from xpander_celery.demo.broker import Broker, open_broker
from xpander_celery.demo.expectations import DemoError, Expected, check
from xpander_celery.demo.history import History, Record
from xpander_celery.demo.processes import Leashed, ProcessError, clean_environ
from xpander_celery.demo.screen import Screen

AGENT_ID = "agent-demo"
API_KEY = "demo-key"
QUESTION = "How many dollars are 40 euros, at about 1.25 each?"
_SANDBOX_READY = "sandbox ready "
_WORKER_READY = " ready."
_STARTS_WITHIN_S = 60.0
_RUNS_WITHIN_S = 120.0
_LOOK_EVERY_S = 0.1
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    once: bool = False
    json: bool = False
    broker: str | None = None
    port: int = 0
    live: bool = False
    model: str = "gpt-4.1-mini"


def run(options: Options) -> int:
    """Run the demo; the exit code."""
    screen = Screen(as_json=options.json)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        _run(options, screen)
    except (ProcessError, DemoError) as error:
        screen.problem(str(error))
        return 1
    except KeyboardInterrupt:
        screen.say("Stopped.")
        return 130
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """A polite kill ends the demo as Ctrl-C does, with everything cleaned up."""
    raise KeyboardInterrupt


def _run(options: Options, screen: Screen) -> None:
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="xpander-demo-", ignore_cleanup_errors=True))
        directory = Path(name)
        sandbox = stack.enter_context(_sandbox(options.port, directory))
        expected, records, served = _run_jobs(options, screen, sandbox, directory)
        screen.records(records, sandbox)
        check(expected, records, served)
        if not options.once and not options.json and screen.is_terminal:
            screen.say(f"The history stays at {sandbox}/ until you press Ctrl-C.")
            _wait_for_interrupt()


def _run_jobs(
    options: Options, screen: Screen, sandbox: str, directory: Path
) -> tuple[list[Expected], list[Record], dict[str, int] | None]:
    """What was to happen, what the history says, and what the scripted model served; the worker has ended by then."""
    live = _live_variables() if options.live else None
    with ExitStack() as stack:
        with screen.progress("Starting a broker and a worker"):
            broker = stack.enter_context(open_broker(options.broker, directory))
            variables = _job_variables(sandbox, broker, options.model, directory, live)
            os.environ.clear()  # jobs are published from here: nothing of the user's may reach them either
            os.environ.update(variables)
            stack.callback(_delete_queue)
            worker = stack.enter_context(_worker(directory, variables))
            from xpander_celery.demo import publishing  # as slow as the worker's start, so both go on at once

            worker.wait_for(_WORKER_READY, _STARTS_WITHIN_S)
        history = stack.enter_context(History(sandbox, API_KEY, AGENT_ID))
        expected = publishing.publish(QUESTION)
        records = _collect(expected, history, worker, screen)
        return expected, records, None if options.live else history.served_tokens()


def _live_variables() -> dict[str, str]:
    """What the real model needs of the user's environment; the sandbox stays out of the user's proxy."""
    if not os.environ.get("OPENAI_API_KEY"):
        raise DemoError("--live needs OPENAI_API_KEY")
    wanted = {"OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"}
    kept = {name: value for name, value in os.environ.items() if name in wanted or name.lower() in _PROXIES}
    return {**kept, "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}


def _job_variables(
    sandbox: str, broker: Broker, model: str, directory: Path, live: dict[str, str] | None
) -> dict[str, str]:
    """The environment of whoever publishes or runs the jobs."""
    return clean_environ(
        XPANDER_API_KEY=API_KEY,
        XPANDER_BASE_URL=sandbox,
        XPANDER_AGENT_ID=AGENT_ID,
        XPANDER_CELERY_JOURNAL=str(directory / "journal"),
        DEMO_BROKER_URL=broker.url,
        DEMO_QUEUE=f"xpander-demo-{uuid.uuid4().hex[:12]}",
        DEMO_MODEL=model,
        **(live or {"OPENAI_API_KEY": "none-needed", "OPENAI_BASE_URL": f"{sandbox}/v1"}),
    )


@contextmanager
def _sandbox(port: int, directory: Path) -> Iterator[str]:
    """The URL of a sandbox that serves until the end."""
    command = [sys.executable, "-m", "xpander_celery.sandbox", "--port", str(port), "--api-key", API_KEY]
    with Leashed("The sandbox", command, log=directory / "sandbox.log", environ=clean_environ(), grace_s=3) as process:
        line = process.wait_for(_SANDBOX_READY, _STARTS_WITHIN_S)
        yield line.removeprefix(_SANDBOX_READY).strip()


@contextmanager
def _worker(directory: Path, variables: dict[str, str]) -> Iterator[Leashed]:
    """A real prefork worker; it is not ready yet."""
    command = [sys.executable, "-m", "celery", "-A", "xpander_celery.demo.jobs", "worker"]
    with Leashed(
        "The worker",
        [
            *command,
            "--pool",
            "prefork",
            "--concurrency",
            "2",
            "--loglevel",
            "INFO",
            "--hostname",
            "demo@%h",
            "--without-mingle",
        ],
        log=directory / "worker.log",
        environ=variables,
        grace_s=10,
        relays=directory / "journal",
        remove=directory,
    ) as worker:
        yield worker


def _collect(expected: list[Expected], history: History, worker: Leashed, screen: Screen) -> list[Record]:
    """The records of all jobs in the order of their publishing, as soon as the platform has them."""
    deadline = time.monotonic() + _RUNS_WITHIN_S
    with screen.progress("Jobs in the history", total=len(expected)) as advance:
        while True:
            records = history.records()
            missing = [job.task for job in expected if job.id not in records]
            advance(len(expected) - len(missing))
            if not missing:
                return [records[job.id] for job in expected]
            if not worker.is_running:
                raise worker.failure("ended too early")
            if time.monotonic() > deadline:
                raise worker.failure(f"is late: no record of {', '.join(missing)} after {_RUNS_WITHIN_S:.0f} s")
            time.sleep(_LOOK_EVERY_S)


def _delete_queue() -> None:
    """Leave nothing behind on a broker of the user's."""
    publishing = sys.modules.get("xpander_celery.demo.publishing")
    if publishing is not None:
        publishing.delete_queue()


def _wait_for_interrupt() -> None:
    with suppress(KeyboardInterrupt):
        signal.pause()
