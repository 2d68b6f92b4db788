"""Several relays on one Redis: one leads, the others stand by, and one of them goes on where it ended."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.redis_server import RedisServer
from tests.support.relay import HandClock, PlatformDouble, RelayHouse
from xpander_celery.errors import NetworkError, NotFoundError, RateLimitedError, RequestRefusedError, ServerError
from xpander_celery.journal import liveness
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.redis.keys import Keys
from xpander_celery.journal.redis.reader import RedisReader
from xpander_celery.journal.redis.writer import RedisJournal
from xpander_celery.relay.policy import Flow
from xpander_celery.relay.rows import Phase
from xpander_celery.relay.schema import IndexFullError
from xpander_celery.report import TaskReport

KEYS = Keys("destination")


class Worker:
    """One worker on a machine of its own."""

    def __init__(self, server: RedisServer, directory: Path, clock: HandClock) -> None:
        self.journal = RedisJournal(server.url, "destination", spill=FileJournal(directory), clock=clock.now)
        self._clock = clock
        self._server = server

    def started(self, job_id: str, attempt_id: str = "1", **facts: Any) -> None:
        process_id = self.journal.process_id
        known = {"task": "shop.charge", "agent_id": "agent", "input": "42", **facts}
        self._append(job_id, attempt_id, kind="started", child=process_id, owner=process_id, facts=known)

    def finished(self, job_id: str, attempt_id: str = "1", **more: Any) -> None:
        event = {"kind": "finished", "outcome": "succeeded", "duration_s": 0.5, "result": "done"} | more
        self._append(job_id, attempt_id, **event)

    def job(self, job_id: str, **more: Any) -> str:
        self.started(job_id)
        self.finished(job_id, **more)
        return job_id

    def _append(self, job_id: str, attempt_id: str, **event: Any) -> None:
        self.journal.append({"v": 1, "job_id": job_id, "attempt_id": attempt_id, "at": self._clock.now(), **event})


class Fleet:
    """Relays with directories of their own, one Redis, one platform, one clock."""

    def __init__(self, server: RedisServer, directory: Path) -> None:
        self.server = server
        self.clock = HandClock()
        self.platform = PlatformDouble()
        self.platform.now = self.clock.now
        self._directory = directory
        self._houses: list[RelayHouse] = []
        self._numbers = itertools.count(1)
        self.loses_reply: Callable[[], bool] = lambda: False
        self._readers: list[RedisReader] = []
        self._workers: list[Worker] = []

    def worker(self) -> Worker:
        self._workers.append(Worker(self.server, self._directory / f"worker-{next(self._numbers)}", self.clock))
        return self._workers[-1]

    async def relay(self, **settings: Any) -> RelayHouse:
        directory = self._directory / f"relay-{next(self._numbers)}"
        directory.mkdir()
        house = RelayHouse(directory, targets=self.platform.target, reader=lambda: self._reader(house), **settings)
        house.clock, house.platform = self.clock, self.platform
        await house.__aenter__()
        self._houses.append(house)
        return house

    def _reader(self, house: RelayHouse) -> RedisReader:
        identity = house.index.identity
        self._readers.append(
            RedisReader(
                self.server.url, "destination", identity=identity, keeps_until_delivered=True, clock=self.clock.now
            )
        )
        client = self._readers[-1]._client
        real = client.call

        def call(commands: Any) -> list[Any]:
            replies = real(commands)
            if self.loses_reply():
                raise TimeoutError("the reply was lost")
            return replies

        client.call = call  # type: ignore[method-assign]
        return self._readers[-1]

    def lease_runs_out(self, *, after_s: float = 6) -> None:
        """As 15 s after the death of the relay that held it; its successor asks every 5 s."""
        self.server.client.ask("DEL", KEYS.lease)
        self.clock.advance(after_s)

    def left(self) -> int:
        return int(self.server.client.ask("XLEN", KEYS.stream))

    async def close(self) -> None:
        for house in self._houses:
            await house.die()
        for reader in self._readers:
            reader.close()
        for worker in self._workers:
            worker.journal.close()


@pytest.fixture
async def fleet(redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[Fleet]:
    redis_server.client.ask("FLUSHALL")
    fleet = Fleet(redis_server, tmp_path)
    yield fleet
    await fleet.close()


def failing(error: Exception, *, only: str | None = None) -> Callable[[TaskReport], None]:
    def answer(report: TaskReport) -> None:
        if only is None or report.id == only:
            raise error

    return answer


async def test_one_relay_delivers_and_the_other_sends_nothing(fleet: Fleet) -> None:
    active, standby = await fleet.relay(), await fleet.relay()
    worker = fleet.worker()
    for number in range(20):
        worker.job(f"job-{number}")
    await active.settle()
    await standby.settle()
    assert (active.relay.is_leading, standby.relay.is_leading) == (True, False)
    assert set(fleet.platform.posts_by_id().values()) == {1}
    assert len(fleet.platform.records) == 20
    assert standby.index.counters["appended"] == 0
    await active.go_on(1)
    assert fleet.left() == 0


async def test_what_is_not_delivered_survives_the_relay_and_its_disk(fleet: Fleet) -> None:
    active, standby = await fleet.relay(), await fleet.relay()
    worker = fleet.worker()
    worker.job("delivered")
    await active.settle()
    await active.go_on(1)
    fleet.platform.answer = failing(ServerError("down", status_code=503))
    worker.job("waits")
    worker.started("runs")
    await active.settle()
    await active.die()
    fleet.platform.answer = lambda report: None
    fleet.lease_runs_out()
    await standby.settle()
    worker.finished("runs")
    await standby.settle()
    assert fleet.platform.records.keys() == {"delivered", "waits", "runs"}
    assert fleet.platform.posts_by_id()["delivered"] == 1
    await standby.go_on(1)
    assert fleet.left() == 0


async def test_a_job_that_goes_on_elsewhere_under_another_relay_is_one_record_summed(fleet: Fleet) -> None:
    active, standby = await fleet.relay(), await fleet.relay()
    first, second = fleet.worker(), fleet.worker()
    first.started("a")
    first.finished("a", outcome="retried", continues=True, tokens={"prompt_tokens": 10})
    await active.settle()
    await active.die()
    fleet.lease_runs_out()
    await standby.settle()
    second.started("a", "2", retries=1)
    second.finished("a", "2", tokens={"prompt_tokens": 7})
    await standby.settle()
    assert fleet.platform.posts_by_id() == {"a": 1}
    tokens = fleet.platform.records["a"].tokens
    assert tokens is not None
    assert tokens.prompt_tokens == 17


async def test_a_relay_that_comes_back_does_not_send_what_another_one_delivered_meanwhile(fleet: Fleet) -> None:
    first, second = await fleet.relay(), await fleet.relay()
    worker = fleet.worker()
    fleet.platform.answer = failing(ServerError("down", status_code=503, retry_after="5"))
    worker.started("a")
    worker.finished("a", outcome="failed", result="at first")
    await first.settle()
    assert first.phase("a") is Phase.DUE
    fleet.lease_runs_out()
    fleet.platform.answer = lambda report: None
    await second.go_on(10)
    worker.finished("a", outcome="failed", result="at last")
    await second.go_on(10)
    posts = fleet.platform.posts_by_id()["a"]
    assert fleet.platform.records["a"].result == "at last"
    fleet.lease_runs_out()
    await first.go_on(60)
    assert first.relay.is_leading
    assert fleet.platform.posts_by_id()["a"] == posts
    assert fleet.platform.records["a"].result == "at last"


async def test_a_relay_that_restarts_goes_on_with_what_it_had_and_reads_nothing_twice(fleet: Fleet) -> None:
    relay = await fleet.relay()
    fleet.platform.answer = failing(ServerError("down", status_code=503))
    fleet.worker().job("a")
    await relay.settle()
    tries = relay.row("a").tries
    await relay.die()
    fleet.lease_runs_out()
    relay.start()
    await relay.turn()
    assert relay.index.counters["appended"] == 2
    assert relay.row("a").tries >= tries
    fleet.platform.answer = lambda report: None
    await relay.go_on(300)
    assert relay.phase("a") is Phase.SETTLED
    assert fleet.left() == 0


async def test_what_was_delivered_and_not_acknowledged_is_not_sent_again_by_the_same_index(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = await fleet.relay()
    fleet.worker().job("a")
    monkeypatch.setattr(relay.relay._reader, "acknowledge", lambda receipts: False)  # it dies before
    await relay.settle()
    assert fleet.left() == 2
    await relay.die()
    fleet.lease_runs_out()
    relay.start()
    await relay.go_on(1)
    assert fleet.platform.posts_by_id() == {"a": 1}
    assert fleet.left() == 0


async def test_dead_reports_stay_in_redis_until_they_are_purged(fleet: Fleet) -> None:
    first, second = await fleet.relay(), await fleet.relay()
    fleet.platform.answer = failing(RequestRefusedError("no", status_code=422))
    fleet.worker().job("a")
    await first.settle()
    assert first.phase("a") is Phase.DEAD
    await first.die()
    fleet.lease_runs_out()
    await second.go_on(1)
    assert second.phase("a") is Phase.DEAD
    assert fleet.left() == 2
    second.index.delete([second.row("a")])
    await second.go_on(1)
    assert fleet.left() == 0


async def test_a_report_that_kills_its_relays_is_dead_at_last_wherever_they_run(fleet: Fleet) -> None:
    houses = [await fleet.relay(), await fleet.relay()]
    fleet.worker().job("poison")
    fleet.worker().job("good")

    async def never(report: TaskReport) -> None:
        if report.id == "poison":
            house.is_killed_here()
            await asyncio.Event().wait()

    fleet.platform.answer = never
    deaths = 0
    for turn in range(20):
        house = houses[turn % 2]
        for _ in range(5):
            await house.turn()
            fleet.clock.advance(0.3)
        if house.row_exists("poison") and house.phase("poison") is Phase.DEAD:
            break
        if house.relay.delivery.is_sending:
            deaths += 1
            await house.restart()
            fleet.platform.in_flight.clear()
        fleet.lease_runs_out()
    assert deaths <= 6
    assert house.phase("poison") is Phase.DEAD
    assert "good" in fleet.platform.records


async def test_while_redis_is_away_nothing_is_sent_once_the_term_is_over(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = await fleet.relay()
    fleet.platform.answer = failing(ServerError("down", status_code=503, retry_after="20"))
    fleet.worker().job("a")
    await relay.settle()
    fleet.platform.answer = lambda report: None
    posts = len(fleet.platform.posts)
    with monkeypatch.context() as patch:
        patch.setattr(
            relay.relay._reader._client, "call", lambda commands: (_ for _ in ()).throw(TimeoutError("frozen"))
        )
        await relay.go_on(60)
        assert not relay.relay.is_leading
        assert len(fleet.platform.posts) == posts
    await relay.go_on(10)
    assert fleet.platform.records.keys() == {"a"}
    assert relay.index.counters["appended"] == 2


async def test_a_request_to_wait_is_kept_by_the_relay_that_follows(fleet: Fleet) -> None:
    first, second = await fleet.relay(), await fleet.relay()
    fleet.platform.answer = failing(RateLimitedError("slow down", retry_after="120"))
    fleet.worker().job("a")
    await first.settle()
    fleet.platform.answer = lambda report: None
    await first.die()
    fleet.lease_runs_out()
    await second.go_on(100)
    assert second.relay.gate.flow is Flow.THROTTLED
    assert len(fleet.platform.posts) == 1
    await second.go_on(30)
    assert fleet.platform.records.keys() == {"a"}


async def test_the_rate_limit_holds_for_all_relays_together(fleet: Fleet) -> None:
    first, second = await fleet.relay(rate_limit_per_minute=60), await fleet.relay(rate_limit_per_minute=60)
    worker = fleet.worker()
    for number in range(120):
        worker.job(f"job-{number}")
    first.relay.is_eager = second.relay.is_eager = True  # so that what came of a report is stored at once
    for house in (first, second) * 4:  # each of them begins with a burst, if it believes that it may
        await house.go_on(4, step_s=1)
        fleet.lease_runs_out(after_s=0)
    times = fleet.platform.times()
    assert len(times) > 20
    assert max(sum(begin <= at < begin + 60 for at in times) for begin in times) <= 60


async def test_an_unknown_agent_is_held_by_the_relay_that_follows_too(fleet: Fleet) -> None:
    first, second = await fleet.relay(), await fleet.relay()
    fleet.platform.answer = failing(NotFoundError("no such agent", status_code=404))
    fleet.worker().job("a")
    await first.settle()
    assert first.phase("a") is Phase.HELD
    await first.die()
    fleet.lease_runs_out()
    await second.settle()
    assert second.phase("a") is Phase.HELD
    fleet.platform.answer = lambda report: None
    await second.go_on(70)
    assert fleet.platform.records.keys() == {"a"}


async def test_after_flushall_what_the_index_has_is_delivered(fleet: Fleet) -> None:
    relay = await fleet.relay()
    worker = fleet.worker()
    fleet.platform.answer = failing(ServerError("down", status_code=503))
    worker.job("before")
    await relay.settle()
    fleet.server.client.ask("FLUSHALL")
    fleet.platform.answer = lambda report: None
    worker.job("after")
    await relay.go_on(300, step_s=5)
    assert fleet.platform.records.keys() == {"before", "after"}
    assert fleet.left() == 0


async def test_a_relay_that_has_no_room_to_take_over_lets_another_one_do_it(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, full, healthy = await fleet.relay(), await fleet.relay(), await fleet.relay()

    def no_room(now: float) -> None:
        raise IndexFullError("the disk is full")

    monkeypatch.setattr(full.index, "hand_over", no_room)
    fleet.platform.answer = failing(ServerError("down", status_code=503))
    fleet.worker().job("a")
    await first.settle()
    await first.die()
    fleet.platform.answer = lambda report: None
    fleet.lease_runs_out()
    await full.turn()
    assert not full.relay.is_leading
    await full.turn()
    await healthy.settle()
    assert fleet.platform.records.keys() == {"a"}


class Story:
    """What happens to a fleet by chance, and what its jobs say of themselves."""

    TROUBLES: tuple[Exception | None, ...] = (
        None,
        ServerError("down", status_code=503),
        RateLimitedError("slow", retry_after="7"),
        NetworkError("the reply was lost"),
    )

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet = fleet
        self.chance = random.Random(seed)
        self.workers = [fleet.worker(), fleet.worker()]
        self.houses: list[RelayHouse] = []
        self.running: dict[str, tuple[int, list[int]]] = {}  # attempt, and what each attempt spends
        self.expected: dict[str, int] = {}
        self.trouble: Exception | None = None
        self._numbers = itertools.count(1)
        fleet.platform.answer = self._answer

    def _answer(self, report: TaskReport) -> None:
        if self.trouble is not None:
            if isinstance(self.trouble, NetworkError):
                self.fleet.platform.records[str(report.id)] = report
            raise self.trouble

    def begin_job(self) -> None:
        job_id = f"job-{next(self._numbers)}"
        self.running[job_id] = (1, [])
        self.chance.choice(self.workers).started(job_id)

    def go_on_with_job(self) -> None:
        if not self.running:
            return
        job_id = self.chance.choice(list(self.running))
        attempt, spent = self.running.pop(job_id)
        spent = [*spent, self.chance.randint(1, 9)]
        worker, usage = self.chance.choice(self.workers), {"prompt_tokens": spent[-1]}
        if self.chance.random() < 0.4:
            worker.finished(job_id, str(attempt), outcome="retried", continues=True, tokens=usage)
            self.running[job_id] = (attempt + 1, spent)
            worker.started(job_id, str(attempt + 1), retries=attempt)
        else:
            worker.finished(job_id, str(attempt), tokens=usage)
            self.expected[job_id] = sum(spent)

    def change_platform(self) -> None:
        self.trouble = self.chance.choice(self.TROUBLES)

    async def let_work(self) -> None:
        house = self.chance.choice(self.houses)
        for _ in range(self.chance.randint(1, 4)):
            await house.turn()
            self.fleet.clock.advance(0.2)

    async def take_over(self) -> None:
        self.fleet.lease_runs_out(after_s=self.chance.choice([0, 6]))

    async def kill_relay(self) -> None:
        place = self.chance.randrange(len(self.houses))
        house = self.houses[place]
        if self.chance.random() < 0.5:
            await house.restart()
        else:  # with its disk
            await house.die()
            self.fleet._houses.remove(house)
            self.houses[place] = await self.fleet.relay()

    async def tell(self, steps: int) -> None:
        self.houses = [await self.fleet.relay(), await self.fleet.relay()]
        self.fleet.loses_reply = lambda: self.chance.random() < 0.05
        for _ in range(steps):
            what = self.chance.choice(
                [self.begin_job, self.go_on_with_job, self.go_on_with_job, self.change_platform]
                + [self.let_work] * 4
                + [self.take_over, self.kill_relay]
            )
            happens = what()
            if happens is not None:
                await happens
        while self.running:
            self.go_on_with_job()
        self.trouble = None
        self.fleet.loses_reply = lambda: False


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_to_relays_and_their_disks_every_job_has_one_record_with_all_it_spent(
    fleet: Fleet, seed: int
) -> None:
    story = Story(fleet, seed)
    await story.tell(80)
    for _ in range(40):
        for house in story.houses:
            await house.go_on(4, step_s=2)
        if fleet.left() == 0:
            break
        fleet.lease_runs_out()
    records = fleet.platform.records
    assert {
        job_id: report.tokens.prompt_tokens for job_id, report in records.items() if report.tokens
    } == story.expected
    assert fleet.left() == 0


async def test_a_relay_that_slept_longer_than_its_lease_sends_nothing_of_before(fleet: Fleet) -> None:
    first = await fleet.relay(concurrency=1, rate_limit_per_minute=10)
    worker = fleet.worker()
    worker.job("busy")
    worker.job("a", result="old")
    first.relay.turn()
    for _ in range(20):
        await asyncio.sleep(0)
    assert fleet.platform.posts_by_id() == {"busy": 1}  # the other one is ready
    fleet.lease_runs_out(after_s=60)
    second = await fleet.relay()
    failed = {"outcome": "failed", "result": "the result could not be stored"}
    owner, facts = worker.journal.process_id, {"task": "shop.charge", "agent_id": "agent"}
    worker._append("a", "1", kind="ended", owner=owner, facts=facts, **failed)
    await second.go_on(2)
    assert fleet.platform.records["a"].result == "the result could not be stored"
    fleet._readers[1].close()
    fleet.clock.advance(30)
    first.clock.advance(60)
    await first.go_on(120)
    assert first.relay.is_leading
    assert fleet.platform.records["a"].result == "the result could not be stored"
    assert fleet.platform.posts_by_id()["a"] == 1


async def test_a_relay_that_cannot_ask_redis_does_not_take_itself_for_drained(fleet: Fleet) -> None:
    house = await fleet.relay()
    await house.settle()
    assert house.relay.is_drained
    fleet.worker().job("a")
    fleet.clock.advance(1)
    fleet.loses_reply = lambda: True
    assert house.relay.turn() > 0  # nor does it turn without a rest
    assert house.relay.is_leading
    assert not house.relay.is_drained
    fleet.loses_reply = lambda: False
    fleet.clock.advance(5)
    await house.go_on(5)
    assert set(fleet.platform.records) == {"a"}
    assert house.relay.is_drained


async def test_a_dead_worker_is_said_to_be_gone_before_the_relay_of_its_host_removes_its_file(
    fleet: Fleet, tmp_path: Path
) -> None:
    spill = FileJournal(tmp_path / "host")
    worker = RedisJournal(fleet.server.url, "destination", spill=spill, clock=fleet.clock.now)
    worker.open()
    process_id = worker.process_id
    clock = HandClock()
    reader = RedisReader(fleet.server.url, "destination", identity="i", directory=tmp_path / "host", clock=clock.now)
    reader._spool._reader._clock = clock.now  # type: ignore[union-attr]
    reader.sync()
    assert reader.is_alive(process_id)
    spill._start_anew()  # as the kernel does for a process that is killed: its locks are free
    clock.advance(10)
    reader.sync()
    assert not liveness.has_file(tmp_path / "host", process_id)
    clock.advance(2)
    assert not reader.is_alive(process_id)
    worker.close()
    reader.close()


@pytest.mark.parametrize("entry", [("e" + "9" * 5000, "{}"), ("dropped", "9" * 5000)])
async def test_an_entry_with_a_number_that_nobody_reads_is_debris(fleet: Fleet, entry: tuple[str, str]) -> None:
    fleet.server.client.ask("XADD", KEYS.stream, "*", *entry)
    house = await fleet.relay()
    fleet.worker().job("a")
    await house.go_on(5)
    assert set(fleet.platform.records) == {"a"}
    assert house.index.counters["corrupt"] == 1
