"""Real Celery workers as processes of their own, and what they wrote into their journal."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.broker import Broker
from tests.support.waiting import until
from xpander_celery.demo.processes import Leashed, clean_environ
from xpander_celery.events import Event
from xpander_celery.fold import Final, fold, verdict
from xpander_celery.journal.reader import FileReader
from xpander_celery.report import TaskReport

APP = "tests.support.jobs"
AGENT = "agent-of-the-tests"
_ROOT = Path(__file__).parents[2]


class JournalView:
    """The events in the journal of a worker, as a relay would read them; nothing is taken away."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._readers: dict[Path, FileReader] = {}
        self._events: list[Event] = []

    def events(self, job_id: str | None = None) -> list[Event]:
        """Every event so far, or those of one job."""
        for directory in self._root.iterdir() if self._root.exists() else ():
            reader = self._readers.setdefault(directory, FileReader(directory))
            while (batch := reader.poll(1000)).events:
                self._events += batch.events
                reader.resume(batch.positions)
        return [event for event in self._events if job_id in (None, event.job_id)]

    def verdicts(self) -> dict[str, Final]:
        """How each job that is over by now ended. Of processes none is taken to be gone."""
        by_job: dict[str, list[Event]] = {}
        for event in self.events():
            by_job.setdefault(event.job_id, []).append(event)
        ends = {
            job_id: verdict(fold(events), now=time.time(), gone={}, redelivery_wait_s=3600)
            for job_id, events in by_job.items()
        }
        return {job_id: end for job_id, end in ends.items() if isinstance(end, Final)}

    def report(self, job_id: str, *, timeout_s: float = 30.0) -> TaskReport:
        """The report of a job, once it is over."""
        end = until(lambda: self.verdicts().get(job_id), timeout_s=timeout_s, what=f"the end of {job_id}")
        assert end.report is not None
        return end.report

    def outcome(self, job_id: str, *, timeout_s: float = 30.0) -> str:
        """How a job ended, once it is over."""
        return until(lambda: self.verdicts().get(job_id), timeout_s=timeout_s, what=f"the end of {job_id}").outcome


@dataclass(frozen=True)
class Worker:
    """A running worker. It ends with the test process, whatever way that ends."""

    pid: int
    journal: JournalView
    process: Leashed

    @property
    def log(self) -> str:
        """What it said so far."""
        return self.process.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Send a signal to its main process."""
        os.kill(self.pid, number)

    def stop(self) -> None:
        """A warm stop, to its end."""
        self.signal(signal.SIGTERM)
        self.wait()

    def wait(self, timeout_s: float = 30.0) -> None:
        """Until it has ended."""
        until(lambda: not self.process.is_running, timeout_s=timeout_s, what="the worker's end")


@contextlib.contextmanager
def start_worker(
    broker: Broker,
    directory: Path,
    *options: str,
    app: str = APP,
    python: str = sys.executable,
    **environ: str,
) -> Iterator[Worker]:
    """A worker of `app` that is ready, with further command line `options` and variables; its files in `directory`.

    By default it writes its journal and delivers nothing. A test that fails within shows the worker's log.
    """
    directory.mkdir(exist_ok=True)
    pidfile = directory / "worker.pid"
    variables = {
        "BROKER_URL": broker.url,
        "RESULT_BACKEND": broker.backend,
        "PYTHONPATH": str(_ROOT),
        "XPANDER_API_KEY": "key-of-the-tests",
        "XPANDER_AGENT_ID": AGENT,
        "XPANDER_BASE_URL": "http://127.0.0.1:9",
        "XPANDER_CELERY_JOURNAL": str(directory / "journal"),
        "TEST_RELAY": "external",
        **environ,
    }
    is_in_redis = "://" in variables["XPANDER_CELERY_JOURNAL"]  # then this is what a machine keeps beside it
    journal = directory / "state" if is_in_redis else Path(variables["XPANDER_CELERY_JOURNAL"])
    variables |= {"XDG_STATE_HOME": str(journal)} if is_in_redis else {}
    command = [python, "-m", "celery", "-A", app, "worker", "--loglevel=INFO", "--without-mingle", "--without-gossip"]
    process = Leashed(
        "worker",
        [*command, f"--pidfile={pidfile}", *options],
        log=directory / "worker.log",
        environ=clean_environ(**variables),
        grace_s=10,
        relays=journal,
    )
    with process:
        try:
            until(lambda: " ready." in _said(process) or not process.is_running, what="a worker that is ready")
            if not process.is_running:
                raise process.failure("did not start")
            yield Worker(int(pidfile.read_text()), JournalView(journal), process)
        except BaseException:
            print(_said(process))
            raise


def _said(process: Leashed) -> str:
    return process.log.read_text(errors="replace")
