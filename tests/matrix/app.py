"""The application that the matrix' workers run: a few tasks that do what a script in their arguments says.

A script is a list of steps for each attempt (the last list holds for further attempts); a step is a verb with at most
one value. Every attempt keeps a ledger outside of the package: a file per job, one line for each thing that it did.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from celery import Celery, Task, group
from celery.backends.redis import RedisBackend
from celery.exceptions import Ignore, Reject
from celery.worker.request import Request

import xpander_celery as xc

LEDGER = Path(os.environ["MATRIX_LEDGER"])
BROKER = os.environ["MATRIX_BROKER"]
RESULTS = os.environ["MATRIX_RESULTS"]
RELEASE = Path(os.environ["MATRIX_RELEASE"])
POOL = os.environ["MATRIX_POOL"]


class FragileBackend(RedisBackend):
    """A result back-end that fails for the jobs that ask for it."""

    def store_result(self, task_id: str, result: Any, state: str, *rest: Any, **more: Any) -> Any:
        if result == "unstorable":
            raise OSError("the result back-end is full")
        return super().store_result(task_id, result, state, *rest, **more)


app = Celery("matrix", broker=BROKER, backend=f"{__name__}:FragileBackend+{RESULTS}")
app.conf.update(
    worker_prefetch_multiplier=int(os.environ.get("MATRIX_PREFETCH", "1")),
    task_default_queue=os.environ["MATRIX_QUEUE"],
    broker_connection_retry_on_startup=True,
    worker_hijack_root_logger=False,
    worker_enable_soft_shutdown_on_idle=True,
    worker_soft_shutdown_timeout=float(os.environ.get("MATRIX_SOFT_S", "0")),
    worker_max_tasks_per_child=int(os.environ["MATRIX_RECYCLE"]) if "MATRIX_RECYCLE" in os.environ else None,
    worker_max_memory_per_child=int(os.environ["MATRIX_MEMORY"]) if "MATRIX_MEMORY" in os.environ else None,
    worker_cancel_long_running_tasks_on_connection_loss=False,
)
if BROKER.startswith("redis"):
    app.conf.broker_transport_options = {
        "visibility_timeout": float(os.environ.get("MATRIX_VISIBILITY_S", "3600")),
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }

xc.instrument(app)


class Ledger:
    """What one job did, as lines of a file."""

    def __init__(self, job_id: str) -> None:
        self.path = LEDGER / job_id

    def attempts(self) -> int:
        return self.path.read_text().count("began") if self.path.exists() else 0

    def note(self, *words: object) -> None:
        line = " ".join(str(word) for word in (f"{time.time():.3f}", *words)) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, line.encode())
        os.close(descriptor)


def perform(task: Task, script: list[list[list[Any]]]) -> Any:
    ledger = Ledger(task.request.id)
    steps = script[min(ledger.attempts(), len(script) - 1)]
    ledger.note("began", os.getpid())
    result: Any = "done"
    try:
        for verb, *values in steps:
            if verb == "return":
                result = object() if values[0] == "an object" else values[0]
            else:
                VERBS[verb](task, ledger, *values)
    except Exception:  # nothing else is its own doing: it is stopped
        ledger.note("ended")
        raise
    ledger.note("ended")
    return result


def spend(task: Task, ledger: Ledger, tokens: int) -> None:
    xc.current_job().add_usage(xc.Tokens(prompt_tokens=tokens, completion_tokens=1))
    with xc.tool_call("search"):
        pass
    ledger.note("spent", tokens)


def sleep(task: Task, ledger: Ledger, seconds: float, in_solo: float | None = None) -> None:
    """`in_solo` seconds where nothing can end the body from outside, and every other job waits for it."""
    if in_solo is not None and POOL == "solo":
        seconds = in_solo
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))


def block(task: Task, ledger: Ledger, seconds: float) -> None:
    """As a call into a library that lets no signal through."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    time.sleep(seconds)


