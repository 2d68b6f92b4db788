"""Celery's signals to recordings: what happens when a job is published, begins, ends, or ends in a way of its own.

Every handler is guarded, so that none raises into a job, takes any arguments, and leaves the work to others. Job
signals also fire for eager calls within a job, so recordings are kept by their request. Layer 3.
"""

from __future__ import annotations

import signal as os_signals
import sys
import time
import traceback as tracebacks
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from billiard.exceptions import SoftTimeLimitExceeded
from celery import signals, states
from celery._state import get_current_task

from xpander_celery import messages
from xpander_celery.guard import Guard, guarded, guarded_in_job
from xpander_celery.recording.contained import pass_limit, text_of
from xpander_celery.recording.current import running_recording
from xpander_celery.recording.recording import Recording
from xpander_celery.report import Outcome
from xpander_celery.requests import ParentView
from xpander_celery.session import Session

if TYPE_CHECKING:
    from xpander_celery.recording.spans import Tracing

_REPLACED = "Replaced by new task"  # celery/app/task.py, `Task.on_replace`
_ENDED_KEPT = 64
_SUCCEEDED = Outcome.SUCCEEDED  # looked up once: this is on every job's way
_SETTLES_TIME_LIMITS = ("gevent", "greenlet", "eventlet")  # modules of what a green pool stops a job with
_NOT_THE_USERS = ("/celery/app/trace.py", "/xpander_celery/task.py", "/xpander_celery/recording/context.py")


class _Running(NamedTuple):
    """A recording and its request, whose identity nobody else can have as long as it is kept here."""

    request: Any
    recording: Recording
    handled_at_start: int  # the identity of the exception that the caller of an eager job handles


