"""Whatever happens in whatever order: zero lost, one record, nothing sent twice at once."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.relay import RelayHouse
from xpander_celery.errors import AuthenticationError, NetworkError, RateLimitedError, ServerError
from xpander_celery.journal import Appended
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.reader import FileReader
from xpander_celery.relay.rows import Phase
from xpander_celery.report import TaskReport

TROUBLES: dict[str, Callable[[], Exception]] = {
    "500": lambda: ServerError("x", status_code=500),
    "503 with Retry-After": lambda: ServerError("x", status_code=503, retry_after="30"),
    "429": lambda: RateLimitedError("x", retry_after="20"),
    "401": lambda: AuthenticationError("x", status_code=401),
    "refused": lambda: NetworkError("x"),
}


POINTS = ["at rest", "after a turn", "before the commit", "before the unlink", "unacknowledged"]


class KilledError(BaseException):
    """The relay dies here."""


def _die(*_: object, **__: object) -> None:
    raise KilledError


class Worker:
    """One writing process: each job that it started and did not end is lost when it is killed."""

    def __init__(self, directory: Path) -> None:
        self.journal = FileJournal(directory)
        self.journal.open()
        self.running: list[str] = []

    def kill(self) -> None:
        self.journal._segments.forget()  # what the kernel does: descriptors are closed, files stay


class Machine(RuleBasedStateMachine):
    """Workers, a journal of files, a relay and a platform, each of which may fail at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp())
        self.expected: dict[str, str] = {}  # job -> result of its last word; the ledger that jobs keep themselves
        self.tokens: dict[str, tuple[float, int]] = {}  # the latest usage of each job that was corrected
        self.lost: set[str] = set()
        self.kills_while_sending = 0
        self.numbers = iter(range(10**6))
        self.trouble: str | None = None
        self.lose_replies = False
        self.answers = asyncio.Event()  # not set: the platform is slow
        self.answers.set()
        self.delivered: dict[str, TaskReport] = {}

    @initialize()
    def begin(self) -> None:
        place = self.directory / "destination"
        self.workers = [Worker(place)]
        self.kills = 0
        self.house = RelayHouse(place, reader=lambda: FileReader(place), concurrency=3, redelivery_wait_s=10**6)
        self.house.platform.answer = self._answer
        self.run(self.house.__aenter__())

    def run(self, awaitable: Any) -> None:
        self.loop.run_until_complete(awaitable)

    async def _answer(self, report: TaskReport) -> None:
        await self.answers.wait()
        if self.trouble is not None:
            raise TROUBLES[self.trouble]()
        self.delivered[str(report.id)] = report
        if self.lose_replies:
            raise NetworkError("the reply was lost")

    def _append(self, worker: Worker, job_id: str, **event: Any) -> None:
        values = {"v": 1, "job_id": job_id, "attempt_id": "1", "at": self.house.clock.now()}
        assert worker.journal.append(values | event) is Appended.DURABLE

    # What workers do

    @rule(which=st.integers(0, 3))
    def start_job(self, which: int) -> None:
        worker = self.workers[which % len(self.workers)]
        job_id = f"job-{next(self.numbers)}"
        facts = {"task": "t", "agent_id": "agent"}
        process_id = worker.journal.process_id
        self._append(worker, job_id, kind="started", child=process_id, owner=process_id, facts=facts)
        worker.running.append(job_id)

    @precondition(lambda self: any(worker.running for worker in self.workers))
    @rule(which=st.integers(0, 10), succeeded=st.booleans())
    def finish_job(self, which: int, succeeded: bool) -> None:
        busy = [worker for worker in self.workers if worker.running]
        worker = busy[which % len(busy)]
        job_id = worker.running.pop(which % len(worker.running))
        outcome = "succeeded" if succeeded else "failed"
        self._append(worker, job_id, kind="finished", outcome=outcome, duration_s=1.0, result=f"{outcome} {job_id}")
        self.expected[job_id] = f"{outcome} {job_id}"

    @precondition(lambda self: self.expected)
    @rule(which=st.integers(0, 100), tokens=st.integers(1, 9))
    def correct_job(self, which: int, tokens: int) -> None:
        job_id = sorted(self.expected)[which % len(self.expected)]
        usage = {"prompt_tokens": tokens}
        self._append(self.workers[0], job_id, kind="progress", duration_s=1.0, tokens=usage)
        self.tokens[job_id] = max(self.tokens.get(job_id, (0.0, 0)), (self.house.clock.now(), tokens))

    @rule()
    def rotate_segments(self) -> None:
        for worker in self.workers:
            worker.journal._segments.make_room()

    @precondition(lambda self: len(self.workers) < 3)
    @rule()
    def start_worker(self) -> None:
        self.workers.append(Worker(self.house.config.directory))

    @precondition(lambda self: len(self.workers) > 1)
    @rule()
    def kill_worker(self) -> None:
        worker = self.workers.pop()
        worker.kill()
        self.lost.update(worker.running)

    # What the relay and the platform do

    @rule(turns=st.integers(1, 5))
    def relay_turns(self, turns: int) -> None:
        for _ in range(turns):
            self.run(self.house.turn())
            self.house.clock.advance(0.2)

    @rule(seconds=st.sampled_from([1, 15, 70, 400]))
    def time_goes_by(self, seconds: int) -> None:
        self.house.clock.advance(seconds)

    @precondition(lambda self: self.kills < 2)  # a report that is on its way in three deaths is taken for the cause
    @rule(
        point=st.sampled_from(["at rest", "after a turn", "before the commit", "before the unlink", "unacknowledged"])
    )
    def relay_is_killed(self, point: str) -> None:
        self.kills += 1
        relay = self.house.relay
        match point:
            case "after a turn":
                relay.turn()  # what it began to send is not even on its way
            case "before the commit":
                self._turn_until_killed_in(self.house.index, "record")
            case "before the unlink":
                self._turn_until_killed_in(relay._ingest._reader, "settle")
            case "unacknowledged":
                self._turn_until_killed_in(self.house.index, "finish")
        self.run(self.house.restart())

    def _turn_until_killed_in(self, where: Any, method: str) -> None:
        """A turn or two, in which the relay dies as soon as it calls that method."""
        setattr(where, method, _die)
        with contextlib.suppress(KilledError):
            for _ in range(2):
                self.run(self.house.turn())
                self.house.clock.advance(0.2)

    @rule(trouble=st.sampled_from(sorted(TROUBLES)))
    def platform_fails(self, trouble: str) -> None:
        self.trouble = trouble

    @rule()
    def platform_is_slow(self) -> None:
        self.answers.clear()

    @rule()
    def platform_recovers(self) -> None:
        self.trouble, self.lose_replies = None, False
        self.answers.set()

    @rule()
    def replies_get_lost(self) -> None:
        self.trouble, self.lose_replies = None, True

    @invariant()
    def nothing_is_given_up(self) -> None:
        if hasattr(self, "house"):
            assert self.house.index.count(Phase.DEAD) == 0

    def teardown(self) -> None:
        try:
            if hasattr(self, "house"):
                self._end()
        finally:
            self.loop.close()
            shutil.rmtree(self.directory)

    def _end(self) -> None:
        """Everything is well again, and all workers are gone: then nothing may be missing."""
        try:
            self.platform_recovers()
            for worker in self.workers:
                self.lost.update(worker.running)
                worker.kill()
            self.run(self.house.go_on(1500, step_s=20))
            self._check()
        finally:
            self.run(self.house.die())

    def _check(self) -> None:
        results = {job_id: report.result for job_id, report in self.delivered.items() if job_id in self.expected}
        assert results == self.expected, "a job was lost, or its record tells something else"
        tokens = {job_id: report.tokens.prompt_tokens for job_id, report in self.delivered.items() if report.tokens}
        assert tokens == {job_id: count for job_id, (_, count) in self.tokens.items()}, "a correction was lost"
        assert self.delivered.keys() - self.expected.keys() == self.lost, "jobs of killed workers are closed"
        assert all("WorkerLostError" in str(self.delivered[job_id].result) for job_id in self.lost)
        assert self.house.index.count(Phase.DUE) == 0
        assert list(self.house.config.directory.glob("*-0*")) == [], "segments are left"


MachineTest = Machine.TestCase
MachineTest.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
