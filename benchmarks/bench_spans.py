"""What collecting costs: each span of a job, each event of its progress, and the sum at its end. All of one run.

    python benchmarks/bench_spans.py [--quick]

Budgets: at most 8 µs for a collected span, 12 µs for a `progress` event, and 100,000 spans summed in under a second.
Each pair is measured in short turns, and the best of the turns counts, since what else runs on a machine only ever
adds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from xpander_celery.journal.files import FileJournal
from xpander_celery.recording.facts import SpanFacts
from xpander_celery.recording.packed import PackedSpans
from xpander_celery.recording.recording import Recorder, Recording
from xpander_celery.recording.spans import Tracing
from xpander_celery.recording.usage import usage_of
from xpander_celery.report import Outcome

SPAN_BUDGET_US = 8.0
PROGRESS_BUDGET_US = 12.0
SUM_BUDGET_S = 1.0

# As an instrumentation writes them: the counts, and the messages that make most of a span's attributes.
MESSAGES = {f"llm.input_messages.{n}.message.content": "What is the weather?" for n in range(24)}
CALL: dict[str, Any] = {
    "openinference.span.kind": "LLM",
    "llm.model_name": "gpt-4.1-mini",
    "llm.provider": "openai",
    **MESSAGES,
    "llm.token_count.prompt": 1234,
    "llm.token_count.completion": 56,
    "llm.token_count.total": 1290,
    "llm.token_count.prompt_details.cache_read": 512,
}
REQUEST: dict[str, Any] = {"http.request.method": "POST", "url.full": "https://api.example.com/v1", "server.port": 443}


def spans_of(tracer: trace.Tracer, attributes: dict[str, Any], times: int) -> float:
    """Seconds of CPU for starting and ending so many spans, below the current one."""
    before = time.process_time()
    for _ in range(times):
        tracer.start_span("span", attributes=attributes).end()
    return time.process_time() - before


def in_turns(first: Callable[[], float], second: Callable[[], float], turns: int) -> tuple[float, float]:
    """The best of each."""
    pairs = [(first(), second()) for _ in range(turns)]
    return min(a for a, _ in pairs), min(b for _, b in pairs)


def collected(times: int, turns: int) -> bool:
    """Print what a span costs with and without a collecting job; whether each is within the budget."""
    watched = TracerProvider(shutdown_on_exit=False)
    trace.set_tracer_provider(watched)
    tracing = Tracing()
    tracing.start_job("first", carrier={}).end()  # finds the providers that there are, so before the bare one is made
    bare = TracerProvider(shutdown_on_exit=False).get_tracer("bench")
    within = True
    print(f"{'span':28}{'bare':>10}{'collected':>12}{'added':>10}{'ratio':>8}")
    for name, attributes in (("call to a model, 32 values", CALL), ("HTTP request, 3 values", REQUEST)):

        def alone(attributes: dict[str, Any] = attributes) -> float:
            with bare.start_as_current_span("run bench"):
                return spans_of(bare, attributes, times)

        def in_a_job(attributes: dict[str, Any] = attributes) -> float:
            job = tracing.start_job("run bench", carrier={})
            job.activate()
            try:
                return spans_of(watched.get_tracer("bench"), attributes, times)
            finally:
                job.deactivate()
                job.end()

        without, with_job = in_turns(alone, in_a_job, turns)
        added = (with_job - without) / times * 1e6
        within &= added <= SPAN_BUDGET_US
        bare_us, collected_us = without / times * 1e6, with_job / times * 1e6
        print(f"{name:28}{bare_us:7.1f} µs{collected_us:9.1f} µs{added:7.1f} µs{with_job / without:8.2f}")
    return within


def told(times: int, turns: int) -> bool:
    """Print what an event of the progress costs, after a call to a model; whether that is within the budget."""
    tracing, tracer = Tracing(), trace.get_tracer("openinference.instrumentation.openai")
    with tempfile.TemporaryDirectory() as directory:
        journal = FileJournal(Path(directory))
        recorder = Recorder(journal.append)

        def after_a_call(number: int) -> Recording:
            span = tracing.start_job("run bench", carrier={})
            span.activate()
            tracer.start_span("chat", attributes=CALL).end()
            span.deactivate()
            facts = {"task": "bench"}
            return Recording(
                recorder, job_id=f"job-{number}", attempt_id="a", child="c", owner="c", facts=facts, span=span
            )

        def turn() -> float:
            recordings = [after_a_call(number) for number in range(times)]
            before = time.process_time()
            for recording in recordings:
                recording.progress()
            spent = time.process_time() - before
            for recording in recordings:
                recording.finish(Outcome.SUCCEEDED)
            return spent

        best = min(turn() for _ in range(turns)) / times * 1e6
        written = journal.counters.durable
        journal.close()
    if written != 2 * times * turns:
        raise RuntimeError(f"{written} events were written, not {2 * times * turns}")
    print(f"progress told in {best:.1f} µs")
    return best <= PROGRESS_BUDGET_US


def summed(spans: int) -> bool:
    """Print what a big job costs at its end; whether that is within the budget."""
    job = PackedSpans()
    for number in range(1, spans + 1):
        facts = SpanFacts.from_dict(
            {
                "span_id": f"s{number}",
                "parent_id": None,
                "name": "chat",
                "scope": "openinference.instrumentation.openai",
                "start": number,
                "end": number + 1,
                "attributes": {**CALL, "llm.token_count.prompt": number},
            }
        )
        assert facts is not None
        job.append(facts)
    spent = []
    for _ in range(3):
        before = time.process_time()
        usage_of(job)
        spent.append(time.process_time() - before)
    print(f"{spans:,} calls summed in {min(spent):.2f} s, {min(spent) / spans * 1e6:.1f} µs each")
    return min(spent) < SUM_BUDGET_S


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer spans, for a look")
    quick = parser.parse_args().quick
    within = collected(200, 50 if quick else 400)
    within &= told(200, 20 if quick else 100)
    within &= summed(10_000 if quick else 100_000)
    print("within the budgets" if within else "OVER THE BUDGETS")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
