"""What reporting adds to a job: one attempt, no model calls, against what others add in the same run.

    python benchmarks/bench_job.py [--jobs N] [--turns N]

Times a job as a worker traces it, in short turns within one process, since what else a machine does comes and goes,
and compares what each way adds to the bare job: this package, opentelemetry-instrumentation-celery, an `httpx.Client`,
kept alive, that posts in `task_postrun` to the sandbox on loopback, and the platform's official client. The first two
in CPU time, the others in the time that a job waits. Prints one JSON object, and exits with 1 when a budget is
exceeded. Needs opentelemetry-instrumentation-celery.
"""

from __future__ import annotations

import argparse
import gc
import itertools
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
from bare_platform import official_report_s
from celery import Celery, signals
from celery.app.trace import build_tracer
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider

import xpander_celery as xc
from xpander_celery.report import TaskReport

AT_MOST = {"ratio_to_opentelemetry": 1.4}
AT_LEAST = {"times_less_than_httpx": 10.0, "times_less_than_the_official_client": 300.0}
WARM_UP = 20
NUMBERS = itertools.count(1)
SIGNALS = (signals.task_prerun, signals.task_postrun, signals.task_failure, signals.task_retry, signals.task_success)

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


class Way:
    """One way to watch jobs: what it connected to Celery's signals, which listens only in its own turns."""

    def __init__(self, connect: Callable[[], object]) -> None:
        for signal in SIGNALS:
            signal.receivers.clear()
        connect()
        self._receivers = [list(signal.receivers) for signal in SIGNALS]

    def seconds_per_job(self, jobs: int, clock: Callable[[], float] = time.process_time) -> float:
        for signal, receivers in zip(SIGNALS, self._receivers, strict=True):
            signal.receivers[:] = receivers
            signal.sender_receivers_cache.clear()
        tracer = build_tracer(answer.name, app.tasks["bench.answer"], app=app)  # not the proxy that the decorator left
        messages = [message(next(NUMBERS)) for _ in range(jobs + WARM_UP)]
        for each in messages[:WARM_UP]:
            tracer(each["id"], each["args"], each["kwargs"], each)
        gc.collect()
        gc.disable()
        try:
            started = clock()
            for each in messages[WARM_UP:]:
                tracer(each["id"], each["args"], each["kwargs"], each)
            return (clock() - started) / jobs
        finally:
            gc.enable()


def nothing() -> None:
    """The bare job."""


@contextmanager
def ours() -> Iterator[Way]:
    with tempfile.TemporaryDirectory() as directory:
        settings = {"api_key": "bench", "agent_id": "agent", "base_url": "http://127.0.0.1:9", "journal": directory}
        # a short grace, so that each job also forgets an earlier one, as in a process that has run for a while
        way = Way(lambda: xc.instrument(app, **settings, late_spans_s=0.01))
        try:
            yield way
            if not any(segment.stat().st_size for segment in Path(directory).glob("*/*.v*")):
                raise RuntimeError("nothing was recorded")
        finally:
            xc.uninstrument()


@contextmanager
def opentelemetry() -> Iterator[Way]:
    """With a provider like that of `ours`, but of its own: it must not pay for what that one collects."""
    provider = TracerProvider(shutdown_on_exit=False)
    way = Way(lambda: CeleryInstrumentor().instrument(tracer_provider=provider))
    try:
        yield way
    finally:
        CeleryInstrumentor().uninstrument()


@contextmanager
def posting() -> Iterator[Way]:
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

        try:
            yield Way(lambda: signals.task_postrun.connect(post, weak=False, dispatch_uid="bench"))
        finally:
            server.communicate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=250, help="jobs of one turn")
    parser.add_argument("--turns", type=int, default=60)
    options = parser.parse_args()
    trace.set_tracer_provider(TracerProvider(shutdown_on_exit=False))
    app.finalize()
    with ours() as us:
        us.seconds_per_job(1)  # finds the providers that there are, so before the other one is made
        with opentelemetry() as otel:
            bare = Way(nothing)
            turns = [
                (
                    bare.seconds_per_job(options.jobs),
                    us.seconds_per_job(options.jobs),
                    otel.seconds_per_job(options.jobs),
                )
                for _ in range(options.turns)
            ]
    with posting() as http:
        http_us = statistics.median(http.seconds_per_job(100, time.perf_counter) for _ in range(5)) * 1e6
    bare_us = statistics.median(turn[0] for turn in turns) * 1e6
    ours_us = [(turn[1] - turn[0]) * 1e6 for turn in turns]
    otel_us = [(turn[2] - turn[0]) * 1e6 for turn in turns]
    added = statistics.median(ours_us)
    found: dict[str, Any] = {
        "bare_job_us": round(bare_us, 1),
        "added_us": {
            "ours": {"least": round(min(ours_us), 1), "median": round(added, 1)},
            "opentelemetry": {"least": round(min(otel_us), 1), "median": round(statistics.median(otel_us), 1)},
            "httpx": round(http_us - bare_us, 1),
        },
        "ratio_to_opentelemetry": round(
            statistics.median(mine / other for mine, other in zip(ours_us, otel_us, strict=True)), 2
        ),
        "times_less_than_httpx": round((http_us - bare_us) / added, 1),
    }
    official = official_report_s(100, "report_external_task")
    if official is not None:
        found["times_less_than_the_official_client"] = round(official[1] * 1e6 / added, 1)
    over = [name for name, most in AT_MOST.items() if found[name] > most]
    over += [name for name, least in AT_LEAST.items() if found.get(name, least) < least]
    print(json.dumps({**found, "budgets": AT_MOST | AT_LEAST, "exceeded": over}, indent=2))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
