"""A relay in this process, with a clock of its own and a platform that answers as it is told."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from xpander_celery.journal import JournalReader
from xpander_celery.journal.memory import MemoryJournal
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.core import Relay
from xpander_celery.relay.index import Index
from xpander_celery.relay.letters import Hook
from xpander_celery.relay.rows import Job, Phase
from xpander_celery.relay.targets import Target
from xpander_celery.report import TaskReport

START = 1_800_000_000.0


class HandClock:
    """A clock that goes on only when it is told to. `jump` moves the time of day alone, as an administrator does."""

    def __init__(self) -> None:
        self._now = START
        self._jumped = 0.0

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._now + self._jumped

    def advance(self, seconds: float) -> None:
        self._now += seconds

    def jump(self, seconds: float) -> None:
        self._jumped += seconds


class PlatformDouble:
    """Keeps what arrives. `answer` is called first, for each report, and may raise or wait."""

    def __init__(self) -> None:
        self.posts: list[tuple[float, TaskReport]] = []
        self.records: dict[str, TaskReport] = {}
        self.answer: Callable[[TaskReport], Any] = lambda report: None
        self.ended: Callable[[TaskReport], bool] = lambda report: False
        self.in_flight: Counter[str] = Counter()
        self.most_in_flight = 0
        self.now: Callable[[], float] = lambda: 0.0

    def posts_by_id(self) -> Counter[str]:
        return Counter(str(report.id) for _, report in self.posts)

    def times(self) -> list[float]:
        return [at for at, _ in self.posts]

    def target(self) -> Target:
        return _TargetDouble(self)


class _TargetDouble:
    def __init__(self, platform: PlatformDouble) -> None:
        self._platform = platform

    async def send(self, report: TaskReport) -> None:
        platform = self._platform
        platform.posts.append((platform.now(), report))
        platform.in_flight[str(report.id)] += 1
        platform.most_in_flight = max(platform.most_in_flight, platform.in_flight.total())
        assert platform.in_flight[str(report.id)] == 1, "two reports of one job at once"
        try:
            await asyncio.sleep(0)
            answer = platform.answer(report)
            if asyncio.iscoroutine(answer):
                await answer
            platform.records[str(report.id)] = report
        finally:
            platform.in_flight[str(report.id)] -= 1

    async def has_ended(self, report: TaskReport) -> bool:
        return self._platform.ended(report)

    async def aclose(self) -> None:
        pass


class SentThrough:
    """Targets to a real platform that note when, by the relay's clock, each request went out."""

    def __init__(self, targets: Callable[[], Target]) -> None:
        self._targets = targets
        self.now: Callable[[], float] = lambda: 0.0
        self.times: list[float] = []
        self.ids: list[str] = []

    def __call__(self) -> Target:
        return _Noting(self, self._targets())


class _Noting:
    def __init__(self, through: SentThrough, target: Target) -> None:
        self._through = through
        self._target = target

    async def send(self, report: TaskReport) -> None:
        self._through.times.append(self._through.now())
        self._through.ids.append(str(report.id))
        await self._target.send(report)

    async def has_ended(self, report: TaskReport) -> bool:
        return await self._target.has_ended(report)

    async def aclose(self) -> None:
        await self._target.aclose()


