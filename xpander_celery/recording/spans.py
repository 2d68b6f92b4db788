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
from opentelemetry.trace import SpanKind, Status, StatusCode

from xpander_celery.recording.attributes import JOB_SCOPE, Kind
from xpander_celery.recording.collector import FAILURES, Collector, JobSpans, active_job
from xpander_celery.recording.facts import SpanFacts
from xpander_celery.recording.packed import PackedSpans
from xpander_celery.recording.parents import SPAN_KEY, W3C, context_for, link_to
from xpander_celery.recording.providers import Providers
from xpander_celery.recording.usage import Usage

logger = getLogger(__name__)

_INTERNAL, _CONSUMER = SpanKind.INTERNAL, SpanKind.CONSUMER  # a look-up takes 0.2 µs on Python 3.11
AttributeValue = str | bool | int | float | Sequence[str]


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
        on_usage: Callable[[], None] | None = None,
    ) -> JobSpan:
        """Start the span of a job and begin to collect its spans; `activate()` makes it current.

        With a `carrier` (the message's headers, a view of which may be lazy: only the propagator's keys are read) it
        is a consumer span below the publisher, or below the live consumer span of another Celery instrumentation.
        Without one the job was called in-process and belongs below the current span. `earlier` is the `traceparent` of
        the previous attempt, which is linked.

        `on_usage()` is called when a span with usage, or of a tool, ended: while the job runs, and after `end()` within
        the grace, on the thread that ended it. It must be quick.
        """
        return JobSpan(self._collector, self._providers, name, carrier, attributes, earlier, on_usage)

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
    """The span of one attempt, and what the spans below it said. Made by `Tracing.start_job`.

    `trace_id` is 32 hexadecimal digits; None without a tracer provider.
    """

    __slots__ = (
        "_attributes",
        "_collector",
        "_context",
        "_ended",
        "_is_sealed",
        "_job",
        "_own_facts",
        "_previous",
        "_providers",
        "_span",
        "trace_id",
    )

    def __init__(
        self,
        collector: Collector,
        providers: Providers,
        name: str,
        carrier: Mapping[str, object] | None,
        attributes: Mapping[str, AttributeValue] | None,
        earlier: str | None,
        on_usage: Callable[[], None] | None,
    ) -> None:
        self._collector = collector
        self._providers = providers
        self._previous: tuple[Context, JobSpans | None] | None = None
        self._attributes = 0 if attributes is None else len(attributes)
        self._own_facts: SpanFacts | None = None
        self._is_sealed = False
        self._ended = False
        tracer = providers.job_tracer()
        job = self._job = collector.open(on_usage)
        context = self._context = context_for(job, carrier)
        kind = _INTERNAL if carrier is None else _CONSUMER
        links = link_to(earlier) if earlier else None
        self._span = tracer.start_span(name, context, kind, attributes, links)
        if (not job.seen or providers.tried_again) and providers.noticed(job.seen):
            self._span = tracer.start_span(name, context, kind, attributes, links)
            providers.noticed(job.seen)
        own = self._span.get_span_context()
        collector.identify(job, own)
        self.trace_id = format(own.trace_id, "032x") if own.is_valid else None

    @property
    def traceparent(self) -> str | None:
        """The span in W3C form, to link the next attempt to it (`earlier`); None without a tracer provider."""
        carrier: dict[str, str] = {}
        W3C.inject(carrier, trace.set_span_in_context(self._span, Context()))
        return carrier.get("traceparent")

    def activate(self) -> None:
        """Make the span current, in this thread or task, until `deactivate`."""
        self._previous = otel_context.get_current(), active_job.get()
        otel_context.attach(Context({**self._context, SPAN_KEY: self._span}))
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
        outer = otel_context.get_current()
        try:
            otel_context.attach(trace.set_span_in_context(span, outer))
            yield
            failed = False
        except BaseException as error:
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", type(error).__qualname__)
            raise
        finally:
            otel_context.attach(outer)  # OpenTelemetry's `detach` swallows what is raised in it, a soft time limit too
            if not span.is_recording():  # no provider: nothing else will tell the job
                ended = time.time_ns()
                self._job.add(SpanFacts(id(span), 0, JOB_SCOPE, Kind.TOOL, started, ended, failed, tool=name))
            span.end()

    def facts(self) -> PackedSpans | list[SpanFacts]:
        """What the job's spans said so far, for `usage_of`; may be called after `end`, from any thread."""
        own = self._own_facts if self._is_sealed else self._read_own()
        return self._job.facts if own is None else [*self._job.facts, own]

    def seal(self) -> None:
        """Read for the last time what was written on the job's own span; `end` does, where nobody did before."""
        if not self._is_sealed:
            self._own_facts = self._read_own()
            self._is_sealed = True

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
        self.seal()
        self._ended = True
        self._collector.close(self._job)
        if attributes is not None:
            self._span.set_attributes(attributes)
        if usage is not None:
            self._span.set_attributes(_usage_attributes(usage))
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR, description))
        self._span.end()
        self._span = trace.NonRecordingSpan(self._span.get_span_context())  # this waits for late spans, that need not

    def _read_own(self) -> SpanFacts | None:
        """Usage on the job's own span: LiteLLM's callback writes on whichever span is current."""
        span: Any = self._span
        try:
            if not span.is_recording():
                return None
            dropped = getattr(span, "dropped_attributes", None)
            if dropped is not None and len(span.attributes) + dropped == self._attributes:
                return None  # nobody wrote on it
            facts = SpanFacts.from_span(span, span.context.span_id)
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
