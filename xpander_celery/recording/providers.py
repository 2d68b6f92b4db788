"""Which tracer providers the collector is attached to, and that none of their samplers hides a job's spans from it.

It must not know which span belongs to whom: that is the collector's.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from logging import getLogger
from threading import Lock, Thread
from time import monotonic
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.environment_variables import OTEL_SDK_DISABLED
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NoOpTracer, ProxyTracerProvider, Tracer

from xpander_celery.recording.attributes import JOB_SCOPE
from xpander_celery.recording.collector import FAILURES, Collector
from xpander_celery.recording.samplers import record_unsampled

logger = getLogger(__name__)


class Providers:
    """Attaches a collector to the user's tracer providers, lazily: importing and publishing attach nothing.

    The global provider is looked at when each job starts, since it may be set late or replaced. Those that are not
    global are looked for once, when the first job of a process starts, or earlier by `find`.
    """

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._lock = Lock()
        self._attached: list[Any] = []
        self._samplers: list[Any] = []  # changed so that they record a job's spans
        self._undo: list[Callable[[], None]] = []
        self.tried_again = False  # to attach to a provider behind which the collector saw no job start
        self._searched = False
        self._provider: Any = None
        self._tracer: Tracer = NoOpTracer()

    def job_tracer(self) -> Tracer:
        """The tracer for the span of a job, of the global provider, with the collector attached to it.

        Where the user has set no provider by now one is made, since instrumentations write no spans without.
        """
        if trace.get_tracer_provider() is not self._provider:
            with self._lock:
                self._adopt()
        return self._tracer

    def publishing_tracer(self) -> Tracer:
        """The tracer of the global provider if the user has set one; nothing is made or attached."""
        provider = trace.get_tracer_provider()
        if provider is self._provider:
            return self._tracer
        return NoOpTracer() if isinstance(provider, ProxyTracerProvider) else provider.get_tracer(JOB_SCOPE)

    def find(self) -> None:
        """Attach to every SDK provider of this process, so that its forked children need not look for them."""
        with self._lock:
            self._search()

    def noticed(self, seen: bool) -> bool:
        """Learn whether the collector saw the span of a job start; True if attaching anew may have changed that.

        logfire drops processors when it is configured again, behind a provider that stays the same. Tried once until it
        works: a no-op provider never will.
        """
        if seen:
            self.tried_again = False
            return False
        if self.tried_again:
            return False
        self.tried_again = True
        with self._lock:
            return self._attach(self._provider, again=True)

    def flush(self, timeout_ms: int) -> bool:
        """Export what the providers still hold; False if that took longer. Never raises."""
        deadline = monotonic() + timeout_ms / 1000
        threads = [Thread(target=_flush, args=(provider, timeout_ms), daemon=True) for provider in self._attached]
        for thread in threads:  # an exporter may ignore the timeout that it is given, and a process must be able to end
            thread.start()
        for thread in threads:
            thread.join(max(deadline - monotonic(), 0))
        return not any(thread.is_alive() for thread in threads)

    def detach(self) -> None:
        """Undo what attaching changed. A processor can only be silenced where the provider keeps no known list."""
        with self._lock:
            for undo in self._undo:
                undo()
            for provider in self._attached:
                _remove_processor(provider, self._collector)
            self._undo.clear()
            self._samplers.clear()
            self._attached.clear()
            self._provider = None
            self._tracer = NoOpTracer()

    def after_fork(self) -> None:
        """In a forked child: the lock may have been held by a thread that is not here."""
        self._lock = Lock()

    def _adopt(self) -> None:
        self._search()
        provider: Any = trace.get_tracer_provider()
        if isinstance(provider, ProxyTracerProvider):
            provider = _make_provider()
        self._attach(provider)
        self._tracer = provider.get_tracer(JOB_SCOPE)
        self._provider = provider

    def _search(self) -> None:
        if not self._searched:
            self._searched = True
            for provider in _sdk_providers():
                self._attach(provider)

    def _attach(self, provider: Any, *, again: bool = False) -> bool:
        known = any(attached is provider for attached in self._attached)
        if known and not again:
            return False
        if not hasattr(provider, "add_span_processor"):
            if not again and not isinstance(provider, ProxyTracerProvider):
                logger.info(
                    "the tracer provider takes no span processors: tokens come from returned and added responses only",
                    extra={"event": "provider_without_processors", "provider": type(provider).__qualname__},
                )
            return False
        try:
            provider.add_span_processor(self._collector)
            self._record_unsampled(_behind(provider))
        except FAILURES:
            logger.warning("could not attach to a tracer provider", exc_info=True, extra={"event": "not_attached"})
            return False
        if not known:
            self._attached.append(provider)
        return True

    def _record_unsampled(self, provider: Any) -> None:
        sampler = getattr(provider, "sampler", None)
        if any(changed is sampler for changed in self._samplers):
            return
        undo = record_unsampled(provider, self._collector.wants)
        if undo is not None:
            self._samplers.append(sampler)
            self._undo.append(undo)


def _make_provider() -> Any:
    """A provider of our own as the global one. It exports nothing and samples as the environment says."""
    if os.environ.get(OTEL_SDK_DISABLED, "").strip().lower() == "true":
        return trace.get_tracer_provider()
    try:
        trace.set_tracer_provider(TracerProvider(shutdown_on_exit=False))
    except FAILURES:  # a malformed OTEL_* variable
        logger.warning("could not make a tracer provider", exc_info=True, extra={"event": "no_provider"})
    else:
        logger.info(
            "no tracer provider was set, so one was made to count tokens with; it exports nothing",
            extra={"event": "provider_made"},
        )
    return trace.get_tracer_provider()


def _sdk_providers() -> Iterator[Any]:
    """Every SDK provider of this process: an instrumentation may have been given one that is not the global one.

    By the references to their class. Asking each object (`isinstance` over `gc.get_objects()`) takes seconds and wakes
    lazy modules.
    """
    for kind in (TracerProvider, *TracerProvider.__subclasses__()):
        for referrer in gc.get_referrers(kind):
            if type(referrer) is kind:
                yield referrer


def _behind(provider: Any) -> Any:
    """The provider that has the sampler: logfire's is a proxy that holds it."""
    inner = getattr(provider, "provider", None)
    return provider if inner is None or hasattr(provider, "sampler") else inner


def _remove_processor(provider: Any, processor: Any) -> None:
    """Take a processor out of the SDK's list, which has no method for that."""
    active = getattr(_behind(provider), "_active_span_processor", None)
    processors = getattr(active, "_span_processors", None)
    if active is not None and isinstance(processors, tuple):
        active._span_processors = tuple(known for known in processors if known is not processor)


def _flush(provider: Any, timeout_ms: int) -> None:
    try:
        provider.force_flush(timeout_ms)
    except FAILURES:
        logger.warning("a tracer provider could not be flushed", exc_info=True, extra={"event": "not_flushed"})
