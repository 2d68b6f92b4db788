"""Sends the demo's jobs, as any application does, and takes their queue away afterwards."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from celery import group
from kombu.exceptions import OperationalError

from xpander_celery.demo import jobs
from xpander_celery.demo.expectations import Expected


def publish(question: str) -> list[Expected]:
    """Send every job, and say how each is to end."""
    alone = [
        _send(jobs.greet, "succeeded", "Hello, Ada!", "Ada"),
        _send(jobs.quote, "succeeded", '"gross":', [19.9, 5.0, 12.5]),
        _send(jobs.charge, "failed", "the bank declined", "4242 4242 4242 4242", 99.5),
        _send(jobs.notify, "succeeded", "told", "ann@example.org"),
        _send(jobs.export, "timed_out", "TimeLimitExceeded", "invoices"),
        _send(jobs.convert_video, "lost", "WorkerLostError", "/videos/talk.mp4"),
        _send(jobs.ask_agent, "succeeded", "", question),
    ]
    sizes = group(jobs.resize.s("cover.png", width) for width in (320, 768, 1440)).apply_async()
    return [*alone, *(Expected(each.id, jobs.resize.name, "succeeded", " px") for each in sizes.children)]


def _send(task: Any, outcome: str, word: str, *arguments: object) -> Expected:
    return Expected(task.delay(*arguments).id, task.name, outcome, word)


def delete_queue() -> None:
    """Take the queue away from the broker; one that is gone by now has none."""
    with suppress(OperationalError), jobs.app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1)
        ours = jobs.app.amqp.queues[jobs.queue].bind(connection.default_channel)
        ours.declare()  # Redis: a channel deletes only the bindings that it made
        ours.delete()
