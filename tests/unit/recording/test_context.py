"""The body of a job in a context of its own: what it leaves behind, and what it may set."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextvars import ContextVar

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from xpander_celery.recording.context import run_body

connection: ContextVar[str] = ContextVar("connection")


def test_arguments_and_result_pass_through() -> None:
    def body(first: int, *, second: int) -> int:
        return first + second

    assert run_body(body, 1, second=2) == 3


def test_what_the_body_sets_is_there_afterwards() -> None:
    def within() -> None:
        connection.set("old")
        run_body(connection.set, "new")
        assert connection.get() == "new"

    contextvars.copy_context().run(within)


def test_a_variable_set_for_the_first_time_is_there_afterwards() -> None:
    fresh: ContextVar[str] = ContextVar("fresh")
    run_body(fresh.set, "new")
    assert fresh.get() == "new"


def test_what_the_body_sets_is_there_after_it_raised() -> None:
    def body() -> None:
        connection.set("used")
        raise KeyError("x")

    def within() -> None:
        with pytest.raises(KeyError):
            run_body(body)
        assert connection.get() == "used"

    contextvars.copy_context().run(within)


def test_fifty_bodies_share_one_connection() -> None:
    opened = []

    def body() -> None:
        if connection.get(None) is None:
            opened.append("connection")
            connection.set("connection")

    def within() -> None:
        for _ in range(50):
            run_body(body)

    contextvars.Context().run(within)
    assert len(opened) == 1


def test_an_abandoned_stream_leaves_no_context_attached() -> None:
    def stream() -> Iterator[int]:
        token = otel_context.attach(otel_context.set_value("leaked", True))
        try:
            yield 1
            yield 2
        finally:
            otel_context.detach(token)

    streams = []

    def body() -> int:
        streams.append(stream())
        return next(streams[0])

    before = otel_context.get_current()
    assert run_body(body) == 1
    assert otel_context.get_current() is before


def test_closing_the_abandoned_stream_later_does_not_attach_an_older_context(caplog: pytest.LogCaptureFixture) -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("x")

    def stream() -> Iterator[int]:
        with tracer.start_as_current_span("agent"):
            yield 1
            yield 2

    kept = []

    def body() -> None:
        kept.append(stream())
        next(kept[0])

    with tracer.start_as_current_span("first job"):
        run_body(body)
    with tracer.start_as_current_span("second job") as second:
        kept.pop().close()
        assert trace.get_current_span() is second
    assert not trace.get_current_span().get_span_context().is_valid
    caplog.clear()  # OpenTelemetry logs that it could not detach
