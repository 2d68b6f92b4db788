"""What only the worker's main process sees of a job: its requests, and ends that no child can tell of. Layer 3.

Celery's documented place for this is the task's `Request` class (celery/app/task.py, `Task.Request`). Each task's own
one is subclassed, so it keeps working. Runs on the consumer's loop: an end is appended, and nothing is waited for.
In pools without child processes this is the same process, and the job's own word is the stronger one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from kombu.utils.imports import symbol_by_name

from xpander_celery import messages
from xpander_celery.events import VERSION
from xpander_celery.guard import Guard, guarded
from xpander_celery.plans import TaskPlan
from xpander_celery.report import Outcome
from xpander_celery.session import Session, with_text_ids


class ParentView:
    """Tells of the ends that the worker's main process sees."""

    def __init__(self, session: Session, guard: Guard) -> None:
        self.guard = guard
        self.session = session

    @guarded
    def ended(
        self,
        plan: TaskPlan,
        message: Mapping[str, Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        outcome: Outcome,
        result: str,
        *,
        continues: bool = False,
        before_start: bool = False,
    ) -> None:
        """Write what was seen. With all facts, since it may be all that is ever known of the job."""
        if not plan.is_one_of_ours(message):
            return
        message = with_text_ids(message)
        recorder = self.session.recorder
        attempt_id, owner = messages.attempt_in(message) or self.session.new_attempt()
        event: dict[str, Any] = {
            "kind": "ended",
            "v": VERSION,
            "job_id": message["id"],
            "attempt_id": attempt_id,
            "at": recorder.clock(),
            "owner": owner,
            "outcome": outcome,
            "result": recorder.renderer.text(result, recorder.renderer.max_result_bytes),
            "facts": self.session.facts_of(plan, message, args, kwargs),
            "carried": messages.carried_in(message),
        }
        if continues:
            event["continues"] = True
        if before_start:
            event["before_start"] = True
        recorder.emit(event)

    @guarded
    def request_is_sent_again(self, request: ObservedRequest) -> None:
        """Have the next message of the job say what its author lets be seen of the arguments."""
        plan, message = self.session.plan_of(request.task), request._request_dict
        shown = plan.shown_of(message, request.args, request.kwargs)
        if shown is not None:
            context = request._context
            context.headers = {**(context.headers or {}), messages.SHOWN: [message["id"], shown]}

    @guarded
    def request_failed(self, request: ObservedRequest, error: BaseException | None) -> None:
        """Classify what `request` did about an error that no child reported."""
        if isinstance(error, Terminated):
            return  # the signal `task_revoked` tells of it, or `_announce_cancelled` did
        text = _described(error)
        if request.was_retried:
            self._request_ended(request, Outcome.RETRIED, text, continues=True)
        elif request.will_come_again:
            self._request_ended(request, Outcome.REQUEUED, text, continues=True)
        elif isinstance(error, TimeLimitExceeded):
            self._request_ended(request, Outcome.TIMED_OUT, text)
        elif request.had_succeeded:
            self._request_ended(request, Outcome.SUCCEEDED, "")
        elif isinstance(error, (WorkerLostError, SystemExit, KeyboardInterrupt)):
            if not request._already_revoked:
                self._request_ended(request, Outcome.LOST, text)
        else:
            self._request_ended(request, Outcome.FAILED, text)

    @guarded
    def request_cancelled(self, request: ObservedRequest) -> None:
        """The worker is stopped, or lost its broker, and killed the job. An unacknowledged message comes again."""
        if request.will_come_again and request.runs_in_green_pool:
            # Gevent and eventlet give a job that they kill out as a success (celery/concurrency/gevent.py,
            # `_make_killable_target`): its message is acknowledged, unless the worker ends before it comes to that.
            request.once_acknowledged(self.request_cancelled)
        elif request.will_come_again:
            self._request_ended(request, Outcome.REQUEUED, "cancelled by the worker's shutdown", continues=True)
        else:
            self._request_ended(request, Outcome.LOST, "WorkerLostError: cancelled by the worker's shutdown")

    def _request_ended(
        self, request: ObservedRequest, outcome: Outcome, result: str, *, continues: bool = False
    ) -> None:
        strength = _STRENGTH[outcome]
        if strength > request.told_strength:
            request.told_strength = strength
            plan, message = self.session.plan_of(request.task), request._request_dict
            self.ended(plan, message, request.args, request.kwargs, outcome, result, continues=continues)


# Of several ends of one attempt the strongest counts; the same one again, or a weaker one, is not told. Revocation,
# stronger than a time limit, comes by a signal.
_STRENGTH = {Outcome.LOST: 1, Outcome.FAILED: 1, Outcome.SUCCEEDED: 1, Outcome.TIMED_OUT: 2, Outcome.REQUEUED: 3}
_STRENGTH[Outcome.RETRIED] = _STRENGTH[Outcome.REQUEUED]


class ObservedRequest:
    """Comes before a task's own `Request` class. What is told depends on what that one did, not on what it was told."""

    acknowledge: Callable[[], Any]
    acknowledged: bool
    args: Any
    kwargs: Any
    task: Any
    _already_revoked: bool
    _context: Any
    _request_dict: dict[str, Any]

    _parent_view: ParentView
    runs_in_green_pool = False
    was_requeued = False
    was_retried = False
    had_succeeded = False
    told_strength = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Becomes an attribute of `task.request` in the child: a fresh one for each retry and each redelivery.
        self._request_dict[messages.ATTEMPT] = self._parent_view.session.new_attempt()

    @property
    def will_come_again(self) -> bool:
        """Whether the broker delivers the message once more."""
        return self.was_requeued or not self.acknowledged

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        try:
            return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)  # type: ignore[misc]
        finally:
            if not return_ok:  # else the child reported it, and has its own word
                self._parent_view.request_failed(self, _exception_in(exc_info))

    def on_timeout(self, soft: bool, timeout: float) -> Any:
        try:
            return super().on_timeout(soft, timeout)  # type: ignore[misc]
        finally:
            if not soft:
                self._parent_view.request_failed(self, TimeLimitExceeded(timeout))

    def reject(self, requeue: bool = False) -> Any:
        if requeue and not self.acknowledged:
            self.was_requeued = True
        return super().reject(requeue=requeue)  # type: ignore[misc]

    def _retry_worker_lost(self, *args: Any) -> Any:
        """Celery 5.7: `retry_on_worker_lost` publishes the next attempt from here."""
        self._parent_view.request_is_sent_again(self)
        self.was_retried = super()._retry_worker_lost(*args)  # type: ignore[misc]
        return self.was_retried

    def _success_was_stored(self) -> Any:
        """Celery 5.7: the child stored its result and died before it could say so."""
        stored = super()._success_was_stored()  # type: ignore[misc]
        self.had_succeeded = bool(stored)
        return stored

    def cancel(self, pool: Any, *args: Any, **kwargs: Any) -> Any:
        self.runs_in_green_pool = bool(getattr(pool, "is_green", False))
        return super().cancel(pool, *args, **kwargs)  # type: ignore[misc]

    def once_acknowledged(self, tell: Callable[[ObservedRequest], object]) -> None:
        """Call `tell` when the message is acknowledged after all."""
        acknowledge = self.acknowledge

        def acknowledge_and_tell() -> Any:
            try:
                return acknowledge()
            finally:
                if self.acknowledged:
                    tell(self)

        self.acknowledge = acknowledge_and_tell

    def _announce_cancelled(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._announce_cancelled(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._parent_view.request_cancelled(self)


def observe(tasks: Iterable[Any], parent_view: ParentView) -> Callable[[], None]:
    """Have the requests of `tasks` tell `parent_view`; the function returned takes that back. A second time it skips
    what is observed.
    """
    observed: list[Any] = []
    classes: dict[type, type] = {}
    for task in tasks:
        own: type = symbol_by_name(task.Request)  # type: ignore[no-untyped-call]
        if issubclass(own, ObservedRequest):
            continue
        if own not in classes:
            classes[own] = type(own.__name__, (ObservedRequest, own), {"_parent_view": parent_view})
        observed.append((task, task.__dict__.get("Request")))
        task.Request = classes[own]

    def restore() -> None:
        for task, own in observed:
            if own is None:
                del task.Request
            else:
                task.Request = own

    return restore


def _exception_in(exc_info: Any) -> BaseException | None:
    error: BaseException | None = exc_info.exception
    return error.exc if isinstance(error, ExceptionWithTraceback) else error


def _described(error: BaseException | None) -> str:
    if isinstance(error, TimeLimitExceeded):
        limit = error.args[0] if error.args else None
        return f"TimeLimitExceeded({limit:g})" if isinstance(limit, (int, float)) else "TimeLimitExceeded"
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return f"WorkerLostError: the job raised {error!r}"
    if isinstance(error, WorkerLostError):
        return f"WorkerLostError: {str(error).partition(' Job: ')[0]}"
    return f"{type(error).__name__}: {error}"
