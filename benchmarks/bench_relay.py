"""What the relay costs and how fast it is: throughput, latency, memory, start-up, and growth with what waits.

    python benchmarks/bench_relay.py [--only PART ...] [--waiting N] [--quick] [--directory PATH] [--json]

A real relay process delivers to a bare HTTP server in another process. Throughput is counted by the relay's own CPU
time, so that a busy machine does not change it; growth compares two indexes whose turns alternate. Exits with 1 when a
budget is exceeded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bare_platform import official_report_s, platform

from xpander_celery.events import decode, encode
from xpander_celery.fold import fold
from xpander_celery.journal import Batch
from xpander_celery.journal.files import FileJournal
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.index import Index
from xpander_celery.relay.ingest import MAX_BATCH, Ingest
from xpander_celery.relay.policy import Fate
from xpander_celery.relay.rows import Change, Phase, Result
from xpander_celery.relay.status import Status, is_running

AT_MOST = {
    "latency_p99_s": 1.0,
    "start_up_s": 0.3,
    "idle_cpu_percent": 1.0,
    "idle_memory_mb": 45.0,
    "waiting_memory_mb": 60.0,
    "growth_of_index_work": 1.2,
    "growth_of_ingest": 2.0,
}
AT_LEAST = {
    "reports_per_core_second": 1500.0,
    "times_the_official_client": 25.0,
    "share_of_concurrency_by_round_trip": 0.8,
}
ROUND_TRIP_S = 0.05
FEW = 10_000


@contextlib.contextmanager
def relay(config: RelayConfig, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-P", "-m", "xpander_celery.relay", *options]
    environ = {**os.environ, **config.to_environ()}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(condition: Any, timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("a part of the benchmark did not come to its end")
        time.sleep(0.005)


def job_id(number: int) -> str:
    return f"{number * 2654435761 % 2**32:08x}-0000-4000-8000-{number:012d}"  # in no order, as random ids are


def events_of(number: int, process_id: str) -> list[dict[str, Any]]:
    """The two events of a job; its report is about 1.5 KB."""
    base = {"v": 1, "job_id": job_id(number), "attempt_id": f"{number:032x}", "at": time.time()}
    facts = {"task": "shop.charge", "agent_id": "agent-123", "input": "The question was a long one. " * 12}
    facts |= {"queue": "celery", "worker": "celery@host", "trace_id": "f" * 32}
    result = "All 1,204 invoices were read, and 17 of them need a second look. " * 12
    tokens = {"completion_tokens": 412, "prompt_tokens": 1890}
    return [
        base | {"kind": "started", "child": process_id, "owner": process_id, "facts": facts},
        base | {"kind": "finished", "outcome": "succeeded", "duration_s": 0.1, "result": result, "tokens": tokens},
    ]


def write_jobs(journal: FileJournal, numbers: range) -> None:
    for number in numbers:
        for event in events_of(number, journal.process_id):
            journal.append(event)


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


# The parts


def throughput(directory: Path, reports: int) -> dict[str, float]:
    """From segments to the platform, start-up taken off: what one core can do."""
    journal = FileJournal(directory)
    with platform() as target:
        config = RelayConfig(directory, api_key="key", base_url=target.url)
        idle_cpu_s = _cpu_of_one_run(config)
        write_jobs(journal, range(reports))
        cpu_s = _cpu_of_one_run(config) - idle_cpu_s
        times = [at for _, at in target.arrivals()]
    journal.close()
    assert len(times) == reports
    return {"reports_per_core_second": reports / cpu_s, "reports_per_second": reports / (times[-1] - times[0])}


def _cpu_of_one_run(config: RelayConfig) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with relay(config, "--once", "--for", "600") as process:
        assert process.wait() == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def official_client(reports: int, ours_per_s: float) -> dict[str, float]:
    """How many times the official client's sequential rate ours is; both by CPU time, which favours the other."""
    found = official_report_s(reports, "areport_external_task")
    if found is None:
        return {}
    cpu_s, elapsed_s = found
    return {
        "times_the_official_client": ours_per_s * cpu_s,
        "official_cpu_ms": cpu_s * 1000,
        "official_ms": elapsed_s * 1000,
    }


