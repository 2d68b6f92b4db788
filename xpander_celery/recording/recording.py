"""The recording: what is known in memory of the attempt that runs, and the events that tell of it. Layer 2.

It knows neither Celery nor the journal: whoever begins a recording says which job it is, events go to the `emit` that
it was given, and its caller says how the attempt ended. What a job itself says comes in through `Job`.

Nothing here raises into a job, and a soft time limit that arrives in here passes through to it: whatever else is
raised is contained.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from xpander_celery.events import VERSION, CarriedAttempt, carry
from xpander_celery.recording.calls import Added, Returned, without_earlier
from xpander_celery.recording.contained import Failures, pass_limit, text_of
from xpander_celery.recording.current import OfProcess, of_context
from xpander_celery.recording.job import Job
from xpander_celery.recording.results import read_result
from xpander_celery.recording.usage import Usage, usage_of
from xpander_celery.rendering import Renderer, describe
from xpander_celery.report import Outcome, Tokens

if TYPE_CHECKING:
    from xpander_celery.recording.spans import JobSpan

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_BURST = 32
"""So many `progress` events are written at once; beyond that one a second, and the rest is told by `finished`."""
_A_SECOND = 1.0
_SHARE = 0.01
"""Of a job's time, beyond a burst, may be taken by adding up its spans while it runs: all of them each time."""


@dataclass(frozen=True, slots=True)
class Recorder:
    """What all recordings of a process share. `emit` keeps one event: it never raises and never waits."""

    emit: Callable[[dict[str, Any]], object]
    renderer: Renderer = field(default_factory=Renderer)
    sends_traceback: bool = True
    clock: Callable[[], float] = time.time
    timer: Callable[[], float] = time.monotonic
    failures: Failures = field(default_factory=lambda: Failures(logger))


