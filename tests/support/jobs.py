"""The app of the integration tests: jobs that end in every way."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from typing import Any

from celery import Celery, chain, chord, group, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from opentelemetry import context, trace

import xpander_celery as xc

app = Celery("jobs", broker=os.environ.get("BROKER_URL"), backend=os.environ.get("RESULT_BACKEND"))
app.conf.update(
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_transport_options={
        "visibility_timeout": 5,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }
    if os.environ.get("BROKER_URL", "").startswith("redis")
    else {},
)
app.conf.xpander_relay = os.environ.get("TEST_RELAY", "auto")


def instrument(**_: Any) -> None:
    xc.instrument(app)


if os.environ.get("TEST_INSTRUMENT") == "worker_init":
    signals.worker_init.connect(instrument, weak=False)
elif os.environ.get("TEST_INSTRUMENT") != "never":
    instrument()

SPENT = xc.Tokens(prompt_tokens=10, completion_tokens=1)


@app.task(**({"xpander": {os.environ["TEST_OPTION"]: "x"}} if "TEST_OPTION" in os.environ else {}))
def add(x: int, y: int) -> int:
    return x + y


@app.task
def fail(message: str) -> None:
    raise ValueError(message)


@app.task(bind=True, max_retries=3)
def retry_once(self: Any, question: str) -> str:
    xc.current_job().add_usage(SPENT)
    with xc.tool_call(f"tool-{self.request.retries}"):
        if self.request.retries < 1:
            raise self.retry(countdown=0, exc=ConnectionError("busy"))
    return question


@app.task(bind=True)
def retry_elsewhere(self: Any, queue: str) -> str:
    xc.current_job().add_usage(SPENT)
    if self.request.retries < 1:
        raise self.retry(countdown=0, queue=queue, exc=ConnectionError("busy"))
    return "there"


@app.task(bind=True, autoretry_for=(ConnectionError,), retry_kwargs={"countdown": 0, "max_retries": 2})
def retry_by_itself(self: Any) -> str:
    xc.current_job().add_usage(SPENT)
    if self.request.retries < 2:
        raise ConnectionError("busy")
    return "at last"


@app.task(bind=True, max_retries=1)
def give_up(self: Any) -> None:
    raise self.retry(countdown=0, exc=ConnectionError("still busy"))


@app.task(time_limit=1)
def overrun() -> None:
    xc.current_job().add_usage(SPENT)
    time.sleep(60)


@app.task(soft_time_limit=1)
def overrun_softly() -> None:
    time.sleep(60)


@app.task
def die() -> None:
    """As by the kernel's out-of-memory killer."""
    xc.current_job().add_usage(SPENT)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task
def leave() -> None:
    sys.exit(3)


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True)
def die_once(self: Any) -> str:
    xc.current_job().add_usage(SPENT)
    if not self.request.delivery_info["redelivered"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


@app.task
def ignore() -> None:
    raise Ignore("nothing to do")


@app.task
def reject() -> None:
    raise Reject("not mine", requeue=False)


@app.task
def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


@app.task(track_started=True)
def doze(steps: int) -> float:
    """Sleeps a hundredth of a second so many times; the longest, in seconds, shows whether the process stood still."""
    xc.current_job().add_usage(SPENT)
    longest = 0.0
    for _ in range(steps):
        began = time.monotonic()
        time.sleep(0.01)
        longest = max(longest, time.monotonic() - began)
    return longest


@app.task(acks_late=True)
def sleep_late(seconds: float) -> str:
    xc.current_job().add_usage(SPENT)
    time.sleep(0 if os.environ.get("TEST_SHORT") else seconds)
    return "slept"


@app.task
def return_what_json_cannot_hold() -> Any:
    return object()


@app.task
def call_within(x: int) -> int:
    """A job that calls another one eagerly: each is a job of its own."""
    inner: int = add.apply((x, 1)).get(disable_sync_subtasks=False)
    xc.current_job().llm_response = {"inner": inner}
    return inner * 2


@app.task(bind=True)
def replace_by_one(self: Any, x: int) -> None:
    xc.current_job().add_usage(SPENT)
    raise self.replace(add.s(x, 1))


@app.task(bind=True)
def replace_by_group(self: Any) -> None:
    xc.current_job().add_usage(SPENT)
    raise self.replace(group(add.s(1, 1), add.s(2, 2)))


@app.task(bind=True)
def replace_by_chain(self: Any) -> None:
    xc.current_job().add_usage(SPENT)
    raise self.replace(chain(add.s(1, 1), add.s(10)))


@app.task(soft_time_limit=1)
def count_until_limit() -> str:
    """Spends nearly all its time in our code."""
    try:
        while True:
            xc.current_job().add_usage(SPENT)
            with xc.tool_call("search"):
                pass
    except SoftTimeLimitExceeded:
        return "the limit arrived"


@app.task(soft_time_limit=1)
def publish_until_limit() -> str:
    try:
        while True:
            said = signals.before_task_publish.send(sender="nobody", headers={"id": "none"}, body=((), {}, {}))
            for _, swallowed in said:
                if isinstance(swallowed, SoftTimeLimitExceeded):
                    return _where(swallowed)
    except SoftTimeLimitExceeded:
        return "the limit arrived"


def _where(limit: SoftTimeLimitExceeded) -> str:
    """Where Celery's dispatch swallowed a limit: around the call of a receiver, whichever that is, or within it."""
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(limit.__traceback__)]
    is_around = all(code.co_name in _DISPATCHING or line == code.co_firstlineno for code, line in frames)
    return "the limit hit Celery's dispatch" if is_around else f"the limit was swallowed: {frames}"


_DISPATCHING = ("send", "soft_timeout_sighandler")


@app.task
def leak_a_context() -> None:
    """As an agent's stream that nobody reads to its end: its span stays current."""
    span = trace.get_tracer("agent").start_span("abandoned")
    context.attach(trace.set_span_in_context(span))


def spend() -> None:
    with trace.get_tracer("model").start_as_current_span("chat") as span:
        span.set_attribute("gen_ai.operation.name", "chat")
        span.set_attribute("gen_ai.usage.input_tokens", SPENT.prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", SPENT.completion_tokens)


@app.task
def spend_in_a_span() -> None:
    spend()


@app.task(base=xc.XpanderTask)
def spend_in_a_span_isolated() -> None:
    spend()


@app.task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task(name="jobs.own_agent", base=xc.XpanderTask, xpander={"agent_id": "own-agent"})
def own_agent(password: str, question: str) -> str:
    return question


@app.task(name="jobs.decorated", bind=True)
@xc.reported(agent_id="decorated-agent")
def decorated(self: Any, question: str) -> str:
    assert self.request.id == xc.current_job().id
    return question


@xc.reported(agent_id="above-agent", input=False)
@app.task(name="jobs.decorated_above", acks_late=True)
def decorated_above(question: str) -> str:
    return question


def chord_of(count: int) -> Any:
    return chord([add.s(n, n) for n in range(count)])(total.s())
