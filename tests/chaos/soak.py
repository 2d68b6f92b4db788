"""Thousands of jobs of every kind, while pool processes are killed at random; then each record is judged.

    python -m tests.chaos.soak [--jobs N] [--seconds N] [--seed N]

The jobs are those of the matrix: each keeps a ledger file of its own, which says which process ran it, what it spent,
and whether it came to its end. From that and from which processes were killed follows which outcomes a record may
have, and how often it may have been sent. Exits with 1 where one has another, or a job is missing or doubled.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from celery import Celery

from tests.chaos.kinds import INNER, KINDS, LOST, Kind, faults_of, struck_by
from tests.chaos.run import Chaos
from tests.matrix.judge import outcome_in
from tests.matrix.ledger import Attempt, attempts_in
from tests.support.broker import Broker, start_redis
from tests.support.waiting import until
from tests.support.worker import AGENT

APP = "tests.matrix.app"
QUEUE = "soak"
_DRAINS_WITHIN_S = 150.0
_KILL_EVERY_S = (0.05, 0.45)
_TERMINATE_EVERY_S = 0.2
_SHOWN = 20


class Crowd(Chaos):
    """Workers of the matrix' app, whose pool processes alone are killed."""

    APP = APP
    OPTIONS = ("--concurrency=4",)

    @property
    def ledgers(self) -> Path:
        return self.directory / "ledgers"

    def _settings(self) -> dict[str, str]:
        return {
            **super()._settings(),
            "MATRIX_BROKER": self.broker.url,
            "MATRIX_RESULTS": self.broker.backend,
            "MATRIX_QUEUE": QUEUE,
            "MATRIX_POOL": "prefork",
            "MATRIX_LEDGER": str(self.ledgers),
            "MATRIX_RELEASE": str(self.directory / "release"),
        }

    def kill_child(self) -> None:
        self._kill_child()


class Soak:
    """What was sent, and what came of it."""

    def __init__(self, directory: Path, broker: Broker, chance: random.Random) -> None:
        self.ledgers = directory / "ledgers"
        self.ledgers.mkdir()
        self.sent: dict[str, Kind] = {}
        self.chaos = Crowd(directory, broker, chance)
        self.client = Celery("publisher", broker=broker.url, set_as_current=False)
        self._to_terminate: list[str] = []

    def publish(self, kind: Kind) -> None:
        job_id = str(uuid.uuid4())
        self.sent[job_id] = kind
        name = kind.task if "." in kind.task else f"{APP}.{kind.task}"
        self.client.send_task(name, [kind.script], task_id=job_id, queue=QUEUE, **kind.options)
        if kind.is_terminated:
            self._to_terminate.append(job_id)

    def terminate(self) -> None:
        """End those jobs that are to be, once they run."""
        for job_id in list(self._to_terminate):
            if self.attempts(job_id):
                self.client.control.revoke(job_id, terminate=True, signal="SIGTERM")
                self._to_terminate.remove(job_id)

    def attempts(self, job_id: str) -> list[Attempt]:
        return attempts_in(self.ledgers / job_id)

    def due(self) -> dict[str, Kind]:
        """Every job of which there must be a record, those included that another job called within itself."""
        began = {path.name for path in self.ledgers.iterdir()}
        return {**dict.fromkeys(began, INNER), **self.sent}

    def records(self) -> list[dict[str, Any]]:
        return self.chaos.platform.sandbox.records(AGENT)

    def is_complete(self) -> bool:
        posts = self.chaos.platform.sandbox.posts_by_id()
        return self.due().keys() <= posts.keys() and not self.faults()

    def faults(self) -> list[str]:
        """All that is wrong by now, in words."""
        due, records = self.due(), self.records()
        posts = self.chaos.platform.sandbox.posts_by_id()
        by_id: Mapping[str, Any] = {record["id"]: record for record in records}
        ledgers = {job_id: self.attempts(job_id) for job_id in due}
        struck = struck_by(ledgers, self.chaos.killed_children)
        faults = [
            f"{kind.name} {job_id}: {fault}"
            for job_id, kind in due.items()
            for fault in faults_of(kind, ledgers[job_id], struck[job_id], by_id.get(job_id), posts.get(job_id, 0))
        ]
        faults += [f"{job_id}: a record of no job" for job_id in by_id if not _is_known(by_id[job_id], due)]
        counted = Counter(record["id"] for record in records)
        return [*faults, *(f"{job_id}: {count} records" for job_id, count in counted.items() if count > 1)]


