"""What the author of a task says about it: `XpanderTask`, `@reported`, `TaskOptions`. Layer 3.

Both ways only give options and run the body in a context of its own; that a job is recorded at all is the business of
the hooks. So using both on one task still gives one record, and calling a task directly (`task()`) records nothing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast, overload

from celery import Task
from celery.local import PromiseProxy, Proxy

from xpander_celery.errors import ConfigurationError
from xpander_celery.recording.context import run_body
from xpander_celery.recording.current import running_recording

logger = logging.getLogger(__name__)

_OPTIONS = "__xpander__"  # on a decorated function
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What can be said of one task, as `xpander={...}` or to `@reported(...)`. None leaves it to the settings.

    `agent_id`: the agent that its jobs belong to.
    `input`: False sends none; a callable is given the job's arguments and returns what is sent instead of them.
    `result`: False sends none; a callable is given the returned value and returns what is sent instead of it.
    """

    agent_id: str | None = None
    input: Callable[..., Any] | bool | None = None
    result: Callable[[Any], Any] | bool | None = None

    def __post_init__(self) -> None:
        if self.agent_id is not None and (not isinstance(self.agent_id, str) or not self.agent_id.strip()):
            raise ConfigurationError("xpander agent_id", f"is no agent id: {self.agent_id!r}", "Give its id as text.")
        for name in ("input", "result"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, bool) or callable(value)):
                raise ConfigurationError(
                    f"xpander {name}", f"is neither a callable nor True or False: {value!r}", "Leave it out otherwise."
                )

    @classmethod
    def of(cls, written: object) -> TaskOptions:
        """The options in `written`, as an author writes them; raises `ConfigurationError` for unknown keys."""
        if isinstance(written, cls):
            return written
        if not isinstance(written, Mapping):
            raise ConfigurationError("xpander", f"is no mapping: {written!r}", 'Write xpander={"agent_id": "..."}.')
        known = {field.name for field in fields(cls)}
        unknown = sorted(str(key) for key in written if key not in known)
        if unknown:
            raise ConfigurationError("xpander", f"has no option {unknown[0]!r}", f"Known: {', '.join(sorted(known))}.")
        return cls(**written)

    def or_else(self, weaker: TaskOptions) -> TaskOptions:
        """These options, with those of `weaker` where these say nothing."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return TaskOptions(**{k: getattr(weaker, k) if value is None else value for k, value in said.items()})


class XpanderTask(Task):  # type: ignore[misc]  # celery is untyped
    """A base class whose tasks are reported, with or without `instrument()`; options in `xpander={...}`.

    It takes the place of the app's own base class: to keep that one, derive from both, `class Base(XpanderTask, Own)`.
    """

    abstract = True
    xpander: Mapping[str, Any] | TaskOptions | None = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.__dict__.get("xpander") is not None:
            TaskOptions.of(cls.xpander)

    @classmethod
    def on_bound(cls, app: Any) -> None:
        super().on_bound(app)
        warn_if_async(cls.run)
        _announce()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body. Celery's own `__call__` is not used for it within a job, since it pushes a second request
        (celery/app/task.py, `Task.__call__`): on Celery 5.4, eager, that lost `request.id` and broke `retry()`.
        """
        body = super().__call__
        request = self.request_stack.top
        if request is None or request.called_directly or request._protected:
            return body(*args, **kwargs)
        if getattr(body, "__func__", None) is Task.__call__:
            request._protected = 1  # as the worker's own stack protection does: what comes next is a direct call
            body = self.run
        return run_isolated(body, args, kwargs)


@overload
def reported(target: _F, /) -> _F: ...
@overload
def reported(
    *,
    agent_id: str | None = None,
    input: Callable[..., Any] | bool | None = None,
    result: Callable[[Any], Any] | bool | None = None,
) -> Callable[[_F], _F]: ...
def reported(target: Any = None, /, **options: Any) -> Any:
    """Report the jobs of a task, with or without `instrument()`; bare, or with the options of `TaskOptions`.

    Goes below or above `@app.task` and `@shared_task`. Below, the body also runs in a context of its own, so that what
    it leaves in OpenTelemetry's context (an abandoned stream) cannot reach the next job.
    """
    said = TaskOptions.of(options)
    if target is None:
        return lambda function: _mark(function, said)
    return _mark(target, said)


