"""The app of the pool tests: jobs that call the platform synchronously, many at once."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

from xpander_celery.backend import Backend

app = Celery("pooled", broker=os.environ["BROKER_URL"], backend=os.environ["RESULT_BACKEND"])

backend = Backend()


@app.task(name="pooled.report")  # type: ignore[untyped-decorator]
def report(number: int) -> str:
    """Reports a run of its own."""
    return backend.report_external_task(id=f"{backend.configuration.agent_id}-{number}", result=str(number)).id


@app.task(name="pooled.keywords")  # type: ignore[untyped-decorator]
def keywords(number: int) -> Any:
    """Resolves the stored agent."""
    return backend.get_args(override={"name": f"agent {number}"})["name"]