def round_trips(directory: Path, reports: int) -> dict[str, float]:
    journal = FileJournal(directory)
    write_jobs(journal, range(reports))
    with platform(ROUND_TRIP_S) as target:
        config = RelayConfig(directory, api_key="key", base_url=target.url)
        with relay(config, "--once", "--for", "600") as process:
            assert process.wait() == 0
        times = [at for _, at in target.arrivals()]
    journal.close()
    rate = (len(times) - 1) / (times[-1] - times[0])
    return {"share_of_concurrency_by_round_trip": rate * ROUND_TRIP_S / config.concurrency, "rate_at_50_ms": rate}


def at_rest(directory: Path, seconds: float, jobs: int) -> dict[str, float]:
    """A relay that has delivered something and waits: latency of single jobs, memory, CPU."""
    journal = FileJournal(directory)
    journal.open()
    with platform() as target:
        config = RelayConfig(directory, api_key="key", base_url=target.url)
        with relay(config) as process:
            write_jobs(journal, range(500))
            until(lambda: len(target.arrivals()) == 500)
            ended = {}
            for number in range(500, 500 + jobs):
                write_jobs(journal, range(number, number + 1))
                ended[job_id(number)] = time.monotonic()
                time.sleep(0.13)
            until(lambda: len(target.arrivals()) == 500 + jobs)
            latencies = sorted(at - ended[known] for known, at in target.arrivals() if known in ended)
            time.sleep(1.0)
            cpu_s, began = cpu_of(process.pid), time.monotonic()
            time.sleep(seconds)
            share = (cpu_of(process.pid) - cpu_s) / (time.monotonic() - began)
            memory_mb = memory_of(process.pid)
    journal.close()
    return {
        "latency_p50_s": statistics.median(latencies),
        "latency_p99_s": latencies[int(len(latencies) * 0.99)],
        "idle_cpu_percent": share * 100,
        "idle_memory_mb": memory_mb,
    }


def start_up(directory: Path, runs: int) -> dict[str, float]:
    """From execution to the first status, which is written when the first turn is done. The best run counts."""
    config = RelayConfig(directory, api_key="key", base_url="http://127.0.0.1:9")
    taken = []
    for _ in range(runs):
        with contextlib.suppress(FileNotFoundError):
            (directory / "relay.json").unlink()
        began = time.monotonic()
        with relay(config, "--stay"):
            until(lambda: Status.read(directory) is not None)
            taken.append(time.monotonic() - began)
        until(lambda: not is_running(directory))
    return {"start_up_s": min(taken), "start_up_median_s": statistics.median(taken)}


