"""The jobs of the demo, as an ordinary Celery app that reports with one line. Run by a real worker."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from agno.agent import Agent
from agno.models.openai import OpenAIChat
from celery import Celery
from celery.signals import worker_process_init
from kombu.entity import Queue
from openinference.instrumentation.agno import AgnoInstrumentor
from pydantic import BaseModel

import xpander_celery as xc

BROKER_VARIABLE = "DEMO_BROKER_URL"
QUEUE_VARIABLE = "DEMO_QUEUE"
MODEL_VARIABLE = "DEMO_MODEL"
_QUEUE_LIVES_S = 600

queue = os.environ.get(QUEUE_VARIABLE, "xpander-demo")

app = Celery("demo", broker=os.environ.get(BROKER_VARIABLE, "redis://127.0.0.1:6379/0"))
app.conf.update(
    task_default_queue=queue,  # of its own, so that on a broker of yours no other worker's jobs are touched
    task_queues=[Queue(queue, expires=_QUEUE_LIVES_S)],  # type: ignore[no-untyped-call]
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    worker_lost_wait=1.0,  # how long the worker looks for the result of a killed process; 10 s by default
    broker_connection_retry_on_startup=True,
)
xc.instrument(app)


@worker_process_init.connect  # type: ignore[untyped-decorator]
def instrument_agno(**_: Any) -> None:
    """In each pool process: from here on, every model call and every tool of Agno is a span."""
    AgnoInstrumentor().instrument()


class Quote(BaseModel):
    """What an order costs."""

    items: int
    net: float
    gross: float


@app.task(name="demo.greet")  # type: ignore[untyped-decorator]
def greet(name: str) -> str:
    """A plain job."""
    return f"Hello, {name}!"


@app.task(name="demo.quote")  # type: ignore[untyped-decorator]
def quote(prices: list[float]) -> Quote:
    """A job with a pydantic result."""
    net = round(sum(prices), 2)
    return Quote(items=len(prices), net=net, gross=round(net * 1.19, 2))


@app.task(name="demo.charge")  # type: ignore[untyped-decorator]
def charge(card_number: str, amount: float) -> None:
    """A job that fails; the card number is masked in its record."""
    raise ValueError(f"the bank declined {amount:.2f}")


@app.task(name="demo.notify", bind=True, max_retries=3)  # type: ignore[untyped-decorator]
def notify(self: Any, address: str) -> str:
    """A job that succeeds at its third attempt: still one record."""
    if self.request.retries < 2:
        raise self.retry(exc=ConnectionError("the mail server is busy"), countdown=0.2)
    return f"told {address}"


@app.task(name="demo.export", time_limit=1)  # type: ignore[untyped-decorator]
def export(table: str) -> None:
    """A job that runs into its hard time limit: its process is killed before it can say anything."""
    time.sleep(60)


@app.task(name="demo.convert_video")  # type: ignore[untyped-decorator]
def convert_video(path: str) -> None:
    """A job whose process is killed, as the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="demo.resize")  # type: ignore[untyped-decorator]
def resize(image: str, width: int) -> str:
    """One of a group."""
    time.sleep(0.1)
    return f"{image} at {width} px"


def exchange_rate(currency: str) -> float:
    """How much of a currency one euro buys."""
    return 1.25


def convert(amount: float, rate: float) -> float:
    """An amount of euros in another currency."""
    return round(amount * rate, 2)


@app.task(name="demo.ask_agent")  # type: ignore[untyped-decorator]
def ask_agent(question: str) -> str:
    """An agent with two tools; its tokens and tools come from its spans, not from here."""
    agent = Agent(
        model=OpenAIChat(id=os.environ.get(MODEL_VARIABLE, "gpt-4.1-mini")),
        tools=[exchange_rate, convert],
        telemetry=False,
    )
    return str(agent.run(question).content)
