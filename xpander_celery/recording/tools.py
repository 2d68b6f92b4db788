"""`tool_call`: tells the current job that a tool is used, from functions of any kind."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar, cast

from xpander_celery.recording.current import running_recording

_F = TypeVar("_F", bound=Callable[..., Any])


class ToolCall:
    """One use of a tool, as a context manager (`with` or `async with`), or a decorator for each call of a function."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: list[AbstractContextManager[None] | None] = []

    def __enter__(self) -> None:
        recording = running_recording()
        call = recording.tool(self._name) if recording is not None else None
        if call is not None:
            call.__enter__()
        self._open.append(call)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        call = self._open.pop()
        if call is not None:
            call.__exit__(kind, error, traceback)

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def __call__(self, function: _F) -> _F:
        return cast(_F, _wrapped(self._name, function))


def tool_call(name: str) -> ToolCall:
    """Count a tool as used by the current job; outside a job it does nothing.

    `with tool_call("search"): ...`, `async with`, or `@tool_call("search")` on a function of any kind.
    """
    return ToolCall(name)


def _wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            with ToolCall(name):
                return await function(*args, **kwargs)

        return call_async

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if is_generator:  # a span would stay current in whoever takes its items
            recording = running_recording()
            if recording is not None:
                recording.note_tool(name)
            return function(*args, **kwargs)
        with ToolCall(name):
            return function(*args, **kwargs)

    is_generator = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
    return call
