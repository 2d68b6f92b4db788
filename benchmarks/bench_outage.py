"""A platform that is down for a day while reports wait, and how the relay gets rid of them afterwards.

    python benchmarks/bench_outage.py [--waiting N] [--rate-limit PER_MINUTE] [--directory PATH] [--json]

The relay is the real one with its real index; the day is simulated by a clock that is told to go on, and the platform
is a double that refuses and then takes everything. Exits with 1 when something was lost or sent twice, when there were
more requests than one a minute while the platform was down or than the rate limit allows afterwards, or when memory
went beyond the budget.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from bisect import bisect_left
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.relay import RelayHouse
from xpander_celery.errors import NetworkError
from xpander_celery.events import decode, encode
from xpander_celery.fold import fold
from xpander_celery.relay.index import Index
from xpander_celery.relay.rows import Change, Phase
from xpander_celery.report import TaskReport

DAY_S = 86_400.0
MOST_MEMORY_MB = 60.0
FIRST_TRIES = 15  # until the breaker rests for a whole minute
_AT_ONCE = 500
_LEAST_REST_S = 60.0


class Platform:
    """Refuses connections until it is up. What it took is counted by the number of each job."""

    def __init__(self, house: RelayHouse | None, count: int) -> None:
        self.house = house
        self.is_up = False
        self.taken = bytearray(count)
        self.refused_at: list[float] = []
        self.most_in_a_minute = 0
        self._last_minute: deque[float] = deque()

    def __call__(self) -> Platform:
        return self

    async def send(self, report: TaskReport) -> None:
        assert self.house is not None
        now = self.house.clock.now()
        if not self.is_up:
            self.refused_at.append(now)
            raise NetworkError("POST: no answer (ConnectError: connection refused)")
        self.taken[int(str(report.id).rpartition("-")[2])] += 1
        self._last_minute.append(now)
        while self._last_minute[0] <= now - 60 + 1e-5:  # what a float leaves of a minute of small steps
            self._last_minute.popleft()
        self.most_in_a_minute = max(self.most_in_a_minute, len(self._last_minute))

    async def has_ended(self, report: TaskReport) -> bool:
        return False

    async def aclose(self) -> None: ...


def state_of_a_job(at: float) -> str:
    """What the index keeps of a job whose report is about 1.5 KB; its id is `JOB`."""
    base = {"v": 1, "job_id": "JOB", "attempt_id": "1" * 32, "at": at}
    facts = {"task": "shop.charge", "agent_id": "agent-123", "input": "The question was a long one. " * 12}
    facts |= {"queue": "celery", "worker": "celery@host", "trace_id": "f" * 32}
    result = "All 1,204 invoices were read, and 17 of them need a second look. " * 12
    events = [
        base | {"kind": "started", "child": "0" * 16, "owner": "0" * 16, "facts": facts},
        base | {"kind": "finished", "outcome": "succeeded", "duration_s": 0.1, "result": result},
    ]
    return fold([decode(encode(event)) for event in events]).model_dump_json()


def let_wait(directory: Path, count: int, at: float) -> None:
    """An index as an earlier relay leaves it that could not deliver."""
    index = Index.open(directory, max_bytes=64 * 1024**3)
    state = state_of_a_job(at)
    for first in range(0, count, _AT_ONCE):
        ids = [
            f"{number * 2654435761 % 2**32:08x}-0000-4000-8000-{number}"
            for number in range(first, min(first + _AT_ONCE, count))
        ]
        index.record([Change(i, Phase.DUE, at, state=state.replace("JOB", i), agent_id="agent-123") for i in ids], at)
    index.close()


async def outage(directory: Path, count: int, per_minute: int) -> dict[str, float]:
    platform = Platform(None, count)
    settings = {"rate_limit_per_minute": per_minute, "max_index_bytes": 64 * 1024**3}
    house = RelayHouse(directory, targets=platform, **settings)
    platform.house = house
    let_wait(directory, count, house.clock.now())
    async with house:
        began = house.clock.now()
        while house.clock.now() < began + DAY_S:
            await house.turn()
            house.clock.advance(5.0)
        waiting, dead = house.index.count(Phase.DUE), house.index.count(Phase.DEAD)
        platform.is_up = True
        up_at, cpu_s = house.clock.now(), time.process_time()
        while house.index.count(Phase.DUE) or not house.relay.is_quiet:
            before = sum(house.index.counters.values())
            await house.turn()
            house.relay.store()
            if sum(house.index.counters.values()) == before:
                house.clock.advance(0.1)  # what could be sent by now was sent
        drained_s, cpu_s = house.clock.now() - up_at, time.process_time() - cpu_s
        settled = house.index.counters["delivered"]
    return {
        "waiting_after_a_day": waiting,
        "dead_after_a_day": dead,
        "requests_of_the_day": len(platform.refused_at),
        "requests_of_its_first_minutes": bisect_left(platform.refused_at, began + 180),
        "least_rest_s": least_rest(platform.refused_at, began + 180),
        "rate_limit_per_minute": per_minute,
        "most_in_a_minute": platform.most_in_a_minute,
        "simulated_minutes_to_drain": drained_s / 60,
        "cpu_us_per_report": cpu_s / count * 1e6,
        "delivered": settled,
        "lost": platform.taken.count(0),
        "sent_twice": sum(times > 1 for times in platform.taken),
        "memory_mb": most_memory_mb(),
    }


def least_rest(times: list[float], after: float) -> float:
    """The shortest time between two requests, once the breaker has found its pace."""
    later = times[bisect_left(times, after) :]
    return min((b - a for a, b in pairwise(later)), default=float("inf"))


def most_memory_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def broken(figures: dict[str, float], count: int) -> list[str]:
    """The promises that do not hold."""
    promises = {
        "all wait": figures["waiting_after_a_day"] == count and not figures["dead_after_a_day"],
        "one request a minute": figures["least_rest_s"] >= _LEAST_REST_S,
        "few first tries": figures["requests_of_its_first_minutes"] <= FIRST_TRIES,
        "the rate limit": figures["most_in_a_minute"] <= figures["rate_limit_per_minute"],
        "nothing lost": not figures["lost"] and figures["delivered"] == count,
        "nothing sent twice": not figures["sent_twice"],
        "memory": figures["memory_mb"] <= MOST_MEMORY_MB,
    }
    return [name for name, holds in promises.items() if not holds]


def main() -> int:
    """Simulate, print, and say by the exit status whether the promises hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--waiting", type=int, help="reports that wait (default 1,000,000; quick: 20,000)")
    parser.add_argument("--rate-limit", type=int, help="reports per minute (default: a twentieth of those that wait)")
    parser.add_argument("--quick", action="store_true", help="smaller, for CI")
    parser.add_argument("--directory", type=Path, help="where to write (default: the temporary directory)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    count = options.waiting or (20_000 if options.quick else 1_000_000)
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        directory = Path(place) / "destination"
        directory.mkdir(mode=0o700)
        figures: dict[str, Any] = asyncio.run(outage(directory, count, options.rate_limit or max(1, count // 20)))
    failed = broken(figures, count)
    if options.json:
        print(json.dumps(figures | {"broken": failed}))
    else:
        for name, value in figures.items():
            print(f"  {name.replace('_', ' '):<40} {value:14,.1f}")
        print(f"broken: {', '.join(failed)}" if failed else "every promise holds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