class Hooks:
    """Connected once per process. `session_for(sender)` gives None while reporting is off; anything with an `app` can
    be the sender. `tracing` serves publishing, which goes on without a session.
    """

    def __init__(
        self,
        session_for: Callable[[Any], Session | None],
        tracing: Callable[[], Tracing],
        guard: Guard,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.guard = guard
        self.malformed_messages = 0
        self._session_for = session_for
        self._tracing = tracing
        self._clock = clock
        self._running: dict[int, _Running] = {}  # by the identity of their request
        self._ended: dict[str, Recording] = {}  # by job, the last few: a result back-end may fail after the end
        self._signals = (
            (signals.before_task_publish, self.before_publish),
            (signals.after_task_publish, self.after_publish),
            (signals.task_prerun, self.prerun),
            (signals.task_postrun, self.postrun),
            (signals.task_internal_error, self.internal_error),
            (signals.task_revoked, self.revoked),
            (signals.task_unknown, self.unknown),
            (signals.task_rejected, self.malformed),
        )

    def connect(self) -> None:
        """Listen to the signals; a second time it does nothing."""
        for signal, handler in self._signals:
            signal.connect(handler, weak=False, dispatch_uid=_uid(handler))

    def disconnect(self) -> None:
        """Listen no longer."""
        for signal, handler in self._signals:
            signal.disconnect(dispatch_uid=_uid(handler))

    def forget(self) -> None:
        """In a forked child: a process that a job forks is no part of the job."""
        self._running.clear()
        self._ended.clear()

    @guarded_in_job
    def before_publish(self, sender: Any = None, headers: Any = None, body: Any = None, **_: Any) -> None:
        """Add to a message what its job needs, and take out what another message left in copied headers."""
        if headers is None:
            return
        job_id = _published_id(headers, body)
        headers.pop(messages.ATTEMPT, None)
        recording = running_recording()
        if recording is not None and recording.id == job_id:
            headers[messages.CARRIED] = messages.carried_out(recording.history())
            earlier = recording.span.traceparent if recording.span is not None else None
            if earlier is not None:
                headers[messages.EARLIER] = earlier
            shown = self._shown_of_running_job()
            if shown is not None:
                headers[messages.SHOWN] = [job_id, shown]
        else:
            headers.pop(messages.EARLIER, None)
            if messages.SHOWN in headers and messages.shown_in(headers, job_id) is None:
                headers.pop(messages.SHOWN)
            if not _carries(headers, job_id):
                headers.pop(messages.CARRIED, None)
            attributes = {"messaging.system": "celery", "messaging.operation.type": "send", "celery.task_name": sender}
            self._tracing().publish(
                f"publish {sender}", headers, attributes=attributes, replace=_is_copied_from_this_job(headers)
            )
        headers[messages.PUBLISHED_AT] = self._clock()

    @guarded_in_job
    def after_publish(self, headers: Any = None, body: Any = None, **_: Any) -> None:
        """Notice that the running job goes on in another message: never told when publishing failed."""
        recording = running_recording()
        headers = headers or {}
        if recording is not None and recording.id == _published_id(headers, body):
            recording.message_went_on = True
            recording.goes_on_at = messages.due_at(headers if "eta" in headers or not isinstance(body, dict) else body)

    @guarded_in_job
    def prerun(self, task: Any = None, task_id: Any = None, args: Any = None, kwargs: Any = None, **_: Any) -> None:
        """Begin a recording."""
        session = self._session_for(task)
        if session is None:
            return
        plan = session.plan_of(task)
        if not plan.is_reported:
            return
        request = task.request
        message = request.__dict__
        if message.get("id") is None:  # several messages in one call (celery-batches): it has an id, and no request
            message = {**message, "id": task_id}
        if not plan.is_one_of_ours(message):
            return
        key = id(request)
        running = self._running.get(key)
        if running is None or running.request is not request:
            recording = session.recording_of(plan, message, args or (), kwargs or {})
            running = self._running[key] = _Running(request, recording, id(sys.exc_info()[1]))
        running.recording.begin()

    @guarded
    def postrun(self, task: Any = None, retval: Any = None, state: str | None = None, **_: Any) -> None:
        """End the recording of this request, if it has one."""
        request = task.request
        key = id(request)
        running = self._running.get(key)
        if running is None or running.request is not request:
            return
        recording = running.recording
        try:
            recording.leave()
            if state == states.SUCCESS:
                recording.finish(_SUCCEEDED, value=retval, continues=recording.message_went_on)
            else:
                in_flight = sys.exc_info()[1]
                if id(in_flight) == running.handled_at_start:
                    in_flight = None  # the caller of an eager job handles it
                is_eager = bool(request.is_eager)
                is_put_back = bool(task.acks_late) and not is_eager
                _finish(recording, state, retval, in_flight, is_eager=is_eager, is_put_back=is_put_back)
        except SoftTimeLimitExceeded:
            raise  # the guard calls once more
        except BaseException:
            self._running.pop(key, None)
            raise
        self._running.pop(key, None)
        self._keep(recording)

    @guarded
    def internal_error(
        self,
        sender: Any = None,
        task_id: Any = None,
        args: Any = None,
        kwargs: Any = None,
        request: Any = None,
        exception: Any = None,
        **_: Any,
    ) -> None:
        """Celery failed around the body: before it could begin, or, with the result, after it succeeded."""
        recording = self._ended.get(text_of(task_id) or "")
        if recording is None:
            session = self._session_for(sender)
            plan = session.plan_of(sender) if session is not None else None
            if session is None or plan is None or not plan.is_one_of_ours(request or {}):
                return
            recording = session.recording_of(plan, request, args or (), kwargs if isinstance(kwargs, dict) else {})
            recording.begin()
            recording.leave()
        elif recording.outcome is not Outcome.SUCCEEDED:
            return
        recording.finish(Outcome.FAILED, error=exception, traceback=_traceback_of(exception))
        self._keep(recording)

    @guarded
    def revoked(self, sender: Any = None, request: Any = None, expired: Any = None, **more: Any) -> None:
        """In the worker's main process: a job was revoked, while it ran or before, or was due too late."""
        session = self._session_for(sender)
        if session is None or request is None:
            return
        outcome = Outcome.EXPIRED if expired else Outcome.REVOKED
        text = "expired before it was run" if expired else "revoked"
        terminated = bool(more.get("terminated"))
        if terminated:
            text = f"revoked: terminated by {_signal_name(more.get('signum'))}"
        plan, message, args, kwargs = (
            session.plan_of(sender),
            request.__dict__,
            request.args or (),
            request.kwargs or {},
        )
        # else it is told by `Request.revoked`, which is asked before the pool is given the job
        ParentView(session, self.guard).ended(plan, message, args, kwargs, outcome, text, before_start=not terminated)

    @guarded
    def unknown(self, sender: Any = None, name: Any = None, id: Any = None, message: Any = None, **_: Any) -> None:  # noqa: A002
        """In the worker's main process: a message for a task that this worker does not have."""
        session = self._session_for(sender)
        if session is None:
            return
        said: Mapping[str, Any] = {
            **(message.headers or {}),
            "id": id,
            "hostname": getattr(sender, "hostname", None),
            "delivery_info": message.delivery_info,
        }
        text = f"NotRegistered: this worker has no task {name!r}"
        plan = session.plans.of_name(name)
        ParentView(session, self.guard).ended(plan, said, (), {}, Outcome.FAILED, text, before_start=True)

    @guarded
    def malformed(self, **_: Any) -> None:
        """In the worker's main process: a message that is no job. Nobody could say which record it belongs to."""
        self.malformed_messages += 1

    def _shown_of_running_job(self) -> str | None:
        task = get_current_task()
        session = self._session_for(task) if task is not None else None
        if session is None:
            return None
        request = task.request
        return session.plan_of(task).shown_of(request.__dict__, request.args or (), request.kwargs or {})

    def _keep(self, recording: Recording) -> None:
        recording.forget_values()
        self._ended[recording.id] = recording
        if len(self._ended) > _ENDED_KEPT:
            self._ended.pop(next(iter(self._ended)), None)


def _uid(handler: Any) -> str:
    return f"xpander_celery.{handler.__name__}"


def _finish(
    recording: Recording,
    state: str | None,
    retval: Any,
    in_flight: BaseException | None,
    *,
    is_eager: bool,
    is_put_back: bool,
) -> None:
    """Tell of every end but success. In `state=None` Celery saw a BaseException pass, or an eager job's error.

    `is_put_back`: a message that is rejected, to be queued again, comes again; else it was acknowledged before.
    """
    went_on = recording.message_went_on
    if state == states.FAILURE:
        recording.finish(Outcome.FAILED, error=retval, traceback=_traceback_of(retval), continues=went_on)
    elif state == states.RETRY:
        recording.finish(Outcome.RETRIED, error=retval, continues=True)
    elif state == states.IGNORED:
        text = text_of(retval) or ""
        recording.finish(Outcome.IGNORED, value=text or None, continues=went_on or text == _REPLACED)
    elif state == states.REJECTED:
        recording.finish(Outcome.REJECTED, error=retval, continues=bool(retval.requeue) and is_put_back)
    elif is_eager or (recording.child == recording.owner and not _is_green(in_flight)):
        recording.finish(Outcome.FAILED, error=in_flight, traceback=_traceback_of(in_flight), continues=went_on)
    else:  # whoever stopped it says why, in the worker's main process or its event loop
        recording.finish(Outcome.INTERRUPTED, error=in_flight)


def _is_green(error: BaseException | None) -> bool:
    """Whether a green pool stopped the job: by its time limit, or since it was revoked."""
    return error is None or type(error).__module__.partition(".")[0] in _SETTLES_TIME_LIMITS


def _published_id(headers: Mapping[str, Any], body: Any) -> str | None:
    """The id of the job that is published; in the old protocol it is in the body."""
    job_id = headers.get("id")
    return text_of(body.get("id") if job_id is None and isinstance(body, dict) else job_id)


def _carries(headers: Mapping[str, Any], job_id: Any) -> bool:
    """Whether carried usage is that of this very job: its worker's main process publishes it again."""
    carried = headers.get(messages.CARRIED)
    return carried is not None and all(entry.get("job_id") == job_id for entry in carried)


def _is_copied_from_this_job(headers: Mapping[str, Any]) -> bool:
    """Whether the trace context in a message is what this job itself came with (`headers=self.request.headers`)."""
    traceparent = headers.get("traceparent")
    task = get_current_task() if traceparent is not None else None
    return task is not None and bool(task.request.__dict__.get("traceparent") == traceparent)


def _traceback_of(error: BaseException | None) -> str | None:
    """The traceback without the frames of Celery and ours that lie around every job."""
    if error is None:
        return None
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename.endswith(_NOT_THE_USERS):
        traceback = traceback.tb_next
    try:
        return "".join(tracebacks.format_exception(type(error), error, traceback))
    except Exception as failure:  # noqa: BLE001 - it reads the user's exception
        pass_limit(failure)
        return None


def _signal_name(number: Any) -> str:
    try:
        return os_signals.Signals(int(number)).name
    except (TypeError, ValueError):
        return str(number)
