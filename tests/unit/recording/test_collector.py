"""Whose span it is: threads, asyncio, shared traces, late spans, forks, and spans that are not as they should be."""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import SpanLimits, TracerProvider

from tests.support.model_spans import CHAT, call_model, calls_in, running_job, start_model_call
from xpander_celery.recording import collector as collector_module
from xpander_celery.recording.spans import Tracing

pytestmark = pytest.mark.usefixtures("provider")


class Clock:
    """Nanoseconds, from now on where the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tracing: Tracing) -> None:
        self.ahead_ns = 0
        real = tracing._collector.clock
        monkeypatch.setattr(tracing._collector, "clock", lambda: real() + self.ahead_ns)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tracing: Tracing) -> Clock:
    return Clock(monkeypatch, tracing)


def run_job(tracing: Tracing) -> None:
    with running_job(tracing):
        pass


def lines_run(run: Callable[[], object]) -> int:
    """How many lines of Python it takes: what it costs, whatever else the machine does."""
    count = 0

    def trace_line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace_line

    before = sys.gettrace()
    sys.settrace(trace_line)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


class TestThreads:
    def test_a_thread_with_the_context_belongs_to_its_job(self, tracing: Tracing) -> None:
        with running_job(tracing) as first, running_job(tracing) as second:
            context = contextvars.copy_context()
            with ThreadPoolExecutor(1) as pool:
                pool.submit(context.run, call_model).result()
        assert (calls_in(first), calls_in(second)) == (0, 1)

    def test_a_thread_without_context_belongs_to_the_only_job(self, tracing: Tracing) -> None:
        with running_job(tracing) as job, ThreadPoolExecutor(1) as pool:
            pool.submit(call_model).result()
        assert calls_in(job) == 1

    def test_a_thread_without_context_belongs_to_nobody_among_two_jobs(self, tracing: Tracing) -> None:
        with running_job(tracing) as first, running_job(tracing) as second, ThreadPoolExecutor(1) as pool:
            pool.submit(call_model).result()
        assert (calls_in(first), calls_in(second)) == (0, 0)

    def test_children_in_such_a_thread_follow_their_root(self, tracing: Tracing) -> None:
        tracer = trace.get_tracer("x")

        def work() -> None:
            with tracer.start_as_current_span("agent"):
                call_model()

        with running_job(tracing) as job, ThreadPoolExecutor(1) as pool:
            pool.submit(work).result()
        assert calls_in(job) == 1

    def test_jobs_in_parallel_threads_keep_apart(self, tracing: Tracing) -> None:
        together = threading.Barrier(8)

        def work(calls: int) -> int:
            with running_job(tracing) as job:
                together.wait(30)
                for _ in range(calls):
                    call_model()
                together.wait(30)
            return calls_in(job)

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(8))) == list(range(8))

    def test_one_job_filled_from_many_threads_misses_nothing(self, tracing: Tracing) -> None:
        with running_job(tracing) as job:
            contexts = [contextvars.copy_context() for _ in range(8)]
            with ThreadPoolExecutor(8) as pool:
                for context in contexts:
                    pool.submit(context.run, lambda: [call_model() for _ in range(200)])
        assert calls_in(job) == 1600


class TestAsyncio:
    async def test_tasks_and_threads_of_a_job_belong_to_it(self, tracing: Tracing) -> None:
        async def call() -> None:
            await asyncio.sleep(0)
            call_model()

        with running_job(tracing) as job:
            await asyncio.gather(call(), call(), asyncio.create_task(call()), asyncio.to_thread(call_model))
            await asyncio.get_running_loop().run_in_executor(None, call_model)
        assert calls_in(job) == 5

    async def test_jobs_in_parallel_tasks_keep_apart(self, tracing: Tracing) -> None:
        async def job(calls: int) -> int:
            with running_job(tracing) as job:
                for _ in range(calls):
                    await asyncio.sleep(0)
                    call_model()
            return calls_in(job)

        assert await asyncio.gather(*(job(calls) for calls in range(6))) == list(range(6))


class TestTraces:
    def test_an_empty_context_in_the_body_does_not_hide_its_job(self, tracing: Tracing) -> None:
        with running_job(tracing) as job:
            call_model(context=Context())
        assert calls_in(job) == 1

    def test_a_bare_parent_finds_its_job(self, tracing: Tracing) -> None:
        with running_job(tracing) as first, running_job(tracing) as second:
            context = trace.set_span_in_context(first._span, Context())
            contextvars.Context().run(call_model, context=context)
        assert (calls_in(first), calls_in(second)) == (1, 0)

    def test_an_unknown_parent_of_the_trace_of_one_job_finds_it(self, tracing: Tracing) -> None:
        with running_job(tracing) as first, running_job(tracing) as second:
            unknown = {"traceparent": f"00-{first.trace_id}-{'c' * 16}-01"}
            context = trace.propagation.tracecontext.TraceContextTextMapPropagator().extract(unknown, Context())
            contextvars.Context().run(call_model, context=context)
        assert (calls_in(first), calls_in(second)) == (1, 0)

    def test_a_chain_in_one_trace_keeps_its_jobs_apart(self, tracing: Tracing) -> None:
        message = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        with running_job(tracing, carrier=message) as first:
            call_model()
            late = start_model_call()
        with running_job(tracing, carrier=message) as second:
            call_model()
            late.end()
        assert first.trace_id == second.trace_id == "a" * 32
        assert (calls_in(first), calls_in(second)) == (2, 1)

    def test_a_trace_that_another_job_had_says_nothing(self, tracing: Tracing, clock: Clock) -> None:
        message = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        with running_job(tracing, carrier=message) as first:
            pass
        clock.ahead_ns = 10**10
        with running_job(tracing, carrier=message) as second:
            context = trace.propagation.tracecontext.TraceContextTextMapPropagator().extract(message, Context())
            contextvars.Context().run(call_model, context=context)
        assert (calls_in(first), calls_in(second)) == (0, 0)

    def test_a_span_in_the_context_of_an_earlier_job_is_never_the_current_ones(
        self, tracing: Tracing, clock: Clock
    ) -> None:
        with running_job(tracing) as first:
            context = otel_context.get_current()
        clock.ahead_ns = 10**10
        with running_job(tracing) as second:
            call_model(context=context)
        assert (calls_in(first), calls_in(second)) == (0, 0)

    def test_a_context_leaked_into_the_next_job_does_not_take_its_calls(self, tracing: Tracing) -> None:
        with running_job(tracing) as first:
            context = otel_context.get_current()
        with running_job(tracing) as second:
            otel_context.attach(context)
            call_model()
        assert (calls_in(first), calls_in(second)) == (0, 1)

    def test_a_nested_job_is_its_own(self, tracing: Tracing) -> None:
        with running_job(tracing) as outer:
            call_model()
            with running_job(tracing, carrier=None) as inner:
                call_model()
                call_model()
            call_model()
        assert (calls_in(outer), calls_in(inner)) == (2, 2)
        assert outer.trace_id == inner.trace_id


class TestLateSpans:
    def test_a_stream_that_ends_after_the_job_corrects_it_within_the_grace(
        self, tracing: Tracing, clock: Clock
    ) -> None:
        told: list[int] = []
        with running_job(tracing, on_usage=lambda: told.append(calls_in(job))) as job:
            call_model()
            stream, too_late = start_model_call(), start_model_call()
        clock.ahead_ns = 4 * 10**9
        stream.end()
        clock.ahead_ns = 6 * 10**9
        too_late.end()
        assert told == [1, 2]
        assert calls_in(job) == 2

    def test_a_span_written_afterwards_for_the_time_of_the_job_is_its_own(self, tracing: Tracing) -> None:
        with running_job(tracing) as job:
            during = tracing._collector.clock()
        threading.Thread(target=call_model, kwargs={"start_time": during}).start()
        threading.Thread(target=call_model).start()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join(30)
        assert calls_in(job) == 1

    def test_what_is_kept_of_a_job_is_gone_after_the_grace(self, tracing: Tracing, clock: Clock) -> None:
        collector = tracing._collector
        with running_job(tracing):
            start_model_call()
        clock.ahead_ns = 6 * 10**9
        with running_job(tracing) as job:
            pass
        assert list(collector._jobs.values()) == [job._job]
        assert collector._owners == {}
        assert list(collector._own_spans.values()) == [job._job]

    def test_a_job_costs_the_same_in_a_process_that_has_run_many(self, tracing: Tracing, clock: Clock) -> None:
        def steps_of_a_job(earlier: int) -> int:
            open_spans = []
            for _ in range(earlier):
                with running_job(tracing):
                    open_spans.append(start_model_call())
                clock.ahead_ns += 10**9  # one job a second, so that at each the grace of another is over
            steps = lines_run(lambda: run_job(tracing))
            for span in open_spans:
                span.end()
            return steps

        few = steps_of_a_job(earlier=10)
        assert steps_of_a_job(earlier=1000) <= few * 1.2

    def test_spans_of_jobs_that_run_long_are_not_swept(self, tracing: Tracing, clock: Clock) -> None:
        with running_job(tracing) as long:
            spans = [start_model_call() for _ in range(20)]
            for _ in range(10):
                contextvars.Context().run(run_job, tracing)
                clock.ahead_ns += 10**9
            for span in spans:
                span.end()
        assert calls_in(long) == 20


class TestNotifying:
    def test_only_usage_and_tools_are_told(self, tracing: Tracing) -> None:
        told: list[bool] = []
        with running_job(tracing, on_usage=lambda: told.append(True)):
            trace.get_tracer("http").start_span("GET").end()
            assert told == []
            call_model()
            trace.get_tracer("x").start_span("t", attributes={"gen_ai.tool.name": "look"}).end()
        assert told == [True, True]

    def test_a_failing_listener_does_not_reach_the_body(
        self, tracing: Tracing, caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail() -> None:
            raise OSError("disk full")

        with running_job(tracing, on_usage=fail) as job:
            call_model()
        assert calls_in(job) == 1
        assert "could not be read" in caplog.text

    def test_a_soft_time_limit_that_hits_the_listener_reaches_the_body(self, tracing: Tracing) -> None:
        class SoftTimeLimitExceeded(Exception):  # noqa: N818  Celery's name
            pass

        def interrupted() -> None:
            raise SoftTimeLimitExceeded

        with running_job(tracing, on_usage=interrupted), pytest.raises(SoftTimeLimitExceeded):
            call_model()


class TestOddSpans:
    def test_a_span_that_ends_twice_counts_once(self, tracing: Tracing, provider: TracerProvider) -> None:
        provider.add_span_processor(tracing._collector)
        with running_job(tracing) as job:
            call_model()
        assert len(job.facts()) == 1

    @pytest.mark.parametrize("broken", ["instrumentation_scope", "context", "start_time", "parent"])
    def test_a_malformed_span_raises_nothing(self, tracing: Tracing, broken: str) -> None:
        class Malformed:
            instrumentation_scope = context = parent = None
            start_time = 0

            def __getattribute__(self, name: str) -> Any:
                if name == broken:
                    raise AttributeError(name)
                return object.__getattribute__(self, name)

        with running_job(tracing):
            tracing._collector.on_start(Malformed())  # type: ignore[arg-type]
            tracing._collector.on_end(Malformed())  # type: ignore[arg-type]

    def test_evicted_attributes_do_not_hide_usage(self, no_provider: None, tracing: Tracing) -> None:
        limited = TracerProvider(shutdown_on_exit=False, span_limits=SpanLimits(max_span_attributes=8))
        tracing._providers._attach(limited)
        with running_job(tracing) as job:
            span = limited.get_tracer("x").start_span("chat", attributes={"gen_ai.operation.name": "chat"})
            for number in range(200):
                span.set_attribute(f"message.{number}", "x")
            span.set_attributes({key: value for key, value in CHAT.items() if "usage" in key})
            span.end()
        assert calls_in(job) == 1

    def test_a_job_with_too_many_spans_counts_what_it_drops(
        self, tracing: Tracing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(collector_module, "_MAX_SPANS", 3)
        with running_job(tracing) as job:
            for _ in range(5):
                call_model()
        assert len(job.facts()) == 3
        assert job._job.dropped == 2
        assert caplog.text.count("too many spans") == 1

    def test_many_traces_are_remembered_up_to_a_bound(self, tracing: Tracing, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(collector_module, "_MAX_TRACES", 10)
        for _ in range(50):
            with running_job(tracing):
                pass
        assert len(tracing._collector._traces) <= 11


class TestFork:
    def test_a_process_that_a_job_forks_counts_nothing_for_it(self, tracing: Tracing) -> None:
        told: list[bool] = []
        reader, writer = os.pipe()
        with running_job(tracing, on_usage=lambda: told.append(True)) as job:
            child = os.fork()
            if child == 0:
                try:
                    call_model()
                    os.write(writer, f"{len(told)} {calls_in(job)}".encode())
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            call_model()
        assert os.read(reader, 100) == b"0 0"
        assert calls_in(job) == 1

    def test_a_forked_child_counts_its_own_jobs(self, tracing: Tracing) -> None:
        with running_job(tracing):
            pass
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                with running_job(tracing) as job:
                    call_model()
                os.write(writer, str(calls_in(job)).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reader, 100) == b"1"
