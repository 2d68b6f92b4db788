"""`tool_call` counts a tool from functions of every kind, and changes nothing about them."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator

import pytest

import xpander_celery as xc
from xpander_celery.recording.recording import Recorder, Recording


@pytest.fixture
def recording() -> Iterator[Recording]:
    recording = Recording(
        Recorder(emit=lambda event: None), job_id="j", attempt_id="a", child="p", owner="p", facts={"task": "t"}
    )
    recording.begin()
    yield recording
    recording.leave()


def tools(recording: Recording) -> tuple[str, ...]:
    return recording.history()[-1].used_tools


def test_as_a_context_manager(recording: Recording) -> None:
    with xc.tool_call("search"), xc.tool_call("read"):
        pass
    with pytest.raises(KeyError), xc.tool_call("write"):
        raise KeyError
    assert tools(recording) == ("search", "read", "write")


async def test_as_an_asynchronous_context_manager(recording: Recording) -> None:
    async with xc.tool_call("search"):
        await asyncio.sleep(0)
    assert tools(recording) == ("search",)


async def test_as_a_decorator_of_every_kind_of_function(recording: Recording) -> None:
    @xc.tool_call("plain")
    def plain(x: int) -> int:
        """Doubles."""
        return 2 * x

    @xc.tool_call("async")
    async def waiting(x: int) -> int:
        return 2 * x

    @xc.tool_call("generator")
    def counting(n: int) -> Iterator[int]:
        yield from range(n)

    @xc.tool_call("async generator")
    async def streaming(n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number

    assert plain(2) == 4
    assert await waiting(3) == 6
    assert list(counting(3)) == [0, 1, 2]
    assert [number async for number in streaming(2)] == [0, 1]
    assert tools(recording) == ("plain", "async", "generator", "async generator")
    assert plain.__doc__ == "Doubles."
    assert inspect.iscoroutinefunction(waiting)
    assert str(inspect.signature(plain)) == "(x: 'int') -> 'int'"


def test_an_object_may_be_entered_within_itself(recording: Recording) -> None:
    call = xc.tool_call("search")
    with call, call:
        pass
    assert tools(recording) == ("search",)


def test_outside_a_job_it_does_nothing() -> None:
    with xc.tool_call("search"):
        pass
    assert xc.tool_call("search")(len)("abc") == 3
