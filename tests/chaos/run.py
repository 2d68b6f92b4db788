"""Workers, relays and platform are killed at random under load; then it is counted what is missing.

    python -m tests.chaos.run [--redis] [--seconds N] [--seed N] [--rate N]

With `--redis` there are three workers and two relays, each on a machine of its own, and a Redis holds the journal. Of a
machine whose worker or relay is killed, the disk is gone too.

What should have arrived is told by the jobs' own ledger, what did arrive by the platform's records; neither is a
counter of this package. Lost must be 0, and no job may have two records. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
from celery import Celery

from tests.support.broker import Broker, start_redis
from tests.support.redis_server import running_redis
from tests.support.sandbox import Sandbox, start_sandbox
from tests.support.waiting import until
from tests.support.worker import AGENT, Worker, start_worker
from xpander_celery.demo.processes import clean_environ
from xpander_celery.journal.location import destination_directory
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.status import Status, is_running

APP = "tests.chaos.app"
_DRAINS_WITHIN_S = 180.0


class Platform:
    """A sandbox on a port of its own that keeps its records on disk and can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self._database = directory / "platform.db"
        self._port = 0
        self.posts: Counter[str] = Counter()
        self.start()

    def start(self) -> None:
        self._stack = contextlib.ExitStack()
        self.sandbox: Sandbox = self._stack.enter_context(start_sandbox("--db", str(self._database), port=self._port))
        self._port = int(self.sandbox.url.rpartition(":")[2])

    def note_posts(self) -> None:
        """Its log of what arrived goes with it, so it is read before."""
        with contextlib.suppress(httpx.HTTPError):
            self.posts.update(self.sandbox.posts_by_id())

    def kill(self) -> None:
        self.note_posts()
        self.sandbox.process.kill()
        self._stack.close()


