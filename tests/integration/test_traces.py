"""The stack's app as plain processes, its spans exported by OTLP: publisher, job and model stand in one trace, and the
job's record names it. On both brokers of the stack."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.broker import Broker, start_rabbitmq
from tests.support.otlp import ReceivedSpan, Receiver, start_receiver
from tests.support.sandbox import Sandbox, start_sandbox
from tests.support.waiting import until
from tests.support.worker import start_worker
from xpander_celery.demo.processes import clean_environ

APP = "examples.stack.app"
AGENT = "stack"
ROOT = Path(__file__).parents[2]
_SEND = """
import sys
from opentelemetry import trace
from examples.stack.app import app
from examples.stack.traces import export_traces

export_traces()
print(app.send_task(sys.argv[1], args=sys.argv[2:]).id)
trace.get_tracer_provider().shutdown()
"""


@dataclass(frozen=True)
class House:
    """A worker of the stack's app that reports to a sandbox and exports to a receiver."""

    sandbox: Sandbox
    receiver: Receiver
    environ: dict[str, str]

    def send(self, job: str, *arguments: str) -> str:
        """Publish a job from a process of its own that exports its spans, too; the job's id."""
        command = [sys.executable, "-c", _SEND, job, *arguments]
        environ = clean_environ(**self.environ, OTEL_SERVICE_NAME="web")
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def record(self, job_id: str) -> dict[str, Any]:
        """The record of a job, once it is over."""
        record = until(lambda: self.sandbox.record(job_id), timeout_s=60, what=f"the record of {job_id}")
        return record or {}

    def trace(self, trace_id: str, is_complete: Callable[[list[ReceivedSpan]], bool]) -> list[ReceivedSpan]:
        """The spans of a trace, once all of it has arrived."""

        def complete() -> list[ReceivedSpan]:
            spans = self.receiver.trace(trace_id)
            return spans if is_complete(spans) else []

        return until(complete, what=f"the trace {trace_id}")


@pytest.fixture(scope="module", params=["redis", "rabbitmq"])
def broker(request: pytest.FixtureRequest, redis_broker: Broker) -> Iterator[Broker]:
    """The broker; results are in Redis, as in the stack: chords need them there."""
    with contextlib.ExitStack() as stack:
        if request.param == "rabbitmq":
            rabbitmq = stack.enter_context(start_rabbitmq())
            yield Broker("rabbitmq", rabbitmq.url, redis_broker.backend)
        else:
            yield redis_broker


@pytest.fixture(scope="module")
def house(broker: Broker, redis_broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    directory = tmp_path_factory.mktemp("worker")
    with start_sandbox() as sandbox, start_receiver() as receiver:
        environ = {
            "BROKER_URL": broker.url,
            "RESULT_BACKEND": broker.backend,
            "LEDGER_URL": redis_broker.url,
            "ALIVE_FILE": str(directory / "alive"),
            "OPENAI_BASE_URL": f"{sandbox.url}/v1",
            "OPENAI_API_KEY": "any",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "XPANDER_BASE_URL": sandbox.url,
            "XPANDER_API_KEY": sandbox.api_key,
            "XPANDER_AGENT_ID": AGENT,
        }
        with start_worker(broker, directory, "--concurrency=1", app=APP, **environ, OTEL_SERVICE_NAME="worker"):
            yield House(sandbox, receiver, environ)


def of_kind(spans: list[ReceivedSpan], kind: str) -> list[ReceivedSpan]:
    return [span for span in spans if span.kind == kind]


def model_calls(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
    return [span for span in spans if span.attributes.get("openinference.span.kind") == "LLM"]


def ancestors(span: ReceivedSpan, spans: list[ReceivedSpan]) -> list[str]:
    """The ids of what a span is below of."""
    parents = {known.span_id: known.parent_id for known in spans}
    found = [span.parent_id]
    while found[-1] in parents:
        found.append(parents[found[-1]])
    return found


def test_publisher_job_and_model_are_one_trace_that_the_record_names(house: House) -> None:
    record = house.record(house.send("stack.ask", "How many chairs are there?"))
    trace_id = record["llm_response"]["celery"]["trace_id"]
    spans = house.trace(trace_id, lambda spans: bool(of_kind(spans, "PRODUCER") and of_kind(spans, "CONSUMER")))
    (published,) = of_kind(spans, "PRODUCER")
    (job,) = of_kind(spans, "CONSUMER")
    calls = model_calls(spans)
    assert (published.service, job.service) == ("web", "worker")
    assert published.parent_id == ""
    assert job.parent_id == published.span_id
    assert len(calls) == 2
    assert all(job.span_id in ancestors(call, spans) for call in calls)


def test_the_record_counts_the_tokens_that_the_trace_shows(house: House) -> None:
    record = house.record(house.send("stack.ask", "What does a table cost?"))
    trace_id = record["llm_response"]["celery"]["trace_id"]
    spans = house.trace(trace_id, lambda spans: bool(of_kind(spans, "CONSUMER")))
    for kind in ("prompt", "completion"):
        shown = sum(call.attributes[f"llm.token_count.{kind}"] for call in model_calls(spans))
        assert record["tokens"][f"{kind}_tokens"] == shown > 0


def test_the_jobs_that_a_job_sends_are_in_its_trace(house: House) -> None:
    record = house.record(house.send("stack.digest", "ab"))
    trace_id = record["llm_response"]["celery"]["trace_id"]
    spans = house.trace(trace_id, lambda spans: len(of_kind(spans, "CONSUMER")) == 4)
    assert sorted(job.attributes["celery.task_name"] for job in of_kind(spans, "CONSUMER")) == [
        "stack.add_up",
        "stack.count_words",
        "stack.count_words",
        "stack.digest",
    ]
