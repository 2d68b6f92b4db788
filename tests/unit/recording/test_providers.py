"""Tracer providers: none, late, replaced, foreign, several; and letting go of them."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from tests.support.model_spans import call_model, calls_in, running_job
from tests.unit.recording.conftest import reset_provider
from xpander_celery.recording.spans import Tracing


class LikeLogfire(trace.TracerProvider):
    """A proxy that is no SDK provider: `configure` puts a new one behind it, without the processors of the old."""

    __hash__ = None  # type: ignore[assignment]  # logfire's is a dataclass

    def __init__(self) -> None:
        self.configure()

    def configure(self, **how: Any) -> None:
        self.provider = TracerProvider(shutdown_on_exit=False, **how)

    def add_span_processor(self, processor: SpanProcessor) -> None:
        self.provider.add_span_processor(processor)

    def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
        outer = self

        class Tracer(trace.Tracer):
            def start_span(self, *given: Any, **named: Any) -> trace.Span:
                return outer.provider.get_tracer(*args, **kwargs).start_span(*given, **named)

            def start_as_current_span(self, *given: Any, **named: Any) -> Any:
                return outer.provider.get_tracer(*args, **kwargs).start_as_current_span(*given, **named)

        return Tracer()


def test_without_a_provider_one_is_made_for_the_first_job_and_said(
    tracing: Tracing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    early = trace.get_tracer("made before any provider")
    with running_job(tracing) as job:
        call_model(early)
    assert calls_in(job) == 1
    assert caplog.text.count("no tracer provider was set") == 1
    with running_job(tracing) as job:
        call_model(early)
    assert calls_in(job) == 1
    assert caplog.text.count("no tracer provider was set") == 1


def test_nothing_is_made_or_attached_before_the_first_job(tracing: Tracing) -> None:
    tracing.prepare()
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def test_a_provider_that_the_user_sets_before_the_first_job_is_used(
    no_provider: None, tracing: Tracing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    early = trace.get_tracer("made while the provider was a proxy")
    tracing.publish("publish", {})
    theirs = TracerProvider(shutdown_on_exit=False)
    trace.set_tracer_provider(theirs)
    with running_job(tracing) as job:
        call_model(early)
    assert calls_in(job) == 1
    assert trace.get_tracer_provider() is theirs
    assert "provider was made" not in caplog.text


def test_a_provider_that_replaces_another_is_noticed_at_the_next_job(
    provider: TracerProvider, tracing: Tracing, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_job(tracing):
        pass
    reset_provider(monkeypatch)
    trace.set_tracer_provider(TracerProvider(shutdown_on_exit=False))
    with running_job(tracing) as job:
        call_model()
        call_model(provider.get_tracer("still the old one"))
    assert calls_in(job) == 2


def test_attaching_is_idempotent(provider: TracerProvider, tracing: Tracing) -> None:
    tracing.prepare()
    for _ in range(5):
        with running_job(tracing):
            pass
    processors = provider._active_span_processor._span_processors
    assert processors.count(tracing._collector) == 1


def test_a_provider_that_is_not_the_global_one_is_found(provider: TracerProvider, tracing: Tracing) -> None:
    class Special(TracerProvider):
        pass

    others = [TracerProvider(shutdown_on_exit=False), Special(shutdown_on_exit=False)]
    with running_job(tracing) as job:
        for other in others:
            call_model(other.get_tracer("instrumentation"))
    assert calls_in(job) == 2


def test_one_call_through_two_providers_with_two_layers_is_one(provider: TracerProvider, tracing: Tracing) -> None:
    other = TracerProvider(shutdown_on_exit=False)
    with running_job(tracing) as job, provider.get_tracer("outer").start_as_current_span("chat", attributes=_chat()):
        call_model(other.get_tracer("inner"))
    assert calls_in(job) == 1


def test_a_provider_like_logfires_is_used(no_provider: None, tracing: Tracing) -> None:
    trace.set_tracer_provider(LikeLogfire())
    with running_job(tracing) as job:
        call_model()
    assert calls_in(job) == 1


@pytest.mark.parametrize("how", [{}, {"sampler": ALWAYS_OFF}], ids=["sampled", "not sampled"])
def test_a_provider_that_forgets_its_processors_is_attached_to_again(
    no_provider: None, tracing: Tracing, how: dict[str, Any]
) -> None:
    provider = LikeLogfire()
    trace.set_tracer_provider(provider)
    for _ in range(3):
        provider.configure(**how)
        with running_job(tracing) as job:
            call_model()
        assert calls_in(job) == 1
        assert job.trace_id is not None


def test_a_provider_without_processors_is_said_once_and_changes_nothing(
    no_provider: None, tracing: Tracing, caplog: pytest.LogCaptureFixture
) -> None:
    class Foreign(trace.NoOpTracerProvider):
        pass

    caplog.set_level(logging.INFO)
    trace.set_tracer_provider(Foreign())
    for _ in range(3):
        with running_job(tracing) as job:
            call_model()
        assert calls_in(job) == 0
        assert job.trace_id is None
        assert job.traceparent is None
    assert caplog.text.count("takes no span processors") == 1


def test_a_provider_that_refuses_a_processor_is_logged_and_changes_nothing(
    no_provider: None, tracing: Tracing, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(TracerProvider):
        def add_span_processor(self, span_processor: SpanProcessor) -> None:
            raise RuntimeError("closed")

    trace.set_tracer_provider(Refusing(shutdown_on_exit=False))
    with running_job(tracing) as job:
        call_model()
    assert calls_in(job) == 0
    assert "could not attach" in caplog.text


def test_a_disabled_sdk_gives_jobs_without_trace(
    no_provider: None, tracing: Tracing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    with running_job(tracing) as job:
        call_model()
    assert job.trace_id is None
    assert calls_in(job) == 0
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def test_a_malformed_otel_variable_is_logged_and_the_job_runs(
    no_provider: None, tracing: Tracing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many")
    with running_job(tracing) as job:
        call_model()
    assert job.trace_id is None
    assert "could not make a tracer provider" in caplog.text


def test_closing_takes_the_processor_away(provider: TracerProvider, tracing: Tracing) -> None:
    before = provider._active_span_processor._span_processors
    with running_job(tracing):
        pass
    tracing.close()
    assert provider._active_span_processor._span_processors == before


def test_first_jobs_in_parallel_make_one_provider(
    no_provider: None, tracing: Tracing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    together = threading.Barrier(6)
    counted = []

    def work() -> None:
        together.wait(30)
        with running_job(tracing) as job:
            call_model()
        counted.append(calls_in(job))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert counted == [1] * 6
    assert caplog.text.count("no tracer provider was set") == 1
    assert "not allowed" not in caplog.text


class TestFlush:
    def test_what_the_users_exporters_hold_is_exported(
        self, provider: TracerProvider, tracing: Tracing, exported: InMemorySpanExporter
    ) -> None:
        with running_job(tracing):
            call_model()
        assert tracing.flush(5000)
        assert len(exported.get_finished_spans()) == 2

    def test_an_exporter_that_hangs_or_raises_does_not_hold_the_process(
        self, provider: TracerProvider, tracing: Tracing, caplog: pytest.LogCaptureFixture
    ) -> None:
        released = threading.Event()

        class Hanging(SpanProcessor):
            def force_flush(self, timeout_millis: int = 30000) -> bool:
                return released.wait(30)

        class Raising(TracerProvider):
            def force_flush(self, timeout_millis: int = 30000) -> bool:
                raise RuntimeError("broken")

        raising = Raising(shutdown_on_exit=False)
        provider.add_span_processor(Hanging())
        with running_job(tracing):
            pass
        before = time.monotonic()
        try:
            assert not tracing.flush(100)
        finally:
            released.set()
        assert time.monotonic() - before < 10
        assert raising is not None
        assert "could not be flushed" in caplog.text


def test_a_child_forked_while_a_thread_attaches_is_not_locked(provider: TracerProvider, tracing: Tracing) -> None:
    reader, writer = os.pipe()
    with tracing._providers._lock:
        child = os.fork()
        if child == 0:
            try:
                with running_job(tracing) as job:
                    call_model()
                os.write(writer, str(calls_in(job)).encode())
            finally:
                os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"1"


def _chat() -> dict[str, Any]:
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 10,
    }