class Chaos:
    """Everything that runs, and the hand that kills it."""

    APP = APP
    OPTIONS: tuple[str, ...] = ("--concurrency=2",)
    WORKERS = 2
    VICTIMS = ("_kill_child", "_kill_worker", "_kill_relay", "_kill_relay", "_kill_platform")

    def __init__(self, directory: Path, broker: Broker, chance: random.Random) -> None:
        self.directory = directory
        self.broker = broker
        self.chance = chance
        self.platform = Platform(directory)
        self.kills: Counter[str] = Counter()
        self.killed_children: list[int] = []
        self.ledger = directory / "ledger"
        self._stacks: list[contextlib.ExitStack] = []
        self._workers: list[Worker] = []
        self._number = 0
        for _ in range(self.WORKERS):
            self._start_worker()

    def _settings(self) -> dict[str, str]:
        """What differs between a journal of files and one in Redis."""
        return {"XPANDER_CELERY_JOURNAL": str(self.directory / "journal")}

    @property
    def journal(self) -> Path | None:
        """The folder of the destination, once there is one."""
        return next(iter((self.directory / "journal").glob("*/")), None)

    def _start_worker(self) -> None:
        self._number += 1
        place = self.directory / f"worker-{self._number}"
        place.mkdir()
        stack = contextlib.ExitStack()
        worker = stack.enter_context(
            start_worker(
                self.broker,
                place,
                *self.OPTIONS,
                f"--hostname=chaos-{self._number}@%h",
                app=self.APP,
                XPANDER_BASE_URL=self.platform.sandbox.url,
                XPANDER_API_KEY=self.platform.sandbox.api_key,
                CHAOS_LEDGER=str(self.ledger),
                **self._settings(),
            )
        )
        self._stacks.append(stack)
        self._workers.append(worker)

    def kill_something(self) -> None:
        getattr(self, self.chance.choice(self.VICTIMS))()

    def _kill_worker(self) -> None:
        place = self.chance.randrange(len(self._workers))
        worker, stack = self._workers.pop(place), self._stacks.pop(place)
        main = psutil.Process(worker.pid)
        for process in (main, *main.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.kills["worker"] += 1
        stack.close()
        self._lose_disk(worker.process.log.parent)
        self._start_worker()

    def _lose_disk(self, place: Path) -> None:
        """The next worker finds the journal that this one wrote to."""

    def _kill_child(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker = psutil.Process(self.chance.choice(self._workers).pid)
            command = worker.cmdline()  # that of a relay, which it may have started, is another
            children = [child for child in worker.children() if child.cmdline() == command]
            if children:
                child = self.chance.choice(children)
                child.kill()
                self.killed_children.append(child.pid)
                self.kills["child"] += 1

    def _kill_relay(self) -> None:
        status = Status.read(self.journal) if self.journal is not None and is_running(self.journal) else None
        if status is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(status.pid)
            if "xpander_celery.relay" in process.cmdline():
                process.kill()
                self.kills["relay"] += 1

    def _kill_platform(self) -> None:
        self.platform.kill()
        self.kills["platform"] += 1
        time.sleep(self.chance.uniform(0.2, 3.0))
        self.platform.start()

    def expected(self) -> set[str]:
        return set(self.ledger.read_text().split()) if self.ledger.exists() else set()

    def records(self) -> list[str]:
        return [record["id"] for record in self.platform.sandbox.records(AGENT)]

    def stop(self) -> None:
        for worker, stack in zip(self._workers, self._stacks, strict=True):
            with contextlib.suppress(ProcessLookupError):
                worker.signal(signal.SIGTERM)
            stack.close()
        self.platform.note_posts()
        self.platform.kill()


class Fleet(Chaos):
    """The same with a journal in Redis, and machines that go away with all that they held."""

    WORKERS = 3
    RELAYS = 2
    VICTIMS = (*Chaos.VICTIMS, "_kill_worker")

    def __init__(self, directory: Path, broker: Broker, chance: random.Random) -> None:
        self._redis_stack = contextlib.ExitStack()
        self._redis = self._redis_stack.enter_context(running_redis(directory / "redis", "--appendonly", "yes"))
        self._relays: list[tuple[subprocess.Popen[bytes], RelayConfig]] = []
        super().__init__(directory, broker, chance)
        for number in range(self.RELAYS):
            self._start_relay(directory / f"relay-{number}")

    def _settings(self) -> dict[str, str]:
        return {"XPANDER_CELERY_JOURNAL": self._redis.url, "XPANDER_CELERY_RELAY": "external"}

    def _lose_disk(self, place: Path) -> None:
        shutil.rmtree(place)

    def _start_relay(self, place: Path) -> None:
        url = self.platform.sandbox.url
        directory = destination_directory(str(place), base_url=url, organization_id=None)
        directory.mkdir(parents=True, exist_ok=True)
        key = self.platform.sandbox.api_key
        config = RelayConfig(directory, api_key=key, base_url=url, journal=self._redis.url, loaded_at=time.time())
        command = [sys.executable, "-P", "-m", "xpander_celery.relay", "--stay"]
        with (self.directory / f"{place.name}.log").open("ab") as log:
            environ = clean_environ(**config.to_environ())
            self._relays.append((subprocess.Popen(command, env=environ, stdout=log, stderr=log), config))

    def _kill_relay(self) -> None:
        leading = [place for place, (_, config) in enumerate(self._relays) if _leads(config)]
        place = leading[0] if leading and self.chance.random() < 0.7 else self.chance.randrange(len(self._relays))
        process, config = self._relays.pop(place)
        process.kill()
        process.wait()
        self.kills["leading relay" if place in leading else "standby"] += 1
        disk = config.directory.parent
        if self.chance.random() < 0.5:
            shutil.rmtree(disk)
        self._start_relay(disk)

    def stop(self) -> None:
        super().stop()
        for process, _ in self._relays:
            process.kill()
            process.wait()
        self._redis_stack.close()


def _leads(config: RelayConfig) -> bool:
    status = Status.read(config.directory)
    return status is not None and status.leads


def publish(broker: Broker, rate: float, stop: threading.Event, chance: random.Random) -> None:
    """Jobs of all lengths, at an even pace."""
    with Celery("publisher", broker=broker.url, set_as_current=False) as client:
        while not stop.wait(1 / rate):
            client.send_task(f"{APP}.work", (chance.choice([0, 0, 0.05, 1.0]), chance.choice([10, 2000])))


def run(kind: type[Chaos], seconds: float, seed: int, rate: float, directory: Path) -> int:
    chance = random.Random(seed)
    stop = threading.Event()
    with start_redis() as broker:
        chaos = kind(directory, broker, chance)
        publisher = threading.Thread(target=publish, args=(broker, rate, stop, random.Random(seed + 1)))
        publisher.start()
        try:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                time.sleep(chance.uniform(0.5, 3.0))
                chaos.kill_something()
                print(f"\r{dict(chaos.kills)}  jobs {len(chaos.expected()):,}   ", end="", file=sys.stderr, flush=True)
            stop.set()
            publisher.join()
            print(file=sys.stderr)
            with contextlib.suppress(AssertionError):  # what did not arrive in time is counted as lost
                until(
                    lambda: chaos.expected() <= set(chaos.records()),
                    timeout_s=_DRAINS_WITHIN_S,
                    what="a record of every job",
                )
            return report(chaos, seed)
        finally:
            stop.set()
            publisher.join()
            chaos.stop()


def report(chaos: Chaos, seed: int) -> int:
    chaos.platform.note_posts()
    expected, records = chaos.expected(), Counter(chaos.records())
    lost = expected - records.keys()
    duplicates = sum(count - 1 for count in records.values())
    print(f"seed {seed}; killed: {', '.join(f'{name} {count}' for name, count in sorted(chaos.kills.items()))}")
    print(f"appended           {len(expected):8,}   jobs that wrote themselves into the ledger")
    print(f"delivered          {len(expected & records.keys()):8,}   of them have a record")
    print(f"lost               {len(lost):8,}   must be 0")
    print(f"duplicate records  {duplicates:8,}   must be 0")
    print(f"repeated POSTs     {sum(n - 1 for n in chaos.platform.posts.values()):8,}   of the same id; as far as seen")
    for job_id in sorted(lost)[:10]:
        print(f"  lost: {job_id}")
    return 1 if lost or duplicates or not expected else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--redis", action="store_true", help="three workers and two relays, with a journal in Redis")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long things are killed (default 120)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what is killed when")
    parser.add_argument("--rate", type=float, default=40.0, help="jobs a second")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="xpander-chaos-", ignore_cleanup_errors=True) as place:
        return run(Fleet if options.redis else Chaos, options.seconds, options.seed, options.rate, Path(place))


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    sys.exit(main())
