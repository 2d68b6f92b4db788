"""Which tracer providers the collector is attached to, and that no sampler hides a job's spans from it.

It must not know what a job is: it asks the collector.
"""

from __future__ import annotations

from logging import getLogger
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Tracer

from xpander_celery.recording.attributes import JOB_SCOPE
from xpander_celery.recording.collector import Collector

logger = getLogger(__name__)


class Providers:
    """Attaches a collector to the global provider, whichever that is when a job starts."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._provider: Any = None
        self._tracer: Tracer = trace.NoOpTracer()

    def tracer(self) -> Tracer:
        """The tracer of the global provider, attached; a provider of our own where the user has none by now."""
        provider = trace.get_tracer_provider()
        if provider is not self._provider:
            self._attach(provider)
        return self._tracer

    def publishing_tracer(self) -> Tracer:
        """The tracer of the global provider as it is: publishing must not set one up."""
        return trace.get_tracer(JOB_SCOPE)

    def _attach(self, provider: Any) -> None:
        if isinstance(provider, trace.ProxyTracerProvider):
            provider = TracerProvider(shutdown_on_exit=False)
            trace.set_tracer_provider(provider)
        if hasattr(provider, "add_span_processor"):
            provider.add_span_processor(self._collector)
        self._provider = provider
        self._tracer = provider.get_tracer(JOB_SCOPE)
