"""The span of a job: its parent, its end, its tools, and trace context in message headers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tests.support.model_spans import CHAT, call_model, calls_in, running_job
from xpander_celery.recording.attributes import JOB_SCOPE
from xpander_celery.recording.facts import SpanFacts
from xpander_celery.recording.spans import Tracing
from xpander_celery.recording.usage import usage_of

MESSAGE = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}


def span_named(exported: InMemorySpanExporter, name: str) -> ReadableSpan:
    [span] = [span for span in exported.get_finished_spans() if span.name == name]
    return span


@pytest.mark.usefixtures("provider")
class TestParents:
    def test_a_job_from_a_message_is_a_consumer_below_its_publisher(
        self, tracing: Tracing, exported: InMemorySpanExporter
    ) -> None:
        with running_job(tracing, "run add", carrier=MESSAGE, attributes={"celery.task_name": "add"}) as job:
            pass
        span = span_named(exported, "run add")
        assert span.kind is SpanKind.CONSUMER
        assert span.parent is not None
        assert format(span.parent.span_id, "016x") == "b" * 16
        assert job.trace_id == "a" * 32
        assert dict(span.attributes or {}) == {"celery.task_name": "add"}

    def test_a_job_called_in_process_is_below_the_current_span(
        self, tracing: Tracing, exported: InMemorySpanExporter
    ) -> None:
        with trace.get_tracer("web").start_as_current_span("request") as request, running_job(tracing, carrier=None):
            pass
        span = span_named(exported, "run job")
        assert span.kind is SpanKind.INTERNAL
        assert span.parent == request.get_span_context()

    def test_the_consumer_span_of_another_celery_instrumentation_is_the_parent(
        self, tracing: Tracing, exported: InMemorySpanExporter
    ) -> None:
        other = trace.get_tracer("opentelemetry.instrumentation.celery")
        with other.start_as_current_span("run/add", kind=SpanKind.CONSUMER) as span, running_job(tracing):
            pass
        assert span_named(exported, "run job").parent == span.get_span_context()

    def test_a_span_that_has_ended_is_no_parent(self, tracing: Tracing, exported: InMemorySpanExporter) -> None:
        ended = trace.get_tracer("x").start_span("ended", kind=SpanKind.CONSUMER)
        ended.end()
        otel_context.attach(trace.set_span_in_context(ended))
        with running_job(tracing, carrier=None):
            pass
        assert span_named(exported, "run job").parent is None

    @pytest.mark.parametrize("carrier", [{}, None, MESSAGE], ids=["no context", "in-process", "context"])
    def test_a_context_that_an_earlier_job_leaked_is_no_parent(
        self, tracing: Tracing, exported: InMemorySpanExporter, carrier: dict[str, str] | None
    ) -> None:
        def stream() -> Iterator[int]:
            with trace.get_tracer("agno").start_as_current_span("agent", kind=SpanKind.CONSUMER):
                yield 1

        with running_job(tracing) as first:
            abandoned = stream()
            next(abandoned)
            leaked = otel_context.get_current()
        otel_context.attach(leaked)

        with running_job(tracing, "run second", carrier=carrier) as second:
            call_model()

        assert second.trace_id != first.trace_id
        assert calls_in(second) == 1
        parent = span_named(exported, "run second").parent
        assert (parent is not None) == (carrier is MESSAGE)
        abandoned.close()

    @pytest.mark.parametrize(
        "headers",
        [{"traceparent": 5}, {"traceparent": None}, {"traceparent": "nonsense"}, {"traceparent": ["x"]}, {5: 5}],
    )
    def test_headers_that_are_no_context_start_a_trace(self, tracing: Tracing, headers: Any) -> None:
        with running_job(tracing, carrier=headers) as job:
            pass
        assert job.trace_id is not None

    def test_a_failing_propagator_starts_a_trace(
        self, tracing: Tracing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken(TraceContextTextMapPropagator):
            def extract(self, *args: Any, **kwargs: Any) -> Context:
                raise ValueError("broken")

        monkeypatch.setattr(propagate, "_HTTP_TEXT_FORMAT", Broken())
        with running_job(tracing, carrier=MESSAGE) as job:
            pass
        assert job.trace_id not in (None, "a" * 32)
        assert "could not be read" in caplog.text

    def test_a_retry_is_linked_to_the_earlier_attempt_and_not_below_it(
        self, tracing: Tracing, exported: InMemorySpanExporter
    ) -> None:
        with running_job(tracing, "first", carrier=MESSAGE) as first:
            pass
        with running_job(tracing, "second", carrier=MESSAGE, earlier=first.traceparent):
            pass
        span = span_named(exported, "second")
        [link] = span.links
        assert link.context.span_id == span_named(exported, "first").context.span_id
        assert span.parent == span_named(exported, "first").parent

    @pytest.mark.parametrize("earlier", ["", "nonsense", None])
    def test_a_link_that_is_none_is_left_out(
        self, tracing: Tracing, exported: InMemorySpanExporter, earlier: str | None
    ) -> None:
        with running_job(tracing, earlier=earlier):
            pass
        assert span_named(exported, "run job").links == ()


@pytest.mark.usefixtures("provider")
class TestActivation:
    def test_what_was_current_before_is_current_again(self, tracing: Tracing) -> None:
        with trace.get_tracer("x").start_as_current_span("around") as around:
            with running_job(tracing) as job:
                assert trace.get_current_span() is job._span
            assert trace.get_current_span() is around

    def test_contexts_that_the_body_left_attached_are_gone(self, tracing: Tracing) -> None:
        before = otel_context.get_current()
        with running_job(tracing):
            otel_context.attach(otel_context.set_value("a", 1))
            otel_context.attach(otel_context.set_value("b", 2))
        assert otel_context.get_current() is before

    def test_a_nested_job_gives_the_outer_one_back(self, tracing: Tracing) -> None:
        with running_job(tracing) as outer:
            with running_job(tracing, carrier=None):
                pass
            assert trace.get_current_span() is outer._span

    def test_deactivating_twice_or_without_activating_does_nothing(self, tracing: Tracing) -> None:
        before = otel_context.get_current()
        job = tracing.start_job("run job", carrier={})
        job.deactivate()
        job.activate()
        job.deactivate()
        job.deactivate()
        assert otel_context.get_current() is before


@pytest.mark.usefixtures("provider")
class TestEnd:
    def test_totals_are_written_so_that_nobody_adds_them_to_those_of_the_calls(
        self, tracing: Tracing, exported: InMemorySpanExporter
    ) -> None:
        with running_job(tracing) as job:
            call_model()
            with job.tool("look"):
                pass
            usage = usage_of(job.facts())
            job.end(usage=usage)

        attributes = dict(span_named(exported, "run job").attributes or {})
        assert attributes["gen_ai.aggregated_usage.input_tokens"] == 100
        assert attributes["gen_ai.aggregated_usage.output_tokens"] == 10
        assert attributes["xpander_celery.llm_calls"] == 1
        assert attributes["xpander_celery.tool_calls"] == 1
        assert attributes["xpander_celery.used_tools"] == ("look",)
        naive = sum(
            int(span.attributes.get("gen_ai.usage.input_tokens", 0))  # type: ignore[union-attr, arg-type]
            for span in exported.get_finished_spans()
        )
        assert naive == 100
        ours = [
            facts
            for span in exported.get_finished_spans()
            if (facts := SpanFacts.from_span(span, span.context.span_id)) is not None
        ]
        assert usage_of(ours).inclusive == usage.inclusive
        assert usage_of(job.facts()).inclusive == usage.inclusive

    def test_an_error_marks_the_span(self, tracing: Tracing, exported: InMemorySpanExporter) -> None:
        with running_job(tracing) as job:
            job.end(error="ValueError", description="masked", attributes={"celery.state": "FAILURE"})
        span = span_named(exported, "run job")
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "masked")
        assert dict(span.attributes or {}) == {"error.type": "ValueError", "celery.state": "FAILURE"}

    def test_an_ended_job_waits_for_late_spans_without_its_own(self, tracing: Tracing) -> None:
        with running_job(tracing, "run add") as job:
            kept = weakref.ref(trace.get_current_span())
            traceparent = job.traceparent
        assert kept() is None
        assert job.traceparent == traceparent

    def test_ending_twice_changes_nothing(self, tracing: Tracing, exported: InMemorySpanExporter) -> None:
        with running_job(tracing) as job:
            job.end()
            job.end(error="ValueError")
        assert span_named(exported, "run job").status.status_code is StatusCode.UNSET

    def test_usage_that_a_library_wrote_on_the_jobs_span_counts(self, tracing: Tracing) -> None:
        with running_job(tracing) as job:
            trace.get_current_span().set_attributes(CHAT)
            assert calls_in(job) == 1
        assert calls_in(job) == 1

    def test_such_usage_counts_where_it_evicts_the_jobs_own_attributes(self, no_provider: None) -> None:
        trace.set_tracer_provider(TracerProvider(shutdown_on_exit=False, span_limits=SpanLimits(max_attributes=4)))
        with running_job(Tracing(), attributes={"a": 1, "b": 2, "c": 3, "d": 4}) as job:
            trace.get_current_span().set_attributes(CHAT)
        assert usage_of(job.facts()).inclusive.prompt_tokens == CHAT["gen_ai.usage.input_tokens"]

    def test_such_usage_beside_the_calls_themselves_counts_once(self, tracing: Tracing) -> None:
        with running_job(tracing) as job:
            trace.get_current_span().set_attributes(CHAT)
            call_model()
            call_model()
        assert calls_in(job) == 2


class TestTools:
    def test_a_tool_is_a_span_below_the_current_one(
        self, provider: TracerProvider, tracing: Tracing, exported: InMemorySpanExporter
    ) -> None:
        with running_job(tracing) as job, job.tool("look"):
            call_model()
        tool = span_named(exported, "execute_tool look")
        assert tool.attributes is not None
        assert tool.attributes["gen_ai.tool.name"] == "look"
        assert span_named(exported, "chat").parent == tool.context
        assert usage_of(job.facts()).used_tools == ("look",)
        assert calls_in(job) == 1

    def test_a_tool_gives_the_context_back_without_detaching(
        self, provider: TracerProvider, tracing: Tracing, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """OpenTelemetry's `detach` swallows all that is raised while it runs, a soft time limit too."""
        detached: list[object] = []
        with running_job(tracing) as job:
            monkeypatch.setattr(otel_context, "detach", detached.append)
            before = otel_context.get_current()
            with job.tool("look"):
                assert trace.get_current_span() is not trace.get_current_span(before)
            assert otel_context.get_current() is before
        assert detached == []

    def test_a_failing_tool_is_marked_and_raises(
        self, provider: TracerProvider, tracing: Tracing, exported: InMemorySpanExporter
    ) -> None:
        def use() -> None:
            with job.tool("look"):
                raise KeyError("secret")

        with running_job(tracing) as job, pytest.raises(KeyError):
            use()
        tool = span_named(exported, "execute_tool look")
        assert tool.status.status_code is StatusCode.ERROR
        assert tool.events == ()
        assert tool.attributes is not None
        assert tool.attributes["error.type"] == "KeyError"
        usage = usage_of(job.facts())
        assert (usage.tool_calls, usage.tool_errors) == (1, 1)

    def test_tools_count_where_no_span_is_recorded(self, tracing: Tracing, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OTEL_SDK_DISABLED", "true")

        def fail() -> None:
            with job.tool("look"):
                raise KeyError

        with running_job(tracing) as job:
            for _ in range(2):
                with job.tool("look"):
                    pass
            with pytest.raises(KeyError):
                fail()
        usage = usage_of(job.facts())
        assert usage.used_tools == ("look",)
        assert (usage.tool_calls, usage.tool_errors) == (3, 1)


class TestPublishing:
    def test_a_producer_span_goes_into_the_headers(
        self, provider: TracerProvider, tracing: Tracing, exported: InMemorySpanExporter
    ) -> None:
        headers: dict[str, Any] = {"task": "add"}
        tracing.publish("publish add", headers, attributes={"messaging.system": "celery"})
        span = span_named(exported, "publish add")
        assert span.kind is SpanKind.PRODUCER
        assert headers["traceparent"].split("-")[2] == format(span.context.span_id, "016x")
        with running_job(tracing, carrier=headers):
            pass
        parent = span_named(exported, "run job").parent
        assert parent is not None
        assert parent.span_id == span.context.span_id

    def test_a_context_that_is_there_stays_unless_it_is_to_be_replaced(
        self, provider: TracerProvider, tracing: Tracing
    ) -> None:
        headers: dict[str, Any] = dict(MESSAGE)
        tracing.publish("publish add", headers)
        assert headers == MESSAGE
        tracing.publish("publish add", headers, replace=True)
        assert headers["traceparent"] != MESSAGE["traceparent"]

    def test_without_a_provider_nothing_is_written_and_none_is_made(self, tracing: Tracing) -> None:
        headers: dict[str, Any] = {"task": "add"}
        tracing.publish("publish add", headers)
        assert headers == {"task": "add"}
        assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)

    def test_what_a_job_publishes_is_below_it(
        self, provider: TracerProvider, tracing: Tracing, exported: InMemorySpanExporter
    ) -> None:
        headers: dict[str, Any] = {}
        with running_job(tracing):
            tracing.publish("publish next", headers)
        assert span_named(exported, "publish next").parent == span_named(exported, "run job").context


def test_the_scope_of_job_spans_is_ours(
    provider: TracerProvider, tracing: Tracing, exported: InMemorySpanExporter
) -> None:
    with running_job(tracing):
        pass
    scope = span_named(exported, "run job").instrumentation_scope
    assert scope is not None
    assert scope.name == JOB_SCOPE