def wait(task: Task, ledger: Ledger) -> None:
    """Until the worker was told to stop and had its time, in case the worker lets the body go on."""
    deadline = time.monotonic() + 120
    while not RELEASE.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def settle(task: Task, ledger: Ledger) -> None:
    """Until the worker's main process knows that this process has the job. Where one dies before, Celery's prefork pool
    may give its job to another one (`tests/integration/test_jobs_put_back.py`), which is not what a case is about.
    """
    deadline = time.monotonic() + 60
    while POOL == "prefork" and not _is_accepted(task.request):
        if time.monotonic() > deadline:
            raise TimeoutError("the worker does not know of this job")


def _is_accepted(request: Any) -> bool:
    active = app.control.inspect(destination=[request.hostname], timeout=1).active() or {}
    return any(job["id"] == request.id for jobs in active.values() for job in jobs)


def fail(task: Task, ledger: Ledger, text: str) -> None:
    raise ValueError(text)


def retry(task: Task, ledger: Ledger, countdown: float) -> None:
    raise task.retry(exc=OSError("not yet"), countdown=countdown, max_retries=5)


def retry_elsewhere(task: Task, ledger: Ledger) -> None:
    """In a queue that no worker takes from."""
    raise task.retry(exc=OSError("not here"), countdown=0, queue=f"{app.conf.task_default_queue}.elsewhere")


def outage(task: Task, ledger: Ledger) -> None:
    raise ConnectionError("down")


def ignore(task: Task, ledger: Ledger) -> None:
    raise Ignore("not worth it")


def reject(task: Task, ledger: Ledger, requeue: bool) -> None:
    raise Reject("not mine", requeue=requeue)


def replace(task: Task, ledger: Ledger, kind: str) -> None:
    last = plain.si(task.request.args[0])
    first = plain.si([[["spend", 3]]])
    task.replace({"task": last, "chain": first | last, "group": group(first, first.clone())}[kind])


def leave(task: Task, ledger: Ledger, how: str) -> None:
    settle(task, ledger)
    if how == "SystemExit":
        sys.exit(3)
    if how == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if how == "os._exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


def eager(task: Task, ledger: Ledger) -> None:
    own.apply(args=([[["spend", 7], ["return", "inner"]]],))


def grow(task: Task, ledger: Ledger, megabytes: int) -> None:
    task.app.ballast = b"x" * (megabytes * 1024 * 1024)


VERBS = {
    "spend": spend,
    "sleep": sleep,
    "settle": settle,
    "block": block,
    "wait": wait,
    "fail": fail,
    "retry": retry,
    "retry_elsewhere": retry_elsewhere,
    "outage": outage,
    "ignore": ignore,
    "reject": reject,
    "replace": replace,
    "leave": leave,
    "eager": eager,
    "grow": grow,
}


class OwnRequest(Request):  # type: ignore[misc]
    """A user's own request class, with a hook of its own."""

    def on_failure(self, exc_info: Any, *rest: Any, **more: Any) -> Any:
        Ledger(self.id).note("own_on_failure")
        return super().on_failure(exc_info, *rest, **more)


class OwnTask(Task):  # type: ignore[misc]
    Request = OwnRequest

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        Ledger(self.request.id).note("own_call")
        return super().__call__(*args, **kwargs)

    def on_failure(self, exc: Any, task_id: str, *rest: Any, **more: Any) -> None:
        Ledger(task_id).note("own_task_on_failure")


@app.task(bind=True)
def plain(self: Task, script: list[Any]) -> Any:
    return perform(self, script)


@app.task(bind=True, acks_late=True)
def late(self: Task, script: list[Any]) -> Any:
    return perform(self, script)


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True)
def late_requeued(self: Task, script: list[Any]) -> Any:
    return perform(self, script)


@app.task(bind=True, acks_late=True, acks_on_failure_or_timeout=False)
def late_unacknowledged(self: Task, script: list[Any]) -> Any:
    return perform(self, script)


@app.task(bind=True, autoretry_for=(ConnectionError,), max_retries=2, default_retry_delay=0)
def autoretry(self: Task, script: list[Any]) -> Any:
    return perform(self, script)


@app.task(bind=True, retry_on_worker_lost=True, max_retries=2, default_retry_delay=0)
def retried_when_lost(self: Task, script: list[Any]) -> Any:
    return perform(self, script)


@app.task(bind=True, base=OwnTask)
def own(self: Task, script: list[Any]) -> Any:
    return perform(self, script)
