"""Spans as instrumentations write them around calls of models, for tests of what collects them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import Span

from xpander_celery.recording.spans import JobSpan, Tracing
from xpander_celery.recording.usage import usage_of

CHAT = {
    "gen_ai.operation.name": "chat",
    "gen_ai.request.model": "gpt-4o",
    "gen_ai.usage.input_tokens": 100,
    "gen_ai.usage.output_tokens": 10,
}


def call_model(tracer: trace.Tracer | None = None, **how: Any) -> None:
    """One call of a model: 100 tokens in, 10 out."""
    start_model_call(tracer, **how).end()


def start_model_call(tracer: trace.Tracer | None = None, **how: Any) -> Span:
    return (tracer or trace.get_tracer("instrumentation")).start_span("chat", attributes=CHAT, **how)


def calls_in(job: JobSpan) -> int:
    """How many such calls the job counts."""
    tokens = usage_of(job.facts()).inclusive
    assert tokens.prompt_tokens == 10 * tokens.completion_tokens
    return tokens.prompt_tokens // 100


@contextmanager
def running_job(tracing: Tracing, name: str = "run job", **how: Any) -> Iterator[JobSpan]:
    """A job as the hooks run it: from a message without trace context, unless told otherwise."""
    job = tracing.start_job(name, **{"carrier": {}, **how})
    job.activate()
    try:
        yield job
    finally:
        job.deactivate()
        job.end()
