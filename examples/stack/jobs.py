"""The jobs of the stack, one for each way in which jobs go. Nothing in here knows of any reporting."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from agno.agent import Agent
from agno.models.openai import OpenAIChat
from celery import Task, chord

from examples.stack import ledger
from examples.stack.app import app


def stock_of(item: str) -> int:
    """How many of an item are in stock."""
    return len(item) * 7


def price_of(item: str) -> float:
    """The price of an item in euros."""
    return len(item) * 1.25


def ask_agent(question: str, *tools: Any) -> str:
    """The answer of an agent whose model is where OPENAI_BASE_URL says."""
    agent = Agent(model=OpenAIChat(id=os.environ.get("MODEL", "gpt-4.1-mini")), tools=list(tools), telemetry=False)
    return str(agent.run(question).content)


@app.task(name="stack.price")
def price(items: list[dict[str, Any]]) -> float:
    """An ordinary job."""
    return sum(item["price"] * item["count"] for item in items)


@app.task(name="stack.ask")
def ask(question: str) -> str:
    """An agent with two tools."""
    return ask_agent(question, stock_of, price_of)


@app.task(name="stack.digest", bind=True)
def digest(self: Task, texts: list[str]) -> str:
    """Fans out: one job for each text, and one more when they are done."""
    chord((count_words.s(text) for text in texts), add_up.s()).apply_async()
    return f"{len(texts)} texts handed out"


@app.task(name="stack.count_words")
def count_words(text: str) -> int:
    """One part of a digest."""
    return len(text.split())


@app.task(name="stack.add_up")
def add_up(counts: list[int]) -> int:
    """The end of a digest."""
    return sum(counts)


@app.task(name="stack.charge", bind=True, max_retries=3, default_retry_delay=2)
def charge(self: Task, card_number: str, amount: float) -> str:
    """Fails sometimes: every fifth run for good, and of the others every third one until it is retried."""
    turn = ledger.turn(self.name)
    if turn % 5 == 0:
        raise ValueError(f"the card is blocked: no {amount:.2f} for us")
    if turn % 3 == 0:
        raise self.retry(exc=ConnectionError("the bank does not answer"))
    return f"charged {amount:.2f}"


@app.task(name="stack.render", bind=True)
def render(self: Task, document: str) -> str:
    """Is killed sometimes, every other time, as the kernel does when memory is short: after it has spent tokens."""
    text = ask_agent(document)
    if ledger.turn(self.name) % 2 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    return text