def options_of(task: Any) -> tuple[TaskOptions, bool]:
    """All that was said of `task`, the nearest to it winning, and whether it was marked to be reported at all.

    Resolves the tasks that were decorated while they were still promises, so call it only once the app is final.
    """
    said = [TaskOptions.of(cls.__dict__["xpander"]) for cls in type(task).__mro__ if cls.__dict__.get("xpander")]
    decorated = _decorated(task)
    if decorated is not None:
        said.insert(1 if type(task).__dict__.get("xpander") else 0, decorated)
    merged = functools.reduce(TaskOptions.or_else, said, TaskOptions())
    return merged, bool(said) or isinstance(task, XpanderTask)


def warn_if_async(run: Callable[..., Any]) -> None:
    """Say once that Celery does not run `async def` tasks: the coroutine itself would be the result."""
    function = inspect.unwrap(run)
    if inspect.iscoroutinefunction(function):
        _warn_of_async(f"{function.__module__}.{function.__qualname__}")


@functools.cache
def _warn_of_async(name: str) -> None:
    logger.warning(
        "Celery does not run 'async def' tasks: the result of %s would be a coroutine that nobody awaited. "
        "Write a plain 'def' that calls asyncio.run(...)",
        name,
        extra={"event": "async_task", "task": name},
    )


def run_isolated(body: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The body of the running job, in a context of its own; anything else (a nested call, no job) as it is."""
    recording = running_recording()
    if recording is None or recording.body_entered:
        return body(*args, **kwargs)
    recording.body_entered = True
    return run_body(body, *args, **kwargs)


def on_mark(listener: Callable[[], None]) -> None:
    """Have `listener` called whenever a task is marked; the runtime connects the hooks then."""
    _listeners[:] = [listener]


_listeners: list[Callable[[], None]] = []
_promised: list[tuple[Any, TaskOptions]] = []  # decorated above @app.task, so not yet bound to an app


def _announce() -> None:
    for listener in _listeners:
        listener()


def _mark(target: Any, options: TaskOptions) -> Any:
    _announce()
    if issubclass(type(target), Proxy):  # isinstance() would bind the task before it is configured
        _promised.append((target, options))
        return target
    task_class: Any = target if inspect.isclass(target) else type(target)
    if issubclass(task_class, Task):
        task_class.xpander = options.or_else(TaskOptions.of(task_class.__dict__.get("xpander") or {}))
        return target
    return _wrapped(target, options)


def _wrapped(function: Callable[..., Any], options: TaskOptions) -> Callable[..., Any]:
    @functools.wraps(function)
    def body(*args: Any, **kwargs: Any) -> Any:
        return run_isolated(function, args, kwargs)

    # Celery's argument check reads the wrapper's own signature, not `__wrapped__` (celery/utils/functional.py,
    # `head_from_fun`), so say it again.
    # Reading it evaluates annotations on Python 3.14, where names under TYPE_CHECKING are not there.
    with contextlib.suppress(NameError, TypeError, ValueError):
        body.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    setattr(body, _OPTIONS, options)
    warn_if_async(function)
    return body


def _decorated(task: Any) -> TaskOptions | None:
    options: Any
    for proxy, options in reversed(_promised):
        if _is_promise_of(proxy, task):
            return cast(TaskOptions, options)
    function = task.run
    while function is not None:
        options = getattr(function, _OPTIONS, None)
        if isinstance(options, TaskOptions):
            return options
        function = getattr(function, "__wrapped__", None)
    return None


def _is_promise_of(proxy: Proxy, task: Any) -> bool:
    if issubclass(type(proxy), PromiseProxy):  # of one app; not evaluated, it is of one that is not final yet
        return bool(PromiseProxy.__evaluated__(proxy)) and proxy._get_current_object() is task
    try:
        return bool(proxy._get_current_object().name == task.name)  # of a shared task: each app has its own
    except Exception:  # noqa: BLE001 - the current app does not have it
        return False
