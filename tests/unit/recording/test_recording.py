"""One attempt: the events that tell of it, in order, and what the job itself may say."""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from xpander_celery.events import CarriedAttempt, Event, Finished, Progress, Started, decode, encode
from xpander_celery.fold import fold
from xpander_celery.recording import current_job
from xpander_celery.recording.attributes import Kind
from xpander_celery.recording.facts import SpanFacts
from xpander_celery.recording.job import NO_JOB
from xpander_celery.recording.recording import Recorder, Recording
from xpander_celery.recording.spans import Tracing
from xpander_celery.rendering import Renderer
from xpander_celery.report import Outcome, Tokens

ONE = Tokens(prompt_tokens=1)


class Stage:
    """Clocks that stand still, and the events that were told."""

    def __init__(self, **settings: Any) -> None:
        self.now = 1000.0
        self.elapsed = 0.0
        self.events: list[Event] = []
        self.recorder = Recorder(
            emit=lambda event: self.events.append(decode(encode(event))),
            clock=lambda: self.now,
            timer=lambda: self.elapsed,
            **settings,
        )

    def recording(self, **more: Any) -> Recording:
        given = {"job_id": "job", "attempt_id": "a-1", "child": "p", "owner": "p", "facts": {"task": "ask"}, **more}
        return Recording(self.recorder, **given)

    def progress(self) -> list[Progress]:
        return [event for event in self.events if isinstance(event, Progress)]

    def finished(self) -> Finished:
        return next(event for event in reversed(self.events) if isinstance(event, Finished))


@pytest.fixture
def stage() -> Iterator[Stage]:
    """Whatever a test begins and does not leave is left with it."""
    yield Stage()
    while isinstance(current_job(), Recording):
        current_job().leave()  # type: ignore[attr-defined]


def test_an_attempt_tells_of_its_start_its_progress_and_its_end(stage: Stage) -> None:
    carried = CarriedAttempt(job_id="job", attempt_id="a-0")
    recording = stage.recording(owner="q", carried=(carried,), facts={"task": "ask", "agent_id": "agent"})
    recording.begin()
    stage.elapsed = 2.0
    recording.add_usage(ONE)
    recording.leave()
    stage.elapsed = 5.0
    recording.finish(Outcome.SUCCEEDED, value="fine")
    started, progress, finished = stage.events
    assert isinstance(started, Started)
    assert (started.child, started.owner, started.at, started.carried) == ("p", "q", 1000.0, (carried,))
    assert started.facts.agent_id == "agent"
    assert isinstance(progress, Progress)
    assert (progress.at, progress.duration_s, progress.tokens) == (1002.0, 2.0, ONE)
    assert isinstance(finished, Finished)
    assert (finished.at, finished.duration_s, finished.result, finished.tokens) == (1005.0, 5.0, "fine", ONE)


def test_a_clock_that_jumps_does_not_change_the_order_of_events(stage: Stage) -> None:
    recording = stage.recording()
    recording.begin()
    stage.now, stage.elapsed = 0.0, 1.0
    recording.add_usage(ONE)
    stage.elapsed = 2.0
    recording.finish(Outcome.SUCCEEDED)
    assert [event.at for event in stage.events] == [1000.0, 1001.0, 1002.0]


def test_progress_is_told_at_once_up_to_a_burst_and_then_once_a_second(stage: Stage) -> None:
    recording = stage.recording()
    recording.begin()
    for _ in range(100):
        recording.add_usage(ONE)
    assert [event.tokens.prompt_tokens for event in stage.progress()] == list(range(1, 33))
    stage.elapsed = 1.0
    recording.add_usage(ONE)
    recording.add_usage(ONE)
    assert [event.tokens.prompt_tokens for event in stage.progress()][32:] == [101]
    recording.finish(Outcome.SUCCEEDED)
    assert stage.finished().tokens == Tokens(prompt_tokens=102)


