"""An ordinary Celery app, made to report in three ways: every task, a base class, a decorator."""

from __future__ import annotations

import os
import time

from celery import Celery, group

import xpander_celery as xc

app = Celery("orders", broker=os.environ.get("BROKER_URL", "redis://127.0.0.1:6379/0"))
app.conf.result_backend = os.environ.get("RESULT_BACKEND", "redis://127.0.0.1:6379/1")

# 1. One line for every task of the app. It starts no thread, file or process here: workers do.
xc.instrument(app, exclude=["orders.heartbeat"])


@app.task(name="orders.price")
def price(items: list[dict[str, float]]) -> float:
    """Reported because of `instrument` alone."""
    return sum(item["price"] * item["count"] for item in items)


# 2. A base class, for what only this task needs: here an agent of its own.
@app.task(name="orders.charge", base=xc.XpanderTask, xpander={"agent_id": "agent-billing"})
def charge(card_number: str, amount: float) -> str:
    """The card number never leaves the worker: its key name looks secret, so its value is masked."""
    return f"charged {amount:.2f}"


# 3. A decorator on an existing job, and a retry: one record, however many attempts.
@app.task(name="orders.notify", bind=True, max_retries=3, default_retry_delay=1)
@xc.reported(agent_id="agent-mail")
def notify(self, address: str) -> str:
    """Fails at first, as mail servers do."""
    if self.request.retries == 0:
        raise self.retry(exc=ConnectionError("mail server is busy"))
    with xc.tool_call("smtp"):
        time.sleep(0.05)
    return f"told {address}"


@app.task(name="orders.heartbeat")
def heartbeat() -> None:
    """Excluded, so never reported."""


if __name__ == "__main__":
    jobs = group(
        price.s([{"price": 2.5, "count": 4}]),
        charge.s("4242 4242 4242 4242", 10.0),
        notify.s("ann@example.org"),
        heartbeat.s(),
    ).apply_async()
    print(jobs.get(timeout=30))

    # Any other code can be a job, too.
    with xc.job("orders.nightly-digest", input="2026-01-31") as job:
        job.result = "3 orders"
    xc.flush(timeout_s=5)
