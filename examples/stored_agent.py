"""An agent stored at the platform, run inside a Celery job; and a job that asks another one and waits for its answer.

Needs `pip install 'xpander-celery[sdk,agno,redis]'`, XPANDER_API_KEY and XPANDER_AGENT_ID. The agent's definition
(model, instructions, tools) is resolved anew for each job, so a change at the platform takes effect with the next one.
"""

from __future__ import annotations

import asyncio
import os

from agno.agent import Agent
from celery import Celery
from celery.signals import worker_process_init
from openinference.instrumentation.agno import AgnoInstrumentor

import xpander_celery as xc

app = Celery("stored_agent", broker=os.environ.get("BROKER_URL", "redis://127.0.0.1:6379/0"))
app.conf.result_backend = os.environ.get("RESULT_BACKEND", "redis://127.0.0.1:6379/1")
xc.instrument(app)

backend = xc.Backend()


@worker_process_init.connect
def instrument_agno(**_: object) -> None:
    """Once in each pool process: from here on, every model call of Agno is a span, with its tokens and tools."""
    AgnoInstrumentor().instrument()


def stock_of(item: str) -> int:
    """How many of an item are in stock."""
    return len(item) * 7


@app.task(name="stored_agent.answer")
def answer(message: str) -> str:
    """The stored agent's answer; the tools given here are added to its own."""
    agent = Agent(**backend.get_args(tools=[stock_of]))
    run = asyncio.run(agent.arun(message))  # the hooks of a stored agent are asynchronous
    return run.content


@app.task(name="stored_agent.ask_colleague")
def ask_colleague(agent_id: str, question: str) -> str:
    """The answer of another agent, which runs at the platform."""
    task = backend.invoke_agent(agent_id, question)
    task.wait(timeout_s=120)
    return f"{task.status}: {task.result}"


if __name__ == "__main__":
    print(answer.delay("How many red chairs are in stock?").get(timeout=120))