class SlowSpan:
    """The span of a job of which it takes a tenth of a second to add up what is below."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.looks = 0

    def facts(self) -> list[Any]:
        self.looks += 1
        self.stage.elapsed += 0.1
        return []

    def activate(self) -> None: ...
    def deactivate(self) -> None: ...


def test_adding_up_many_spans_takes_a_hundredth_of_a_job_that_goes_on(stage: Stage) -> None:
    span = SlowSpan(stage)
    recording = stage.recording(span=span)
    recording.begin()
    for _ in range(100):
        recording.progress()  # of a tool that is known already: nothing to tell, and yet all is added up
    burst = span.looks
    assert 0 < burst <= 4
    for _ in range(1000):
        stage.elapsed += 1.0
        recording.progress()
    assert 90 <= span.looks - burst <= 102


def test_progress_is_told_only_of_changes(stage: Stage) -> None:
    recording = stage.recording()
    recording.begin()
    recording.progress()
    recording.add_usage(Tokens())
    recording.add_usage(ONE)
    recording.progress()
    assert len(stage.progress()) == 1


def test_a_late_span_corrects_a_finished_attempt(stage: Stage) -> None:
    recording = stage.recording()
    recording.begin()
    stage.elapsed = 3.0
    recording.finish(Outcome.SUCCEEDED)
    stage.elapsed = 9.0
    recording.add_usage(ONE)
    [progress] = stage.progress()
    assert (progress.tokens, progress.duration_s, progress.at) == (ONE, 3.0, 1009.0)


def test_tools_are_told_at_once_in_the_order_of_their_first_use(stage: Stage) -> None:
    recording = stage.recording()
    recording.begin()
    for tool in ("search", "mail", "search"):
        with recording.tool(tool):
            pass
    recording.finish(Outcome.SUCCEEDED)
    assert [event.used_tools for event in stage.progress()] == [("search",), ("search", "mail")]
    assert stage.finished().used_tools == ("search", "mail")


def test_usage_that_is_not_known_is_warned_of(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "xpander_celery.recording.recording")
    recording = stage.recording()
    recording.begin()
    recording.add_usage(object())
    assert ["what a object is" in record.getMessage() for record in caplog.records] == [True]
    assert stage.progress() == []


def test_a_failure_names_type_message_and_traceback(stage: Stage) -> None:
    stage.recording().finish(Outcome.FAILED, error=ValueError("no luck"), traceback="Traceback ...")
    assert stage.finished().result == "ValueError: no luck\n\nTraceback ..."


def test_tracebacks_and_results_can_be_kept_back() -> None:
    stage = Stage(sends_traceback=False)
    stage.recording().finish(Outcome.FAILED, error=ValueError("no luck"), traceback="Traceback ...")
    assert stage.finished().result == "ValueError: no luck"
    stage.recording(sends_result=False).finish(Outcome.FAILED, error=ValueError("no luck"))
    assert stage.finished().result == "ValueError"
    stage.recording(sends_result=False).finish(Outcome.SUCCEEDED, value="secret")
    assert stage.finished().result is None


def test_what_the_job_says_wins_but_a_failure_stays_one(stage: Stage) -> None:
    recording = stage.recording()
    recording.result = "better"
    recording.finish(Outcome.SUCCEEDED, value="returned")
    assert stage.finished().result == "better"
    recording.finish(Outcome.FAILED, error=ValueError("no luck"))
    assert stage.finished().result == "ValueError: no luck"


class Silent:
    """A value that has no text."""

    def __str__(self) -> str:
        raise LookupError("no")


def test_a_later_different_end_keeps_the_duration_of_the_first(stage: Stage) -> None:
    recording = stage.recording()
    recording.begin()
    stage.elapsed = 2.0
    recording.finish(Outcome.SUCCEEDED)
    stage.elapsed = 8.0
    recording.finish(Outcome.FAILED, error=OSError("back-end"))
    assert [(e.outcome, e.duration_s) for e in stage.events if isinstance(e, Finished)] == [
        (Outcome.SUCCEEDED, 2.0),
        (Outcome.FAILED, 2.0),
    ]


class RunOutput:
    """As Agno's: a model's error is its content, and nothing is raised."""

    __module__ = "agno.run.agent"

    def __init__(self, status: str) -> None:
        self.status = status
        self.content = "the model is overloaded"
        self.metrics = None
        self.tools = None
        self.messages: list[Any] = []
        self.run_id = "run-1"


def test_an_agent_run_that_ended_in_an_error_is_a_failure(stage: Stage) -> None:
    stage.recording().finish(Outcome.SUCCEEDED, value=RunOutput("ERROR"))
    assert (stage.finished().outcome, stage.finished().result) == (Outcome.FAILED, "the model is overloaded")


def test_the_history_of_a_job_is_its_earlier_attempts_and_this_one(stage: Stage) -> None:
    earlier = CarriedAttempt(job_id="job", attempt_id="a-0", tokens=ONE)
    recording = stage.recording(carried=(earlier,))
    recording.begin()
    stage.elapsed = 4.0
    recording.add_usage(ONE)
    recording.note_tool("search")
    own = CarriedAttempt(job_id="job", attempt_id="a-1", tokens=ONE, used_tools=("search",), duration_s=4.0)
    assert recording.history() == (earlier, own)


def test_outside_a_job_everything_is_silently_taken() -> None:
    job = current_job()
    job.input = job.result = job.llm_response = job.agent_id = "kept by nobody"
    job.add_usage(object())
    assert (job.id, job.agent_id, job.input, job.result, job.llm_response) == (None,) * 5
    assert job is NO_JOB


def test_jobs_nest_and_give_the_outer_one_back(stage: Stage) -> None:
    outer, inner = stage.recording(job_id="outer"), stage.recording(job_id="inner")
    outer.begin()
    inner.begin()
    inner.begin()  # as after an interruption
    assert current_job() is inner
    inner.leave()
    assert current_job() is outer
    outer.leave()
    assert current_job() is NO_JOB


def known_in_a_thread() -> str | None:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: current_job().id).result()


def test_a_thread_knows_its_job_where_the_process_runs_one_at_a_time(stage: Stage) -> None:
    shared = stage.recording(child="p", owner="p")
    shared.begin()
    assert known_in_a_thread() is None
    alone = stage.recording(job_id="alone", child="p", owner="q")
    alone.begin()
    assert known_in_a_thread() == "alone"
    alone.leave()
    shared.leave()
    assert known_in_a_thread() is None


async def test_tasks_of_asyncio_know_their_job(stage: Stage) -> None:
    async def one(job_id: str) -> tuple[str | None, str | None]:
        recording = stage.recording(job_id=job_id)
        recording.begin()
        await asyncio.sleep(0)
        in_thread = await asyncio.to_thread(lambda: current_job().id)
        return current_job().id, in_thread

    assert await asyncio.gather(one("x"), one("y")) == [("x", "x"), ("y", "y")]
    assert current_job() is NO_JOB


def known_in_a_child(connection: Any) -> None:
    connection.send(current_job().id)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_a_job_forks_is_no_part_of_it(stage: Stage) -> None:
    recording = stage.recording(owner="q")
    recording.begin()
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=known_in_a_child, args=(theirs,))
    child.start()
    assert ours.recv() is None
    child.join()
    assert current_job() is recording
    recording.leave()


def test_its_span_is_current_while_it_runs_and_ends_with_it(stage: Stage) -> None:
    from opentelemetry import trace

    tracing = Tracing()
    recording = stage.recording()
    recording.span = tracing.start_job("run ask", on_usage=recording.progress)
    before = trace.get_current_span()
    recording.begin()
    assert format(trace.get_current_span().get_span_context().trace_id, "032x") == recording.span.trace_id
    with recording.tool("search"):
        pass
    recording.leave()
    assert trace.get_current_span() is before
    recording.finish(Outcome.SUCCEEDED)
    assert stage.finished().used_tools == ("search",)
    tracing.close()


def test_an_ended_job_is_freed_without_the_garbage_collector(stage: Stage) -> None:
    class Name(str):
        """A text that can be watched."""

    tracing = Tracing(late_spans_s=0)
    name = Name("ask")
    kept = weakref.ref(name)
    recording = stage.recording(facts={"task": name})
    del name
    recording.span = tracing.start_job("run ask", on_usage=recording.progress)
    gc.collect()
    gc.disable()
    try:
        recording.begin()
        recording.leave()
        recording.finish(Outcome.SUCCEEDED)
        del recording
        tracing.start_job("run the next")
        assert kept() is None
    finally:
        gc.enable()
        tracing.close()


def test_usage_from_many_threads_is_all_there(stage: Stage) -> None:
    recording = stage.recording(owner="q")
    recording.begin()
    threads = [threading.Thread(target=lambda: [recording.add_usage(ONE) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recording.leave()
    recording.finish(Outcome.SUCCEEDED)
    assert stage.finished().tokens == Tokens(prompt_tokens=400)


class HeldSpan:
    """The span of a job whose one late call is there from the second look on; the first look waits for `released`."""

    def __init__(self) -> None:
        self.looked, self.released = threading.Event(), threading.Event()

    def facts(self) -> list[SpanFacts]:
        if not self.looked.is_set():
            self.looked.set()
            assert self.released.wait(60)
            return []
        return [CALL]

    def activate(self) -> None: ...
    def deactivate(self) -> None: ...
    def seal(self) -> None: ...
    def end(self, **_: Any) -> None: ...


CALL = SpanFacts(1, 0, "layer", Kind.LLM, 0, 1, prompt=1)


def test_usage_that_was_read_before_the_end_does_not_overrule_it(stage: Stage) -> None:
    span = HeldSpan()
    recording = stage.recording(span=span)
    recording.begin()
    with ThreadPoolExecutor() as pool:
        late = pool.submit(recording.progress)
        assert span.looked.wait(60)
        end = pool.submit(recording.finish, Outcome.SUCCEEDED)
        wait([end], timeout=0.2)  # where it does not wait for the other, it is through by now
        stage.elapsed = 1.0
        span.released.set()
        late.result(60)
        end.result(60)
    assert usage_told(stage) == ONE


def test_what_changes_while_usage_is_told_is_told_too(stage: Stage) -> None:
    span = HeldSpan()
    recording = stage.recording(span=span)
    recording.begin()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(recording.progress)
        assert span.looked.wait(60)
        pool.submit(recording.progress).result(60)  # waits for nobody
        assert stage.progress() == []
        span.released.set()
        first.result(60)
    assert usage_told(stage) == ONE


def test_what_changes_while_the_end_is_told_corrects_it(stage: Stage) -> None:
    recording = stage.recording()
    recording.begin()
    for _ in range(100):
        recording.add_usage(ONE)

    def result_of(value: object) -> object:
        recording.add_usage(ONE)  # a call in another thread may end here
        return value

    recording.result_of = result_of
    recording.finish(Outcome.SUCCEEDED)
    assert usage_told(stage) == Tokens(prompt_tokens=101)


def usage_told(stage: Stage) -> Tokens:
    [attempt] = fold(stage.events).attempts.values()
    return attempt.usage.tokens


RESPONSE = {"usage": {"prompt_tokens": 100, "completion_tokens": 10}}
RESPONSE_TOKENS = Tokens(prompt_tokens=100, completion_tokens=10)


def test_usage_of_the_returned_value_outlasts_a_late_tool_and_a_later_end(stage: Stage) -> None:
    recording = stage.recording()
    recording.begin()
    recording.finish(Outcome.SUCCEEDED, value=RESPONSE)
    assert stage.finished().tokens == RESPONSE_TOKENS
    stage.elapsed = 1.0
    recording.note_tool("late")
    assert stage.progress()[-1].tokens == RESPONSE_TOKENS
    recording.finish(Outcome.FAILED, error=TypeError("not serializable"))
    assert stage.finished().tokens == RESPONSE_TOKENS


@pytest.mark.parametrize("name", [3, None, ["x"], len, Silent()], ids=["number", "none", "list", "function", "silent"])
def test_a_tool_of_any_name_is_told_as_text(stage: Stage, name: Any) -> None:
    recording = stage.recording()
    recording.begin()
    with recording.tool(name):
        recording.add_usage(ONE)
    recording.note_tool(name)
    recording.finish(Outcome.SUCCEEDED)
    [told] = stage.finished().used_tools
    assert told == ("tool" if name is None or isinstance(name, Silent) else str(name))
    assert stage.finished().tokens == ONE


def test_what_is_sent_is_redacted_and_capped() -> None:
    stage = Stage(renderer=Renderer(max_result_bytes=64))
    recording = stage.recording()
    recording.input = {"password": "hunter2", "n": 1}
    recording.llm_response = {"authorization": "Bearer abc"}
    recording.finish(Outcome.SUCCEEDED, value="x" * 1000)
    finished = stage.finished()
    assert "hunter2" not in finished.model_dump_json()
    assert "Bearer abc" not in finished.model_dump_json()
    assert len(finished.result or "") <= 64


class Hiding:
    """A value that raises even when it is asked what it is."""

    @property
    def __class__(self) -> Any:
        raise LookupError("hidden")


class BrokenHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("no space left")


@pytest.fixture
def broken_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("xpander_celery.recording.recording"), "handlers", [BrokenHandler()])


def test_values_that_cannot_be_read_do_not_lose_the_end(stage: Stage) -> None:
    recording = stage.recording()
    recording.begin()
    recording.input = recording.llm_response = Hiding()
    recording.finish(Outcome.SUCCEEDED, value=Hiding())
    finished = stage.finished()
    assert finished.outcome is Outcome.SUCCEEDED
    assert finished.result == "(the result could not be read: LookupError)"
    assert finished.input == "(the input could not be read: LookupError)"


def test_usage_that_cannot_be_read_leaves_what_was_told(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    class StrangeError(Exception):
        pass

    def fail(*_: Any) -> None:
        raise StrangeError

    recording = stage.recording()
    recording.begin()
    recording.add_usage(ONE)
    monkeypatch.setattr(Recording, "usage", fail)
    recording.progress()
    recording.finish(Outcome.SUCCEEDED, value="fine")
    assert (stage.finished().result, stage.finished().tokens) == ("fine", ONE)


def test_a_soft_time_limit_passes_through_the_end(stage: Stage) -> None:
    class Slow:
        @property
        def __class__(self) -> Any:
            raise SoftTimeLimitExceeded

    recording = stage.recording()
    recording.begin()
    recording.result = Slow()
    with pytest.raises(SoftTimeLimitExceeded):
        recording.finish(Outcome.SUCCEEDED)


def test_adding_anything_as_usage_raises_nothing(stage: Stage, broken_log: None) -> None:
    recording = stage.recording()
    recording.begin()
    for strange in (object(), Hiding(), object):
        recording.add_usage(strange)
    recording.add_usage(ONE)
    assert stage.progress()[-1].tokens == ONE
    assert stage.recorder.failures.counts == {"unknown_usage": 3}


def test_usage_that_cannot_be_told_raises_nothing(
    stage: Stage, broken_log: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("usage")

    recording = stage.recording()
    recording.begin()
    monkeypatch.setattr(Recording, "usage", fail)
    recording.add_usage(ONE)
    assert stage.recorder.failures.counts == {"usage_not_read": 1}


def test_an_agent_is_text(stage: Stage) -> None:
    recording = stage.recording(facts={"task": "ask", "agent_id": 77})
    recording.begin()
    assert recording.agent_id == "77"
    job: Any = recording
    job.agent_id = 5
    job.agent_id = Silent()
    recording.finish(Outcome.SUCCEEDED)
    assert stage.finished().agent_id == "5"


def test_a_second_end_tells_again_what_was_let_go(stage: Stage) -> None:
    recording = stage.recording()
    recording.begin()
    recording.input, recording.result, recording.llm_response = "in", "out", {"raw": True}
    recording.finish(Outcome.SUCCEEDED)
    recording.forget_values()
    assert (recording.input, recording.result, recording.llm_response) == (None, None, None)
    recording.finish(Outcome.FAILED, error=ValueError("not stored"))
    finished = stage.finished()
    assert (finished.input, finished.llm_response, finished.result) == ("in", {"raw": True}, "ValueError: not stored")


def test_a_forked_process_does_not_tell_of_the_job(stage: Stage) -> None:
    recording = stage.recording()
    recording.begin()
    pid = os.fork()
    if pid == 0:
        recording.add_usage(ONE)
        recording.finish(Outcome.SUCCEEDED)
        os._exit(len(stage.events) - 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
