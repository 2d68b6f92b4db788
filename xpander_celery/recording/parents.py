"""Where the span of a job belongs: below its publisher, or below what is current. It must not know of Celery.

This is on every job's way, so what nearly every message holds, a `traceparent` as everybody writes it and nothing
else, is read here; anything else, and any other propagator than OpenTelemetry's default, by the propagator itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from logging import getLogger

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from xpander_celery.recording.attributes import JOB_SCOPE
from xpander_celery.recording.collector import FAILURES, JOB_KEY, JobSpans

logger = getLogger(__name__)

W3C = TraceContextTextMapPropagator()
SPAN_KEY = next(iter(trace.set_span_in_context(trace.INVALID_SPAN, Context())))
"""The key of the current span in a context. It has no public name, so it is found by what setting a span adds."""

_DEFAULT = [TraceContextTextMapPropagator, W3CBaggagePropagator]
_TRACEPARENT = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


def context_for(job: JobSpans, carrier: Mapping[str, object] | None) -> Context:
    """The context that a job's span starts in.

    The current one for a job called in-process, and where another Celery instrumentation has just made a consumer span
    current; else that of the message. A current context that an earlier job left behind is no parent of anything.
    """
    base: Mapping[str, object] = otel_context.get_current()
    span = None
    if base:
        span = trace.get_current_span(otel_context.get_current())
        earlier = base.get(JOB_KEY)
        if (isinstance(earlier, JobSpans) and not earlier.is_open) or getattr(span, "end_time", None) is not None:
            base, span = {}, None
    if carrier is not None and (span is None or not _is_another_consumer(span)):
        base = _of_message(carrier)
    return Context({**base, JOB_KEY: job})


def link_to(traceparent: str | None) -> list[Link]:
    """A link to the span that `traceparent` names; none where it names none."""
    if not traceparent:
        return []
    context = trace.get_current_span(W3C.extract({"traceparent": traceparent}, Context())).get_span_context()
    return [Link(context)] if context.is_valid else []


def _of_message(carrier: Mapping[str, object]) -> Mapping[str, object]:
    """The context in the headers of a message; an empty one where it cannot be read."""
    try:
        textmap = propagate.get_global_textmap()
        if _is_default(textmap) and carrier.get("tracestate") is None and carrier.get("baggage") is None:
            traceparent = carrier.get("traceparent")
            if traceparent is None:
                return {}
            found = _TRACEPARENT.fullmatch(traceparent) if isinstance(traceparent, str) else None
            if found is not None:
                trace_id, span_id, flags = found.groups()
                parent = SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(int(flags, 16)))
                return {SPAN_KEY: NonRecordingSpan(parent)} if parent.is_valid else {}
        return textmap.extract(carrier, context=Context(), getter=_TEXT)
    except FAILURES:
        logger.warning("a message's trace context could not be read", exc_info=True, extra={"event": "no_context"})
        return {}


@lru_cache(maxsize=4)
def _is_default(textmap: object) -> bool:
    """Whether this is the propagator that OpenTelemetry makes where nobody chose another."""
    parts = getattr(textmap, "_propagators", None)
    return type(textmap) is CompositePropagator and parts is not None and [type(part) for part in parts] == _DEFAULT


def _is_another_consumer(span: Span) -> bool:
    """Whether another Celery instrumentation made this span for the job that is about to start."""
    scope = getattr(span, "instrumentation_scope", None)
    is_ours = scope is not None and scope.name == JOB_SCOPE
    return span.is_recording() and getattr(span, "kind", None) is SpanKind.CONSUMER and not is_ours


class _TextGetter(Getter[Mapping[str, object]]):
    """Reads text from message headers and nothing else: a header may hold any value."""

    def get(self, carrier: Mapping[str, object], key: str) -> list[str] | None:
        value = carrier.get(key)
        return [value] if isinstance(value, str) else None

    def keys(self, carrier: Mapping[str, object]) -> list[str]:
        return list(carrier)


_TEXT = _TextGetter()
