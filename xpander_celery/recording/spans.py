"""The span of a job, and trace context in message headers: what the rest of the worker side sees of OpenTelemetry.

It must not know of Celery (names, attributes and headers come from its callers) nor of the journal.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from logging import getLogger
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from xpander_celery.recording.attributes import JOB_SCOPE, Kind
from xpander_celery.recording.collector import FAILURES, JOB_KEY, Collector, JobSpans, active_job
from xpander_celery.recording.facts import SpanFacts
from xpander_celery.recording.packed import PackedSpans
from xpander_celery.recording.providers import Providers
from xpander_celery.recording.usage import Usage

logger = getLogger(__name__)

AttributeValue = str | bool | int | float | Sequence[str]
_W3C = TraceContextTextMapPropagator()


class _TextGetter(Getter[Mapping[str, object]]):
    """Reads text from message headers and nothing else: a header may hold any value."""

    def get(self, carrier: Mapping[str, object], key: str) -> list[str] | None:
        value = carrier.get(key)
        return [value] if isinstance(value, str) else None

    def keys(self, carrier: Mapping[str, object]) -> list[str]:
        return list(carrier)


_TEXT = _TextGetter()


class Tracing:
    """Spans of the jobs of one process: one object per installed runtime, made once, before the pool forks.

    Making it starts nothing and attaches to nothing; the first job does. `late_spans_s` is how long an ended job still
    takes spans. Safe under threads, asyncio, gevent and fork.
    """

    def __init__(self, *, late_spans_s: float = 5.0) -> None:
        self._collector = Collector(grace_s=late_spans_s)
        self._providers = Providers(self._collector)
        after_fork = weakref.WeakMethod(self._after_fork)
        os.register_at_fork(after_in_child=lambda: (method := after_fork()) and method())

    def prepare(self) -> None:
        """Attach to the tracer providers that exist. For the worker's main process, before its pool forks.

        Optional: the first job does it otherwise, in each process, for some 20 ms. It makes no provider.
        """
        self._providers.find()

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
        return JobSpan(
            self._collector,
            self._providers,
            name,
            carrier=carrier,
            attributes=attributes,
            earlier=earlier,
            on_usage=on_usage,
            on_late_usage=on_late_usage,
        )

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
        if not replace and any(headers.get(field) for field in propagate.get_global_textmap().fields):
            return
        span = self._providers.publishing_tracer().start_span(name, kind=SpanKind.PRODUCER, attributes=attributes)
        propagate.inject(headers, trace.set_span_in_context(span))
        span.end()

    def flush(self, timeout_ms: int = 2000) -> bool:
        """Export what the user's providers still hold; False if that took longer. For the end of a process."""
        return self._providers.flush(timeout_ms)

    def close(self) -> None:
        """Stop collecting and detach. A provider that was made because there was none stays."""
        self._collector.enabled = False
        self._providers.detach()

    def _after_fork(self) -> None:
        self._collector.after_fork()
        self._providers.after_fork()


