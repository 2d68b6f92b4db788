"""What a message's headers say of its publisher is read as OpenTelemetry's own propagators read it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import baggage, propagate, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.trace import SpanContext
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from xpander_celery.recording.collector import JOB_KEY, Collector
from xpander_celery.recording.parents import context_for

TRACE, SPAN = "a" * 32, "b" * 16
USUAL = f"00-{TRACE}-{SPAN}-01"

HEX = st.sampled_from("0123456789abcdef")
TRACEPARENTS = st.builds(
    "{}-{}-{}-{}{}".format,
    st.sampled_from(["00", "01", "ff", "cc", "0"]),
    st.one_of(st.just("0" * 32), st.text(HEX, min_size=31, max_size=33)),
    st.one_of(st.just("0" * 16), st.text(HEX, min_size=15, max_size=17)),
    st.one_of(st.sampled_from(["00", "01", "03", "ff", "", "1"])),
    st.sampled_from(["", " ", "\n", "-more", "Z"]),
)


def parent_of(context: Context) -> SpanContext:
    return trace.get_current_span(context).get_span_context()


def read(headers: dict[str, Any]) -> Context:
    context = context_for(Collector(grace_s=1).open(None), headers)
    return Context({key: value for key, value in context.items() if key != JOB_KEY})


@given(traceparent=st.one_of(TRACEPARENTS, st.text(max_size=60)))
def test_a_traceparent_means_what_the_propagator_says(traceparent: str) -> None:
    headers = {"traceparent": traceparent}
    assert parent_of(read(headers)) == parent_of(propagate.extract(headers, Context()))


@pytest.mark.parametrize(
    "more",
    [{}, {"tracestate": "vendor=1"}, {"tracestate": ""}, {"baggage": "tenant=acme"}, {"tracestate": None}],
    ids=str,
)
def test_what_comes_with_a_traceparent_is_kept(more: dict[str, Any]) -> None:
    headers = {"traceparent": USUAL, **more}
    context = read(headers)
    known = propagate.extract({key: value for key, value in headers.items() if value is not None}, Context())
    assert parent_of(context) == parent_of(known)
    assert baggage.get_all(context) == baggage.get_all(known)


def test_baggage_needs_no_traceparent() -> None:
    assert baggage.get_all(read({"baggage": "tenant=acme"})) == {"tenant": "acme"}


class Reversed(TraceContextTextMapPropagator):
    """A propagator of the user's."""

    def extract(self, carrier: Any, context: Any = None, getter: Any = None) -> Context:
        return super().extract({"traceparent": carrier["parent"][::-1]}, context)


@pytest.mark.parametrize(
    "chosen",
    [
        Reversed(),
        CompositePropagator([Reversed()]),
        CompositePropagator([Reversed(), W3CBaggagePropagator()]),
        CompositePropagator([TraceContextTextMapPropagator(), W3CBaggagePropagator(), Reversed()]),
    ],
    ids=["alone", "composite", "in the place of the default", "beside the default"],
)
def test_a_propagator_that_the_user_chose_is_asked(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagate, "_HTTP_TEXT_FORMAT", chosen)
    context = read({"traceparent": f"00-{'c' * 32}-{SPAN}-01", "parent": USUAL[::-1]})
    assert parent_of(context).trace_id == int(TRACE, 16)


def test_no_propagator_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagate, "_HTTP_TEXT_FORMAT", CompositePropagator([]))
    assert not parent_of(read({"traceparent": USUAL})).is_valid