class Recording(Job):
    """One running attempt. `owner` is the process that sees it die, `child` the one that it runs in."""

    __slots__ = (
        "_added",
        "_agent_id",
        "_allowance",
        "_began",
        "_created",
        "_created_at",
        "_facts",
        "_finished",
        "_input",
        "_is_changed",
        "_is_ending",
        "_job_id",
        "_lasted_s",
        "_llm_response",
        "_outer",
        "_outer_of_process",
        "_pid",
        "_recorder",
        "_refilled_at",
        "_result",
        "_returned",
        "_said",
        "_telling",
        "_told",
        "_tools",
        "attempt_id",
        "body_entered",
        "carried",
        "child",
        "goes_on_at",
        "message_went_on",
        "owner",
        "result_of",
        "sends_result",
        "span",
    )

    def __init__(
        self,
        recorder: Recorder,
        *,
        job_id: str,
        attempt_id: str,
        child: str,
        owner: str,
        facts: dict[str, Any],
        carried: Sequence[CarriedAttempt] = (),
        span: JobSpan | None = None,
        sends_result: bool = True,
        result_of: Callable[[Any], Any] | None = None,
    ) -> None:
        agent_id = facts.get("agent_id")
        if agent_id is not None and type(agent_id) is not str:
            facts["agent_id"] = agent_id = text_of(agent_id)
        self._recorder = recorder
        self._pid = os.getpid()
        self._job_id = job_id
        self.attempt_id = attempt_id
        self.child = child
        self.owner = owner
        self._facts = facts
        self.carried = carried
        self.span = span
        self.sends_result = sends_result
        self.result_of = result_of
        self.body_entered = False
        self.message_went_on = False  # a message with this job's id was published: the job goes on in it
        self.goes_on_at: float | None = None  # not before, as that message says
        self._agent_id: str | None = agent_id
        self._input: Any = _UNSET
        self._result: Any = _UNSET
        self._llm_response: Any = None
        self._said: dict[str, Any] = {}  # input and response as they were told at the end
        self._added: list[Added] = []
        self._tools: dict[str, None] = {}
        self._told: tuple[Tokens, tuple[str, ...]] = _TOLD_NOTHING
        self._allowance = float(_BURST)
        self._created_at = recorder.clock()
        self._created = self._began = self._refilled_at = recorder.timer()
        self._returned: Returned | None = None
        self._telling = Lock()  # held while usage is read and told, so that the last word is the latest
        self._is_changed = False  # since that began
        self._is_ending = False
        self._finished: Outcome | None = None
        self._lasted_s = 0.0
        self._outer: Recording | None = None
        self._outer_of_process: Recording | None = None

    def __repr__(self) -> str:
        return f"<Recording of {self._facts.get('task')} {self._job_id}>"

    @property
    def id(self) -> str:
        return self._job_id

    @property
    def agent_id(self) -> str | None:
        return self._agent_id

    @agent_id.setter
    def agent_id(self, agent_id: str | None) -> None:
        text = text_of(agent_id)
        if text is not None or agent_id is None:
            self._agent_id = text

    @property
    def input(self) -> Any:
        return None if self._input is _UNSET else self._input

    @input.setter  # noqa: A003 - the platform's own word
    def input(self, value: Any) -> None:
        self._input = value

    @property
    def result(self) -> Any:
        return None if self._result is _UNSET else self._result

    @result.setter
    def result(self, value: Any) -> None:
        self._result = value

    @property
    def llm_response(self) -> Any:
        return self._llm_response

    @llm_response.setter
    def llm_response(self, value: Any) -> None:
        self._llm_response = value

    @property
    def outcome(self) -> Outcome | None:
        """How it ended, None while it runs."""
        return self._finished

    def add_usage(self, usage: Any) -> None:
        try:
            what = usage if issubclass(type(usage), Tokens) else read_result(usage)
            if what is None:
                message = (
                    "add_usage() does not know what a %s is: give it Tokens, a provider's response, or an Agno output"
                )
                name = type(usage).__name__
                self._recorder.failures.note("unknown_usage", message, name, job_id=self._job_id, exc_info=False)
                return
            if isinstance(what, Returned):
                what = self._own_part(what)
            self._added.append(Added(what, time.time_ns()))
        except Exception as failure:  # noqa: BLE001 - the user's own value
            pass_limit(failure)
            self._note("usage_not_added", "usage could not be added")
            return
        self.progress()

    def note_tool(self, name: Any) -> str:
        """Count a tool as used: at once, so that a job that is killed within it tells of it. Its name, as text."""
        text = text_of(name) or "tool"
        self._tools[text] = None
        self.progress()
        return text

    def tool(self, name: Any) -> AbstractContextManager[None]:
        """A call of a tool, counted and traced."""
        text = self.note_tool(name)
        return self.span.tool(text) if self.span is not None else nullcontext()

    def begin(self) -> None:
        """Tell that the attempt started, and make this the current job. A second call does what the first did not."""
        event = self._event("started")
        event["child"] = self.child
        event["owner"] = self.owner
        event["facts"] = self._facts
        if self.carried:
            event["carried"] = self.carried
        self._recorder.emit(event)
        outer = of_context.get()
        if outer is not self:
            self._outer = outer
            of_context.set(self)
        if self.child != self.owner and OfProcess.job is not self:
            self._outer_of_process = OfProcess.job
            OfProcess.job = self
        if self.span is not None:
            self.span.activate()
        self._began = self._recorder.timer()

    def progress(self) -> None:
        """Tell the usage so far, if it changed. After the end this corrects it: a late span came.

        While the job runs, what comes too fast waits for the next change or for the end. Of several threads one tells,
        of the changes of all; the others do not wait for it.
        """
        if self._is_elsewhere() or not (self._is_ending or self._is_allowed()):
            return
        self._is_changed = True
        while self._is_changed and not self._telling.locked():
            with self._telling:  # not `acquire()`: a soft time limit that lands behind that would leave it locked
                self._is_changed = False
                self._tell_usage()

    def _tell_usage(self) -> None:
        event = self._event("progress")  # its time is that of the reading: what is read later overrules it
        began = self._recorder.timer()
        usage = self._readable_usage()
        spent = (self._recorder.timer() - began) / _SHARE
        self._allowance -= min(_BURST, spent)  # it may have been interrupted
        if usage is None:
            return
        told = usage.sent, self._used_tools(usage)
        if told == self._told:
            return
        self._told = told
        self._allowance -= 1
        event["duration_s"] = self._lasted_s if self._is_ending else self._duration_s()
        _add_usage_to(event, told)
        self._recorder.emit(event)

    def usage(self) -> Usage:
        """The usage so far. What the returned value says of it counts where nothing else does."""
        spans = self.span.facts() if self.span is not None else ()
        if not spans and not self._added and self._returned is None:
            return _NOTHING
        return usage_of(spans, added=self._added, returned=self._returned)

    def leave(self) -> None:
        """Restore what was current before `begin`, whatever the body left behind."""
        if self.span is not None:
            self.span.deactivate()
        of_context.set(self._outer)
        if self.child != self.owner:
            OfProcess.job = self._outer_of_process

    def finish(
        self,
        outcome: Outcome,
        *,
        value: Any = None,
        error: BaseException | None = None,
        traceback: str | None = None,
        continues: bool = False,
    ) -> None:
        """Tell how the attempt ended; again, for a later and different end of the same attempt.

        `value` is what the job returned. An Agno run that ended in an error is a failure, though nothing was raised.
        It is told whatever these values raise when they are read; a text says so in their place.
        """
        if self._is_elsewhere():
            return
        returned = None
        if outcome is _SUCCEEDED:
            returned = read_result(value)
            if returned is not None and returned.failed:
                outcome = Outcome.FAILED
            if returned is not None:
                self._returned = self._own_part(returned)
        event, usage = self._read_at_end()
        event["outcome"] = str.__str__(outcome)  # plain text: its `value` is a look-up that takes a microsecond
        try:
            result = self._result_text(outcome, value, returned, error, traceback)
        except Exception as failure:  # noqa: BLE001 - the user's own value
            result = self._unreadable("result", failure)
        if result is not None:
            event["result"] = result
        self._add_said_to(event)
        if continues:
            event["continues"] = True
            if self.goes_on_at is not None:
                event["goes_on_at"] = self.goes_on_at
        self._finished = outcome
        self._recorder.emit(event)
        if self.span is not None:
            self._end_span(self.span, outcome, usage, error)
        if self._is_changed:  # by another thread, while the usage was read
            self.progress()

    def forget_values(self) -> None:
        """Let go of what the job set, of any size, once it ended; a later end tells of it again as it was told."""
        self._input = self._result = _UNSET
        self._llm_response = None

    def history(self) -> tuple[CarriedAttempt, ...]:
        """What the next attempt's message carries: the earlier attempts and this one, as far as it got."""
        usage = self.usage()
        own = CarriedAttempt(
            job_id=self._job_id,
            attempt_id=self.attempt_id,
            tokens=usage.sent,
            used_tools=self._used_tools(usage),
            duration_s=self._duration_s(),
        )
        return carry(self.carried, own)

    def _duration_s(self) -> float:
        return int((self._recorder.timer() - self._began) * 1e6) / 1e6  # round() to digits takes a microsecond

    def _event(self, kind: str) -> dict[str, Any]:
        return {
            "kind": kind,
            "v": VERSION,
            "job_id": self._job_id,
            "attempt_id": self.attempt_id,
            # by the monotonic clock, so that a jump of the other one cannot put an older event behind a newer one
            "at": self._created_at + self._recorder.timer() - self._created,
        }

    def _own_part(self, returned: Returned) -> Returned:
        """What it says of this attempt's usage: without an answer of any size, and what was spent before."""
        if returned.content is not None:
            returned = replace(returned, content=None)
        return without_earlier(returned, int(self._created_at * 1e9))

    def _is_elsewhere(self) -> bool:
        """Whether this is a process that the job forked, which is no part of it."""
        return self._pid != os.getpid()

    def _note(self, event: str, message: str) -> None:
        self._recorder.failures.note(event, message, job_id=self._job_id)

    def _contained(self, what: str, render: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | str:
        """A value of the job as it is told, or a text that says that it could not be read."""
        try:
            return render(*args, **kwargs)
        except Exception as failure:  # noqa: BLE001 - the user's own value
            return self._unreadable(what, failure)

    def _unreadable(self, what: str, failure: Exception) -> str:
        pass_limit(failure)
        self._note(f"{what}_not_read", f"the {what} of a job could not be read")
        return f"(the {what} could not be read: {type(failure).__name__})"

    def _read_at_end(self) -> tuple[dict[str, Any], Usage]:
        """The event of the end with its usage; where that cannot be read, with what was told before."""
        with self._telling:
            if not self._is_ending:
                self._lasted_s = self._duration_s()
                self._is_ending = True
            event = self._event("finished")
            self._is_changed = False
            if self.span is not None:
                self.span.seal()
            usage = self._readable_usage()
            if usage is None:
                tokens, used_tools = self._told
                usage = Usage(inclusive=tokens, sent=tokens, used_tools=used_tools)
            self._told = told = usage.sent, self._used_tools(usage)
        event["duration_s"] = self._lasted_s
        _add_usage_to(event, told)
        return event, usage

    def _readable_usage(self) -> Usage | None:
        """The usage so far, None where it cannot be read."""
        try:
            return self.usage()
        except Exception as failure:  # noqa: BLE001 - it comes from strangers' spans and responses
            pass_limit(failure)
            self._note("usage_not_read", "usage could not be read")
            return None

    def _is_allowed(self) -> bool:
        now = self._recorder.timer()
        self._allowance = min(_BURST, self._allowance + (now - self._refilled_at) / _A_SECOND)
        self._refilled_at = now
        return self._allowance >= 1

    def _add_said_to(self, event: dict[str, Any]) -> None:
        """What the job itself set, in the place of what it was given."""
        render = self._recorder.renderer
        if self._llm_response is not None:
            self._said["llm_response"] = self._contained("response", render.response, self._llm_response)
        if self._input is not _UNSET:
            self._said["input"] = self._contained("input", render.input, self._input)
        if self._said:
            event.update(self._said)
        if self._agent_id != self._facts.get("agent_id"):
            event["agent_id"] = self._agent_id

    def _used_tools(self, usage: Usage) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*usage.used_tools, *self._tools))) if self._tools else usage.used_tools

    def _result_text(
        self,
        outcome: Outcome,
        value: Any,
        returned: Returned | None,
        error: BaseException | None,
        traceback: str | None,
    ) -> str | None:
        render = self._recorder.renderer
        if error is not None:
            if not self.sends_result:
                return type(error).__name__
            return render.failure(error, traceback if self._recorder.sends_traceback else None)
        if not self.sends_result:
            return None
        if self._result is not _UNSET and outcome.is_success:
            return render.result(self._result)
        if self.result_of is not None:
            try:
                return render.result(self.result_of(value))
            except Exception as failure:  # noqa: BLE001 - the author's own function
                pass_limit(failure)
                return f"(the function for the result failed: {describe(failure)})"
        if returned is not None and returned.content is not None:
            return render.result(returned.content)
        return render.result(value)

    def _end_span(self, span: JobSpan, outcome: Outcome, usage: Usage, error: BaseException | None) -> None:
        failed = error is not None and outcome in _SPAN_FAILS
        span.end(
            usage=usage if usage is not _NOTHING else None,
            error=type(error).__qualname__ if failed else None,
            description=self._recorder.renderer.failure(error) if failed else None,
            attributes={"xpander.job.outcome": outcome.value} if outcome is not _SUCCEEDED else None,
        )


def _add_usage_to(event: dict[str, Any], told: tuple[Tokens, tuple[str, ...]]) -> None:
    tokens, tools = told
    if tokens is not _NOTHING.sent and tokens:
        event["tokens"] = tokens
    if tools:
        event["used_tools"] = tools


_UNSET: Any = object()
_NOTHING = Usage()
_TOLD_NOTHING: tuple[Tokens, tuple[str, ...]] = (Tokens(), ())
_SPAN_FAILS = (Outcome.FAILED, Outcome.INTERRUPTED)
_SUCCEEDED = Outcome.SUCCEEDED  # looking up a member costs five times as much on Python 3.11
