"""What reporting adds to a job: one attempt, no model calls, against what others add in the same run.

    python benchmarks/bench_job.py [--jobs N] [--rounds N]

Times a job as a worker traces it, in rounds that take turns, and compares what each way adds to the bare job: this
package, opentelemetry-instrumentation-celery, and an `httpx.Client`, kept alive, that posts in `task_postrun` to the
sandbox on loopback. Prints one JSON object. Needs opentelemetry-instrumentation-celery.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from celery import Celery, signals
from celery.app.trace import build_tracer
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider

import xpander_celery as xc
from xpander_celery.report import TaskReport

STRETCHES = 10
BUDGET = {"ratio_to_opentelemetry": 1.4, "times_less_than_httpx": 10.0}

app = Celery("bench", broker="memory://", backend="disabled://", set_as_current=True)


@app.task(name="bench.answer", ignore_result=True)
def answer(question: str, number: int) -> str:
    return question


def message(number: int) -> dict[str, Any]:
    """A job's message as the child of a worker gets it."""
    job_id = f"00000000-0000-4000-8000-{number:012d}"
    return {
        "lang": "py",
        "task": "bench.answer",
        "id": job_id,
        "root_id": job_id,
        "parent_id": None,
        "group": None,
        "retries": 0,
        "timelimit": [None, None],
        "argsrepr": "('How many red chairs are there?', 7)",
        "kwargsrepr": "{}",
        "origin": "gen1@host",
        "hostname": "celery@host",
        "delivery_info": {"exchange": "", "routing_key": "celery", "priority": 0, "redelivered": False},
        "traceparent": f"00-{number + 1:032x}-{number + 1:016x}-01",
        "xpander_published_at": time.time(),
        "xpander_attempt": (f"0123456789abcdef-{number:x}", "0123456789abcdef"),
        "args": ["How many red chairs are there?", 7],
        "kwargs": {},
        "is_eager": False,
    }


def seconds_per_job(jobs: int, clock: Callable[[], float]) -> float:
    """The least of ten stretches, so that what else the machine does counts least."""
    tracer = build_tracer(answer.name, app.tasks["bench.answer"], app=app)  # not the proxy that the decorator left
    messages = [message(number) for number in range(jobs)]
    stretch = max(1, jobs // STRETCHES)
    gc.collect()
    gc.disable()
    try:
        times = []
        for first in range(0, jobs, stretch):
            started = clock()
            for each in messages[first : first + stretch]:
                tracer(each["id"], each["args"], each["kwargs"], each)
            times.append((clock() - started) / stretch)
        return min(times)
    finally:
        gc.enable()


@contextmanager
def bare() -> Iterator[None]:
    yield


@contextmanager
def ours() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as directory:
        settings = {"api_key": "bench", "agent_id": "agent", "base_url": "http://127.0.0.1:9", "journal": directory}
        # a short grace, so that each job also forgets an earlier one, as in a process that has run for a while
        xc.instrument(app, **settings, late_spans_s=0.01)
        try:
            yield
            if not any(segment.stat().st_size for segment in Path(directory).glob("*/*.v*")):
                raise RuntimeError("nothing was recorded")
        finally:
            xc.uninstrument()


@contextmanager
def opentelemetry() -> Iterator[None]:
    CeleryInstrumentor().instrument()
    try:
        yield
    finally:
        CeleryInstrumentor().uninstrument()


@contextmanager
def posting() -> Iterator[None]:
    command = [sys.executable, "-m", "xpander_celery.sandbox", "--port", "0", "--db", ":memory:", "--api-key", "bench"]
    server = subprocess.Popen([*command, "--stop-at-eof"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = f"{server.stdout.readline().split()[2]}/agent-execution/agent/report_task"
    with httpx.Client(trust_env=False) as client:

        def post(task_id: str = "", args: Any = None, retval: Any = None, state: Any = None, **_: Any) -> None:
            body = TaskReport(
                agent_id="agent", id=task_id, input=json.dumps(args), result=retval, is_success=state == "SUCCESS"
            ).to_wire()
            headers = {"x-api-key": "bench", "content-type": "application/json"}
            client.post(url, content=body, headers=headers).raise_for_status()

        signals.task_postrun.connect(post, weak=False, dispatch_uid="bench")
        try:
            yield
        finally:
            signals.task_postrun.disconnect(dispatch_uid="bench")
            server.communicate()


def measured(way: Callable[[], Any], jobs: int, clock: Callable[[], float]) -> float:
    with way():
        seconds_per_job(max(50, jobs // STRETCHES), clock)
        return seconds_per_job(jobs, clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    trace.set_tracer_provider(TracerProvider(shutdown_on_exit=False))
    app.finalize()
    ways = {"bare": bare, "ours": ours, "opentelemetry": opentelemetry}
    rounds = [
        {name: measured(way, options.jobs, time.process_time) for name, way in ways.items()}
        for _ in range(options.rounds)
    ]
    http = measured(posting, max(100, options.jobs // STRETCHES), time.perf_counter)
    base = statistics.median(each["bare"] for each in rounds)
    added = {
        name: statistics.median(each[name] - each["bare"] for each in rounds) for name in ("ours", "opentelemetry")
    }
    found = {
        "bare_job_us": round(base * 1e6, 1),
        "added_us": {name: round(seconds * 1e6, 1) for name, seconds in added.items()}
        | {"httpx": round((http - base) * 1e6, 1)},
        "ratio_to_opentelemetry": round(
            statistics.median(
                (each["ours"] - each["bare"]) / (each["opentelemetry"] - each["bare"]) for each in rounds
            ),
            2,
        ),
        "times_less_than_httpx": round((http - base) / added["ours"], 1),
        "budget": BUDGET,
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