class JobSpan:
    """The span of one attempt, and what the spans below it said. Made by `Tracing.start_job`."""

    def __init__(
        self,
        collector: Collector,
        providers: Providers,
        name: str,
        *,
        carrier: Mapping[str, object] | None,
        attributes: Mapping[str, AttributeValue] | None,
        earlier: str | None,
        on_usage: Callable[[JobSpan], None] | None,
        on_late_usage: Callable[[JobSpan], None] | None,
    ) -> None:
        def notify(late: bool) -> None:
            callback = on_late_usage if late else on_usage
            if callback is not None:
                callback(self)

        self._collector = collector
        self._providers = providers
        self._previous: tuple[Context, JobSpans | None] | None = None
        self._own_facts: SpanFacts | None = None
        self._ended = False
        tracer = providers.job_tracer()
        self._job = collector.open(notify)
        self._context = otel_context.set_value(JOB_KEY, self._job, _base_context(carrier))

        def start() -> Span:
            return tracer.start_span(
                name,
                context=self._context,
                kind=SpanKind.INTERNAL if carrier is None else SpanKind.CONSUMER,
                attributes=attributes,
                links=_link(earlier),
            )

        self._span = start()
        if providers.noticed(self._job.seen):
            self._span = start()
            providers.noticed(self._job.seen)
        collector.identify(self._job, self._span.get_span_context())

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
        attributes = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": name}
        span = self._providers.job_tracer().start_span(f"execute_tool {name}", attributes=attributes)
        started, failed = time.time_ns(), True
        try:
            with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                yield
            failed = False
        except BaseException as error:
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", type(error).__qualname__)
            raise
        finally:
            if not span.is_recording():  # no provider: nothing else will tell the job
                ended = time.time_ns()
                self._job.add(SpanFacts(id(span), 0, JOB_SCOPE, Kind.TOOL, started, ended, failed, tool=name))
            span.end()

    def facts(self) -> PackedSpans | list[SpanFacts]:
        """What the job's spans said so far, for `usage_of`; may be called after `end`, from any thread."""
        own = self._own_facts if self._ended else self._read_own()
        return self._job.facts if own is None else [*self._job.facts, own]

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
        if self._ended:
            return
        self._own_facts = self._read_own()
        self._ended = True
        self._collector.close(self._job)
        written = {**(attributes or {}), **(_usage_attributes(usage) if usage is not None else {})}
        if error is not None:
            written["error.type"] = error
            self._span.set_status(Status(StatusCode.ERROR, description))
        if written:
            self._span.set_attributes(written)
        self._span.end()

    def _read_own(self) -> SpanFacts | None:
        """Usage on the job's own span: LiteLLM's callback writes on whichever span is current."""
        if not self._span.is_recording():
            return None
        try:
            facts = SpanFacts.from_span(self._span)
        except FAILURES:
            return None
        return facts._replace(kind=Kind.CONTAINER, tool=None) if facts is not None and facts.has_usage else None


def _usage_attributes(usage: Usage) -> dict[str, AttributeValue]:
    """A job's usage in the words of the GenAI conventions, but as aggregated: whoever adds up the usage of model calls
    (`gen_ai.usage.*`) has those of this job already.
    """
    return {
        "gen_ai.aggregated_usage.input_tokens": usage.inclusive.prompt_tokens,
        "gen_ai.aggregated_usage.output_tokens": usage.inclusive.completion_tokens,
        "gen_ai.aggregated_usage.cache_read.input_tokens": usage.inclusive.cache_read_tokens,
        "gen_ai.aggregated_usage.cache_creation.input_tokens": usage.inclusive.cache_write_tokens,
        "xpander_celery.llm_calls": usage.llm_calls,
        "xpander_celery.llm_errors": usage.llm_errors,
        "xpander_celery.tool_calls": usage.tool_calls,
        "xpander_celery.tool_errors": usage.tool_errors,
        "xpander_celery.used_tools": usage.used_tools,
    }


def _base_context(carrier: Mapping[str, object] | None) -> Context:
    """The context that a job's span starts in.

    The current one for a job called in-process, and where another Celery instrumentation has just made a consumer span
    current; else that of the message. A current context that an earlier job left behind is no parent of anything.
    """
    current = otel_context.get_current()
    span = trace.get_current_span(current)
    job = current.get(JOB_KEY)
    if (isinstance(job, JobSpans) and not job.is_open) or getattr(span, "end_time", None) is not None:
        current, span = Context(), trace.INVALID_SPAN
    if carrier is None or _is_another_consumer(span):
        return current
    try:
        return propagate.extract(carrier, context=Context(), getter=_TEXT)
    except FAILURES:
        logger.warning("a message's trace context could not be read", exc_info=True, extra={"event": "no_context"})
        return Context()


def _is_another_consumer(span: Span) -> bool:
    """Whether another Celery instrumentation made this span for the job that is about to start."""
    scope = getattr(span, "instrumentation_scope", None)
    is_ours = scope is not None and scope.name == JOB_SCOPE
    return span.is_recording() and getattr(span, "kind", None) is SpanKind.CONSUMER and not is_ours


def _link(traceparent: str | None) -> list[Link]:
    if not traceparent:
        return []
    context = trace.get_current_span(_W3C.extract({"traceparent": traceparent}, Context())).get_span_context()
    return [Link(context)] if context.is_valid else []
