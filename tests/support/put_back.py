"""A worker that meets a race of Celery's prefork pool whenever it is asked to: a child dies, with a job that it said it
had accepted, while the pool looks at the death of another one. What the second child said was not read, so the pool
gives its job to a third (celery/concurrency/asynpool.py, `on_partial_read`; billiard/pool.py, `_join_exited_workers`).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
from celery import signals
from celery.concurrency.asynpool import AsynPool

import xpander_celery as xc
from tests.support.jobs import SPENT, app
from tests.support.waiting import until

PLACE = Path(os.environ.get("PUT_BACK_PLACE", "."))  # set in the worker
STOPPED = "stopped"  # in a file: the child that is to go on, and die, while the pool looks at another one
GO = "go"


@app.task(bind=True, acks_late=True)
def die_once(self: Any) -> str:
    xc.current_job().add_usage(SPENT)
    with (PLACE / self.request.id).open("a") as ledger:
        ledger.write(f"{os.getpid()}\n")
    if len((PLACE / self.request.id).read_text().split()) > 1:
        return "survived"
    until((PLACE / GO).exists, what="the word to go")
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def widen_the_gap(**_: Any) -> None:
    flush_queues = AsynPool.process_flush_queues

    def flush_slowly(pool: Any, process: Any) -> None:
        flush_queues(pool, process)
        stopped = PLACE / STOPPED
        if stopped.exists():
            child = psutil.Process(int(stopped.read_text()))
            stopped.unlink()
            child.resume()
            until(lambda: child.status() == psutil.STATUS_ZOMBIE, what="the death of the other child")

    AsynPool.process_flush_queues = flush_slowly


if "PUT_BACK_PLACE" in os.environ:
    app.conf.broker_transport_options = {}  # else Redis delivers once more what is stopped for longer than 5 s
    signals.worker_init.connect(widen_the_gap, weak=False)