class Source:
    """A journal without end, of jobs that are over."""

    def __init__(self, first: int) -> None:
        self.number = first

    def poll(self, limit: int) -> Batch:
        numbers = range(self.number, self.number + limit // 2)
        self.number = numbers.stop
        texts = [encode(event) for number in numbers for event in events_of(number, "0" * 16)]
        return Batch(events=[decode(text) for text in texts], positions={"s": self.number})

    def settle(self, batch: Batch) -> None: ...

    def resume(self, positions: Any) -> None: ...

    def sync(self) -> None: ...

    def is_alive(self, process_id: str) -> bool:
        return True

    def backlog_bytes(self) -> int:
        return 0


class Waiting:
    """An index with so many reports waiting."""

    def __init__(self, directory: Path, count: int) -> None:
        self.index = Index.open(directory, max_bytes=64 * 1024**3)
        self.ingest = Ingest(
            reader=Source(count), index=self.index, redelivery_wait_s=7200, set_aside=lambda job_id, events: None
        )
        self._fill(count)

    def _fill(self, count: int) -> None:
        """As ingest would, but for the reading and folding of each job."""
        events = [decode(encode(event)) for event in events_of(0, "0" * 16)]
        state = fold(events).model_dump_json()
        for first in range(0, count, MAX_BATCH):
            now = time.time()
            ids = [job_id(number) for number in range(first, min(first + MAX_BATCH, count))]
            states = [state.replace(job_id(0), known) for known in ids]
            changes = [
                Change(known, Phase.DUE, now, state=text, agent_id="agent-123")
                for known, text in zip(ids, states, strict=True)
            ]
            self.index.record(changes, now)

    def ingest_us(self) -> float:
        began = time.perf_counter()
        self.ingest.take(time.time())
        return (time.perf_counter() - began) / MAX_BATCH * 1e6

    def work_us(self) -> float:
        began = time.perf_counter()
        jobs = self.index.due(time.time() + 1, limit=MAX_BATCH // 2, max_bytes=2**30)
        results = [Result(j.row, j.revision, j.phase, j.size, Fate.SETTLED, digest=b"x" * 16) for j in jobs]
        self.index.finish(results, time.time())
        return (time.perf_counter() - began) / len(jobs) * 1e6


def growth(directory: Path, many: int, rounds: int) -> dict[str, float]:
    """Two indexes take turns; a round takes in as many reports as it acknowledges, so that both keep their size."""
    for name in ("few", "many"):
        (directory / name).mkdir()
    indexes = {"few": Waiting(directory / "few", FEW), "many": Waiting(directory / "many", many)}
    ingest: dict[str, list[float]] = {"few": [], "many": []}
    work: dict[str, list[float]] = {"few": [], "many": []}
    for number in range(rounds):
        for name in sorted(indexes, reverse=bool(number % 2)):
            ingest[name].append(indexes[name].ingest_us())
            work[name].append(indexes[name].work_us())
    for waiting in indexes.values():
        waiting.index.close()
    middle = {f"ingest_us_{name}": statistics.median(values) for name, values in ingest.items()}
    middle |= {f"work_us_{name}": statistics.median(values) for name, values in work.items()}
    return middle | {
        "waiting": float(many),
        "growth_of_ingest": middle["ingest_us_many"] / middle["ingest_us_few"],
        "growth_of_index_work": middle["work_us_many"] / middle["work_us_few"],
    }


def memory_while_much_waits(directory: Path, seconds: float) -> dict[str, float]:
    """The most that a relay takes, first with the platform down, then while it drains."""
    journal = FileJournal(directory)
    journal.open()
    most = 0.0
    down = RelayConfig(directory, api_key="key", base_url="http://127.0.0.1:9", max_index_bytes=64 * 1024**3)
    with platform() as target:
        up = RelayConfig(directory, api_key="key", base_url=target.url, max_index_bytes=64 * 1024**3)
        for config in (down, up):
            with relay(config) as process:
                deadline = time.monotonic() + seconds
                while time.monotonic() < deadline:
                    most = max(most, memory_of(process.pid))
                    time.sleep(0.05)
    journal.close()
    return {"waiting_memory_mb": most}


PARTS = ("throughput", "round-trips", "start-up", "at-rest", "growth")


def measured(options: argparse.Namespace) -> dict[str, float]:
    figures: dict[str, float] = {}
    quick = options.quick
    with tempfile.TemporaryDirectory(dir=options.directory) as place:
        for part in options.only or PARTS:
            folder = Path(place) / part
            folder.mkdir(mode=0o700)
            match part:
                case "throughput":
                    figures |= throughput(folder, 3000 if quick else 20_000)
                    figures |= official_client(40 if quick else 150, figures["reports_per_core_second"])
                case "round-trips":
                    figures |= round_trips(folder, 400 if quick else 1600)
                case "start-up":
                    figures |= start_up(folder, 5 if quick else 10)
                case "at-rest":
                    figures |= at_rest(folder, 4.0 if quick else 15.0, 20 if quick else 200)
                case "growth":
                    figures |= growth(folder, options.waiting, 20 if quick else 60)
                    figures |= memory_while_much_waits(folder / "many", 5.0 if quick else 15.0)
    return figures


def exceeded(figures: dict[str, float]) -> list[str]:
    """The budgets that do not hold."""
    over = [name for name, budget in AT_MOST.items() if figures.get(name, budget) > budget]
    return over + [name for name, budget in AT_LEAST.items() if figures.get(name, budget) < budget]


def show(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        budget = f"at most {AT_MOST[name]:g}" if name in AT_MOST else ""
        budget = f"at least {AT_LEAST[name]:g}" if name in AT_LEAST else budget
        print(f"  {name.replace('_', ' '):<40} {value:12,.3f}   {budget}")


def main() -> int:
    """Measure, print, and say by the exit status whether the budgets hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--waiting", type=int, help="reports that wait (default 1,000,000; quick: 50,000)")
    parser.add_argument("--quick", action="store_true", help="smaller, for CI")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--directory", type=Path, help="where to write (default: the temporary directory)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    options.waiting = options.waiting or (50_000 if options.quick else 1_000_000)
    figures = measured(options)
    over = exceeded(figures)
    if options.json:
        print(json.dumps(figures | {"exceeded": over}))
    else:
        show(figures)
        print(f"over budget, so the exit status is 1: {', '.join(over)}" if over else "every budget holds")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
