"""OpenTelemetry's process-wide state, fresh for each test that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.util._once import Once

from xpander_celery.recording.spans import Tracing


def reset_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())


@pytest.fixture
def no_provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that never set a tracer provider; an empty current context."""
    reset_provider(monkeypatch)
    before = otel_context.get_current()
    otel_context.attach(Context())
    yield
    otel_context.attach(before)


@pytest.fixture
def exported() -> InMemorySpanExporter:
    """What the user's exporter got."""
    return InMemorySpanExporter()


@pytest.fixture
def provider(no_provider: None, exported: InMemorySpanExporter) -> TracerProvider:
    """The user's global provider, which exports."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exported))
    trace.set_tracer_provider(provider)
    return provider


@pytest.fixture
def tracing(no_provider: None) -> Iterator[Tracing]:
    """The spans of a worker, detached at the end."""
    tracing = Tracing(late_spans_s=5)
    yield tracing
    tracing.close()
