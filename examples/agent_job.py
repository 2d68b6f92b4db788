"""An Agno agent as a Celery job: its tokens and tools come from the spans of an OpenInference instrumentation.

Needs `pip install 'xpander-celery[agno,redis]'`. Set OPENAI_API_KEY for the real model, or OPENAI_BASE_URL for another
endpoint (the sandbox has one: its address with `/v1`).
"""

from __future__ import annotations

import os

from agno.agent import Agent
from agno.models.openai import OpenAIChat
from celery import Celery
from celery.signals import worker_init
from openinference.instrumentation.agno import AgnoInstrumentor

import xpander_celery as xc

app = Celery("agent_job", broker=os.environ.get("BROKER_URL", "redis://127.0.0.1:6379/0"))
app.conf.result_backend = os.environ.get("RESULT_BACKEND", "redis://127.0.0.1:6379/1")
xc.instrument(app)


@worker_init.connect
def instrument_agno(**_: object) -> None:
    """Once, before the pool forks (in each pool process Celery gives it four seconds): every model call is a span."""
    AgnoInstrumentor().instrument()


def stock_of(item: str) -> int:
    """How many of an item are in stock."""
    return len(item) * 7


def price_of(item: str) -> float:
    """The price of an item in euros."""
    return len(item) * 1.25


@app.task(name="agent_job.ask")
def ask(question: str) -> str:
    """Returns the text: a RunOutput itself cannot pass Celery's JSON serializer."""
    agent = Agent(model=OpenAIChat(id="gpt-4.1-mini"), tools=[stock_of, price_of], markdown=False)
    return agent.run(question).content


if __name__ == "__main__":
    print(ask.delay("How many red chairs are there, and what does one cost?").get(timeout=120))
