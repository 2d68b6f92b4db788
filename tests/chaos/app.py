"""The jobs of the chaos run. Each writes itself into a ledger that this package knows nothing of."""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery

import xpander_celery as xc

app = Celery("chaos", broker=os.environ.get("BROKER_URL"))
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)
xc.instrument(app)


@app.task(bind=True)
def work(self: Any, seconds: float, size: int) -> str:
    """By now the journal has promised to keep that this job began, so a record must come of it."""
    ledger = os.open(os.environ["CHAOS_LEDGER"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(ledger, f"{self.request.id}\n".encode())
    os.close(ledger)
    xc.current_job().add_usage(xc.Tokens(prompt_tokens=3))
    time.sleep(seconds)
    return "x" * size