class RelayHouse:
    """A journal, a platform, and a relay between them that can die at any time. Use it as `async with`."""

    def __init__(
        self,
        directory: Path,
        *,
        journal: MemoryJournal | None = None,
        reader: Callable[[], JournalReader] | None = None,
        targets: Callable[[], Target] | None = None,
        hook: Hook | None = None,
        chance: Callable[[], float] | None = None,
        **settings: Any,
    ) -> None:
        self.journal = journal or MemoryJournal()
        self.clock = HandClock()
        self.platform = PlatformDouble()
        self.platform.now = self.clock.now
        self.config = RelayConfig(directory, api_key="key", **settings)
        self.hook = hook
        self._reader = reader or self.journal.another_process
        self._targets = targets or self.platform.target
        self._chance = chance or random.Random(7).random
        self._workers: list[asyncio.Task[None]] = []
        self._numbers = itertools.count(1)
        self._marks: bytes | None = None

    async def __aenter__(self) -> Self:
        self.journal.open()
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.die()

    def start(self) -> None:
        """Begin with what an earlier relay left."""
        self.index = Index.open(self.config.directory, max_bytes=self.config.max_index_bytes)
        self.relay = Relay(
            self.config,
            index=self.index,
            reader=self._reader(),
            targets=self._targets,
            chance=self._chance,
            clock=self.clock,
            hook=self.hook,
        )
        slots = range(self.config.concurrency)
        self._workers = [asyncio.create_task(self.relay.delivery.work(slot)) for slot in slots]

    def is_killed_here(self) -> None:
        """What calls this is what `die` will have interrupted: code of a report that is at work."""
        self._marks = bytes(self.relay._in_flight._map)

    async def die(self) -> None:
        """End as SIGKILL ends a relay: what is not committed is gone."""
        marks, self._marks = self._marks or bytes(self.relay._in_flight._map), None
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._workers = []
        self.index.close()
        (self.config.directory / "relay.inflight").write_bytes(marks)  # cancelling cleared them, SIGKILL does not

    async def restart(self) -> None:
        await self.die()
        self.start()

    async def turn(self) -> float:
        """One turn, and whatever the workers can do after it."""
        wait_s = self.relay.turn()
        for _ in range(20):
            await asyncio.sleep(0)
        for worker in self._workers:
            if worker.done():
                worker.result()
        return wait_s

    async def settle(self) -> None:
        """Go on until nothing is to be done now; time stands still but for what a turn needs."""
        for _ in range(100_000):
            await self.turn()
            if self.relay.is_quiet:
                self.relay.store()
                return
            if self.relay.delivery.is_sending:
                await asyncio.sleep(0.001)  # a real platform needs real time
            else:
                self.clock.advance(0.001)
        raise AssertionError("the relay never comes to rest")

    async def go_on(self, seconds: float, step_s: float = 1.0) -> None:
        """Let time go by."""
        until = self.clock.now() + seconds
        while self.clock.now() < until:
            await self.settle()
            self.clock.advance(step_s)
        await self.settle()

    # What jobs write

    def started(
        self, job_id: str, *, attempt_id: str = "1", journal: MemoryJournal | None = None, **facts: Any
    ) -> None:
        journal = journal or self.journal
        facts = {"task": "shop.charge", "agent_id": "agent", "input": "42"} | facts
        event = {"kind": "started", "child": journal.process_id, "owner": journal.process_id, "facts": facts}
        self.append(job_id, attempt_id, journal, **event)

    def finished(
        self, job_id: str, *, attempt_id: str = "1", journal: MemoryJournal | None = None, **more: Any
    ) -> None:
        event = {"kind": "finished", "outcome": "succeeded", "duration_s": 0.5, "result": "done"} | more
        self.append(job_id, attempt_id, journal or self.journal, **event)

    def job(self, job_id: str | None = None, *, agent_id: str = "agent", **more: Any) -> str:
        """A whole job."""
        job_id = job_id or f"job-{next(self._numbers)}"
        self.started(job_id, agent_id=agent_id)
        self.finished(job_id, **more)
        return job_id

    def append(self, job_id: str, attempt_id: str, journal: MemoryJournal, **event: Any) -> None:
        journal.append({"v": 1, "job_id": job_id, "attempt_id": attempt_id, "at": self.clock.now(), **event})

    # What can be seen

    def row(self, job_id: str) -> Job:
        return self.index.find([job_id])[job_id]

    def row_exists(self, job_id: str) -> bool:
        return job_id in self.index.find([job_id])

    def phase(self, job_id: str) -> Phase:
        return self.row(job_id).phase
