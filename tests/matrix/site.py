"""One worker of one Celery version, pool and kind, with a broker database, journal, ledger and agent of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from tests.matrix.cases import GREEN, GROUPS, Group
from tests.matrix.environments import ROOT, python_of
from tests.matrix.ledger import Attempt, attempts_in
from tests.support.sandbox import Sandbox
from xpander_celery.demo.processes import Leashed

START_S = 120.0


class SiteError(Exception):
    """A worker did not do what the matrix asked of it; the message names its log."""


@dataclass(frozen=True)
class Site:
    """Where the jobs of one group run. Every process that it starts has ended when `run` returns."""

    version: str
    pool: str
    group: str
    directory: Path
    broker: str
    results: str
    sandbox: Sandbox

    @property
    def name(self) -> str:
        return f"{self.version} {self.pool} {self.group}"

    @property
    def agent_id(self) -> str:
        return self.name.replace(" ", "-")

    def run(self, is_complete: Callable[[dict[str, list[str]]], bool], deadline_s: float) -> dict[str, list[str]]:
        """Let the group's jobs happen, and wait until `is_complete` or the deadline; the job ids by case."""
        kind = GROUPS[self.group]
        (self.directory / "ledger").mkdir(parents=True)
        try:
            with self._worker("first", pool=self.pool) as worker:
                sent: dict[str, list[str]] = json.loads(self._driven())
                if kind.signal is None:
                    self._wait(lambda: is_complete(sent), deadline_s)
                else:
                    running = min(kind.running, sum(map(len, sent.values())))
                    self._until(lambda: len(self._spenders()) >= running, f"{running} jobs run", "first")
                    self._send_signal(kind, worker)
            if kind.followed:
                if self.version == "5.5":  # its kombu looks for what comes back when it starts, then every 100 s
                    time.sleep(float(kind.environment["MATRIX_VISIBILITY_S"]) + 1)
                with self._worker("second", pool="threads" if self.pool in GREEN else self.pool):
                    self._until(self._has_taken_back, "nothing is left that a worker did not acknowledge", "second")
                    self._wait(lambda: is_complete(sent), deadline_s)
            self._wait(lambda: is_complete(sent), deadline_s)
        finally:
            self._stop_relays()
        return sent

    def _send_signal(self, kind: Group, worker: Leashed) -> None:
        """Stop the worker, and let those bodies end that were to see it go on."""
        os.kill(int((self.directory / "first.pid").read_text()), getattr(signal, str(kind.signal)))
        self._wait(lambda: not worker.is_running, kind.held_s)
        (self.directory / "release").touch()
        if self.pool != "solo":  # Celery 5.5 and 5.6 fail in their handler there and hang; the leash ends the worker
            self._until(lambda: not worker.is_running, "the worker ends", "first")

    def _has_taken_back(self) -> bool:
        """Whether nothing of the first worker's is still to come. RabbitMQ gives it back at once."""
        if not self.broker.startswith("redis"):
            return True
        with redis.Redis.from_url(self.broker) as client:
            return not client.zcard("unacked_index")

    def _stop_relays(self) -> None:
        """They would end by themselves, within half a minute."""
        log = self.directory / "relays.log"
        with Leashed("relays", ["true"], log=log, environ=os.environ, relays=self.directory / "journal"):
            pass

    def attempts(self, job_id: str) -> list[Attempt]:
        """What the job itself wrote of its attempts."""
        return attempts_in(self.directory / "ledger" / job_id)

    def jobs(self) -> list[str]:
        """Every job whose body began here."""
        return [path.name for path in (self.directory / "ledger").iterdir()]

    def _spenders(self) -> list[Path]:
        return [path for path in (self.directory / "ledger").iterdir() if " spent " in path.read_text()]

    def _environment(self) -> dict[str, str]:
        inherited = ("PATH", "HOME", "LANG", "TMPDIR", "CI")
        return {
            **{name: os.environ[name] for name in inherited if name in os.environ},
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "MATRIX_BROKER": self.broker,
            "MATRIX_RESULTS": self.results,
            "MATRIX_POOL": self.pool,
            "MATRIX_QUEUE": self.agent_id,
            "MATRIX_RELEASE": str(self.directory / "release"),
            "MATRIX_LEDGER": str(self.directory / "ledger"),
            "XPANDER_API_KEY": self.sandbox.api_key,
            "XPANDER_BASE_URL": self.sandbox.url,
            "XPANDER_AGENT_ID": self.agent_id,
            "XPANDER_CELERY_JOURNAL": str(self.directory / "journal"),
            **GROUPS[self.group].environment,
        }

    def _driven(self) -> str:
        command = [python_of(self.version), "-m", "tests.matrix.driver", self.version, self.pool, self.group]
        with (self.directory / "driver.log").open("wb") as log:
            done = subprocess.run(
                command, env=self._environment(), stdout=subprocess.PIPE, stderr=log, timeout=2 * START_S, check=False
            )
        if done.returncode:
            raise SiteError(f"{self.name}: sending failed, see {log.name}")
        return done.stdout.decode()

    @contextmanager
    def _worker(self, name: str, *, pool: str) -> Iterator[Leashed]:
        options = ["--loglevel=INFO", "--without-gossip", "--without-mingle", f"--hostname={name}@{self.agent_id}"]
        options += [f"--pool={pool}", f"--concurrency={GROUPS[self.group].concurrency}"]
        options += [f"--pidfile={self.directory / name}.pid"]
        worker = Leashed(
            f"{self.name}: the {name} worker",
            [str(python_of(self.version)), "-m", "celery", "-A", "tests.matrix.app", "worker", *options],
            log=self.directory / f"{name}.log",
            environ=self._environment(),
            grace_s=30,
        )
        with worker:
            worker.wait_for(" ready.", START_S)
            yield worker

    def _until(self, condition: Callable[[], Any], what: str, worker: str) -> None:
        if not self._wait(condition, START_S):
            raise SiteError(f"{self.name}: not so after {START_S:g} s: {what}; see {self.directory / worker}.log")

    @staticmethod
    def _wait(condition: Callable[[], Any], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True
