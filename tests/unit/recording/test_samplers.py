"""Unsampled jobs: their spans reach the collector, whatever the sampler, and no exporter."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    DEFAULT_OFF,
    Decision,
    ParentBased,
    ParentBasedTraceIdRatio,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)

from tests.support.model_spans import call_model, calls_in, running_job
from xpander_celery.recording.spans import Tracing


class Custom(Sampler):
    def should_sample(self, parent_context: Any, trace_id: int, name: str, *args: Any, **kwargs: Any) -> SamplingResult:
        return SamplingResult(Decision.DROP)

    def get_description(self) -> str:
        return "custom"


class WithSlots:
    __slots__ = ("rate",)

    def should_sample(self, parent_context: Any, trace_id: int, name: str, *args: Any, **kwargs: Any) -> SamplingResult:
        return SamplingResult(Decision.DROP)

    def get_description(self) -> str:
        return "slots"


@dataclass(frozen=True)
class Frozen(Custom):
    rate: float = 0.0


@dataclass(frozen=True, slots=True)
class FrozenWithSlots:
    rate: float = 0.0

    def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:
        return SamplingResult(Decision.DROP)

    def get_description(self) -> str:
        return "frozen with slots"


class OfAForeignLayout(types.SimpleNamespace):
    """As one of a compiled extension: neither its attributes nor its class can be set."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        raise AttributeError("no attributes")

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return OfAForeignLayout

    def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:
        return SamplingResult(Decision.DROP)

    def get_description(self) -> str:
        return "foreign"


SAMPLERS: dict[str, Callable[[], Any]] = {
    "always off": lambda: ALWAYS_OFF,
    "parent based, off": lambda: DEFAULT_OFF,
    "parent based on custom": lambda: ParentBased(Custom()),
    "ratio": lambda: TraceIdRatioBased(0.0),
    "parent based ratio": lambda: ParentBasedTraceIdRatio(0.0),
    "custom": Custom,
    "frozen": Frozen,
    "slots": WithSlots,
    "frozen with slots": FrozenWithSlots,
    "of a foreign layout": OfAForeignLayout,
}


@pytest.fixture(params=sorted(SAMPLERS))
def sampler(request: pytest.FixtureRequest) -> Any:
    return SAMPLERS[request.param]()


def provider_with(sampler: Any, exported: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exported))
    trace.set_tracer_provider(provider)
    return provider


def test_a_job_that_is_not_sampled_counts_its_calls_and_exports_nothing(
    sampler: Any, no_provider: None, exported: InMemorySpanExporter, tracing: Tracing
) -> None:
    made_earlier = provider_with(sampler, exported).get_tracer("made before the first job")

    with running_job(tracing) as job:
        call_model(made_earlier)
        call_model(trace.get_tracer("made in the job"))

    assert calls_in(job) == 2
    assert job.trace_id is not None
    assert exported.get_finished_spans() == ()


def test_outside_of_jobs_and_after_close_it_drops_as_before(
    sampler: Any, no_provider: None, exported: InMemorySpanExporter, tracing: Tracing
) -> None:
    tracer = provider_with(sampler, exported).get_tracer("x")
    with running_job(tracing):
        pass

    assert not tracer.start_span("between jobs").is_recording()

    with running_job(tracing):
        assert tracer.start_span("in a job").is_recording()
        tracing.close()
        assert not tracer.start_span("in a job that is not collected any more").is_recording()


def test_spans_of_a_sampled_job_stay_sampled(
    no_provider: None, exported: InMemorySpanExporter, tracing: Tracing
) -> None:
    provider_with(ParentBased(ALWAYS_ON), exported)
    with running_job(tracing):
        call_model()
    assert [span.name for span in exported.get_finished_spans()] == ["chat", "run job"]


def test_what_the_publisher_did_not_sample_is_counted_all_the_same(
    no_provider: None, exported: InMemorySpanExporter, tracing: Tracing
) -> None:
    provider_with(ParentBased(ALWAYS_ON), exported)
    unsampled = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-00"}
    with running_job(tracing, carrier=unsampled) as job:
        call_model()
    assert calls_in(job) == 1
    assert job.trace_id == "a" * 32
    assert exported.get_finished_spans() == ()


def test_attributes_given_at_the_start_of_a_dropped_span_are_kept(
    no_provider: None, exported: InMemorySpanExporter, tracing: Tracing
) -> None:
    tracer = provider_with(ALWAYS_OFF, exported).get_tracer("x")
    with running_job(tracing):
        span = tracer.start_span("s", attributes={"key": "value"})
        assert dict(span.attributes) == {"key": "value"}  # type: ignore[attr-defined]


def test_a_sampler_is_left_as_it_was(no_provider: None, exported: InMemorySpanExporter, tracing: Tracing) -> None:
    for sampler in (custom := Custom(), slots := WithSlots(), Frozen()):
        provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)  # type: ignore[arg-type]
        tracing = Tracing()
        tracing._providers._attach(provider)
        tracing.close()
        assert provider.sampler is sampler
    assert vars(custom) == {}
    assert type(slots) is WithSlots