def _is_known(record: Mapping[str, Any], due: Mapping[str, Kind]) -> bool:
    """Whether a record is of one of the jobs, or of one that such a job called and that was killed without a ledger."""
    if record["id"] in due:
        return True
    return record["llm_response"]["celery"].get("parent_id") in due and outcome_in(record) == LOST


def run(jobs: int, seconds: float, seed: int, directory: Path) -> int:
    chance = random.Random(seed)
    began = time.monotonic()
    with start_redis() as broker:
        soak = Soak(directory, broker, random.Random(seed + 1))
        try:
            pauses = random.Random(seed + 2)
            # to the end, since what a worker has taken from the queue may begin long after
            with repeating(soak.terminate, lambda: _TERMINATE_EVERY_S):
                with repeating(soak.chaos.kill_child, lambda: pauses.uniform(*_KILL_EVERY_S)):
                    _publish_all(soak, jobs, seconds, chance)
                    _await_last_job(soak)
                with contextlib.suppress(AssertionError):  # what is not right in time is told
                    until(soak.is_complete, timeout_s=_DRAINS_WITHIN_S, what="a right record of every job", every_s=2.0)
            return report(soak, seed, time.monotonic() - began)
        finally:
            soak.chaos.stop()


def _publish_all(soak: Soak, jobs: int, seconds: float, chance: random.Random) -> None:
    """At an even pace."""
    began = time.monotonic()
    weights = [kind.weight for kind in KINDS]
    for number in range(jobs):
        soak.publish(chance.choices(KINDS, weights)[0])
        if sys.stderr.isatty() and not number % 50:
            print(f"\r{number:,} jobs, {dict(soak.chaos.kills)}   ", end="", file=sys.stderr, flush=True)
        time.sleep(max(0.0, began + (number + 1) * seconds / jobs - time.monotonic()))


def _await_last_job(soak: Soak) -> None:
    """Until the queue is empty, however long a slow machine takes; no more processes are to be killed then."""
    with soak.client.connection_for_read() as connection:
        queue = connection.default_channel.client
        while waiting := queue.llen(QUEUE):
            until(lambda: queue.llen(QUEUE) < waiting, what="a worker that takes a job")


@contextlib.contextmanager
def repeating(act: Callable[[], None], pause_s: Callable[[], float]) -> Iterator[None]:
    """`act` is called with pauses, as long as this lasts."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(pause_s()):
            act()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def report(soak: Soak, seed: int, took_s: float) -> int:
    due, records = soak.due(), {record["id"]: record for record in soak.records()}
    ledgers = {job_id: soak.attempts(job_id) for job_id in due}
    struck = struck_by(ledgers, soak.chaos.killed_children)
    print(f"{'kind':24} {'jobs':>6} {'struck':>7}  outcomes")
    for kind in (*KINDS, INNER):
        ids = [job_id for job_id, its in due.items() if its is kind]
        outcomes = Counter(outcome_in(records.get(job_id)) for job_id in ids)
        hit = sum(bool(struck[job_id]) for job_id in ids)
        print(f"{kind.name:24} {len(ids):6,} {hit:7,}  {', '.join(f'{o} {n:,}' for o, n in outcomes.most_common())}")
    faults = soak.faults()
    posts = soak.chaos.platform.sandbox.posts_by_id()
    again = sum(len(ledgers[job_id]) > 1 and kind.runs == kind.lives == 1 for job_id, kind in due.items())
    print(f"seed {seed}; {len(due):,} jobs in {took_s:.0f} s; pool processes killed: {soak.chaos.kills['child']:,}")
    print(f"run by a second process  {again:6,}   for the same request, since the pool put the job back")
    print(
        f"sent more than once      {sum(n > 1 for n in posts.values()):6,}   all of them struck by a kill, if no fault"
    )
    print(f"faults                   {len(faults):6,}   must be 0")
    for fault in faults[:_SHOWN]:
        print(f"  {fault}")
    return 1 if faults or not due else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=5000, help="how many (default 5000)")
    parser.add_argument("--seconds", type=float, default=150.0, help="over which they are sent (default 150)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what is sent and killed when")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="xpander-soak-"))
    if status := run(options.jobs, options.seconds, options.seed, place):
        print(f"Logs, ledgers and the journal: {place}")
    else:
        shutil.rmtree(place)
    return status


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    sys.exit(main())
