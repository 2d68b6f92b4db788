"""The span of a job, and trace context in message headers: what the rest of the worker side sees of OpenTelemetry.

It must not know of Celery (names, attributes and headers come from its callers) nor of the journal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from xpander_celery.recording.collector import JOB_KEY, Collector, JobSpans, active_job
from xpander_celery.recording.facts import SpanFacts
from xpander_celery.recording.providers import Providers
from xpander_celery.recording.usage import Usage

AttributeValue = str | bool | int | float | Sequence[str]
_W3C = TraceContextTextMapPropagator()


class Tracing:
    """Spans of the jobs of one process: one object per installed runtime, made once, before the pool forks.

    Making it starts nothing and attaches to nothing; the first job does. `late_spans_s` is how long an ended job still
    takes spans. Safe under threads, asyncio, gevent and fork.
    """

    def __init__(self, *, late_spans_s: float = 5.0) -> None:
        self._collector = Collector(grace_s=late_spans_s)
        self._providers = Providers(self._collector)

    def start_job(
        self,
        name: str,
        *,
        carrier: Mapping[str, object] | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
        earlier: str | None = None,
        on_usage: Callable[[JobSpan], None] | None = None,
        on_late_usage: Callable[[JobSpan], None] | None = None,
    ) -> JobSpan:
        """Start the span of a job and begin to collect its spans; `activate()` makes it current.

        With a `carrier` (the message's headers, a view of which may be lazy: only the propagator's keys are read) it
        is a consumer span below the publisher, or below the live consumer span of another Celery instrumentation.
        Without one the job was called in-process and belongs below the current span. `earlier` is the `traceparent` of
        the previous attempt, which is linked.

        `on_usage(job_span)` is called when a span with usage, or of a tool, ended while the job runs, on the thread
        that ended it; `on_late_usage` the same after `end()`, within the grace. Both must be quick.
        """
        return JobSpan(self, name, carrier, attributes, earlier, on_usage, on_late_usage)

    def publish(
        self,
        name: str,
        headers: MutableMapping[str, Any],
        *,
        attributes: Mapping[str, AttributeValue] | None = None,
        replace: bool = False,
    ) -> None:
        """Open and close a producer span and write its context into the headers of a message.

        Where the headers hold a context already (of another instrumentation, or of the message being retried), it
        stays unless `replace`. Without a tracer provider nothing is written: a web process is never given one.
        """

    def flush(self, timeout_ms: int = 2000) -> bool:
        """Export what the user's providers still hold; False if that took longer. For the end of a process."""
        return True

    def close(self) -> None:
        """Stop collecting. What was attached to providers stays there and does nothing."""
        self._collector.enabled = False


class JobSpan:
    """The span of one attempt, and what the spans below it said. Made by `Tracing.start_job`."""

    def __init__(
        self,
        tracing: Tracing,
        name: str,
        carrier: Mapping[str, object] | None,
        attributes: Mapping[str, AttributeValue] | None,
        earlier: str | None,
        on_usage: Callable[[JobSpan], None] | None,
        on_late_usage: Callable[[JobSpan], None] | None,
    ) -> None:
        collector = tracing._collector

        def notify(late: bool) -> None:
            callback = on_late_usage if late else on_usage
            if callback is not None:
                callback(self)

        self._collector = collector
        self._job: JobSpans = collector.open(notify)
        base = otel_context.get_current() if carrier is None else propagate.extract(carrier, context=Context())
        self._context = otel_context.set_value(JOB_KEY, self._job, base)
        self._span: Span = tracing._providers.tracer().start_span(
            name,
            context=self._context,
            kind=SpanKind.INTERNAL if carrier is None else SpanKind.CONSUMER,
            attributes=attributes,
            links=_link(earlier),
        )
        collector.identify(self._job, self._span.get_span_context())
        self._previous: tuple[Context, JobSpans | None] | None = None

    @property
    def trace_id(self) -> str | None:
        """The trace id, 32 hexadecimal digits; None without a tracer provider."""
        context = self._span.get_span_context()
        return format(context.trace_id, "032x") if context.is_valid else None

    @property
    def traceparent(self) -> str | None:
        """The span in W3C form, to link the next attempt to it (`earlier`); None without a tracer provider."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, trace.set_span_in_context(self._span, Context()))
        return carrier.get("traceparent")

    def activate(self) -> None:
        """Make the span current, in this thread or task, until `deactivate`."""
        self._previous = otel_context.get_current(), active_job.get()
        otel_context.attach(trace.set_span_in_context(self._span, self._context))
        active_job.set(self._job)

    def deactivate(self) -> None:
        """Restore exactly what was current before `activate`, whatever contexts the body left attached."""
        if self._previous is not None:
            context, job = self._previous
            self._previous = None
            otel_context.attach(context)
            active_job.set(job)

    @contextmanager
    def tool(self, name: str) -> Iterator[None]:
        """One call of a tool, as a span below the current one; an exception marks it failed and passes through."""
        yield

    def facts(self) -> Iterable[SpanFacts]:
        """What the job's spans said so far, for `usage_of`; may be called after `end`, from any thread."""
        return self._job.facts

    def end(
        self,
        *,
        usage: Usage | None = None,
        error: str | None = None,
        description: str | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> None:
        """End the span; late spans are taken from now on for the grace. A second call does nothing.

        `error` is the type of the error (`error.type`) and marks the span failed; `description` is its message,
        already redacted. `usage` is written as aggregated usage, which nobody adds to that of the model calls.
        """
        self._collector.close(self._job)
        if attributes:
            self._span.set_attributes(attributes)
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, description))
        self._span.end()


def _link(traceparent: str | None) -> list[Link]:
    if not traceparent:
        return []
    span = trace.get_current_span(_W3C.extract({"traceparent": traceparent}, Context()))
    return [Link(span.get_span_context())] if span.get_span_context().is_valid else []
