"""The Celery app of the stack in `docker-compose.yml`: its settings, and when beat sends which job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import after_task_publish, beat_init, heartbeat_sent, worker_init, worker_process_init
from openinference.instrumentation.agno import AgnoInstrumentor

import xpander_celery as xc
from examples.stack.ledger import LedgerTask
from examples.stack.traces import export_traces

PACE = float(os.environ.get("PACE", "1"))
ALIVE = Path(os.environ.get("ALIVE_FILE", "/tmp/alive"))
ITEMS = [{"name": "chair", "price": 49.5, "count": 4}, {"name": "table", "price": 199.0, "count": 1}]
TEXTS = ["a red chair", "a round table for six", "a lamp"]


def every(seconds: float, job: str, **kwargs: Any) -> dict[str, Any]:
    """An entry of the schedule. What no worker takes within five minutes is not run at all."""
    return {"task": f"stack.{job}", "schedule": seconds / PACE, "kwargs": kwargs, "options": {"expires": 300}}


app = Celery(
    "stack",
    broker=os.environ.get("BROKER_URL", "redis://127.0.0.1:6379/0"),
    backend=os.environ.get("RESULT_BACKEND", "redis://127.0.0.1:6379/1"),
    include=["examples.stack.jobs"],
    task_cls=LedgerTask,
)
app.conf.update(
    beat_schedule={
        "an ordinary job": every(5, "price", items=ITEMS),
        "an agent with tools": every(15, "ask", question="How many red chairs are there, and what does one cost?"),
        "a chord": every(20, "digest", texts=TEXTS),
        "a job that fails sometimes": every(10, "charge", card_number="4242 4242 4242 4242", amount=248.5),
        "a job that is killed sometimes": every(30, "render", document="Describe the round table in three sentences."),
    },
    broker_connection_retry_on_startup=True,
    result_expires=3600,
    task_time_limit=120,
    worker_prefetch_multiplier=1,
)
if app.conf.broker_url.startswith("redis"):
    # What a dead worker had fetched goes to another one after a minute, not after an hour.
    app.conf.broker_transport_options = {
        "visibility_timeout": 60,
        "unacked_restore_interval": 10,
        "unacked_restore_throttle": 10,
    }
xc.instrument(app)


@worker_init.connect
def instrument_agno(**_: object) -> None:
    """Once, before the pool: every model call of Agno becomes a span. It imports much, and a pool process that is not
    ready within 4 s is killed and started again, for ever on a busy machine.
    """
    AgnoInstrumentor().instrument()


@worker_process_init.connect
def export_from_pool_process(**_: object) -> None:
    """In each process that runs jobs: exporters have threads, which a fork does not copy."""
    export_traces()


@beat_init.connect
def instrument_beat(**_: object) -> None:
    """Beat exports the spans of what it sends, and shows by that that it is alive."""
    export_traces()
    after_task_publish.connect(show_alive)


@heartbeat_sent.connect
def show_alive(**_: object) -> None:
    """Touch the file that the health check looks at: in a worker's main process every 2 s, while its broker answers."""
    ALIVE.touch()
