"""Connections that are lent to one call at a time."""

from __future__ import annotations

import asyncio
import threading

import httpx
import pytest

from xpander_celery.backend.lending import AsyncTransports, Transports


class Lane(httpx.BaseTransport, httpx.AsyncBaseTransport):
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def test_the_one_that_was_used_last_is_lent_again() -> None:
    transports = Transports(Lane, 3)
    first, second = transports.take(1), transports.take(1)
    assert first is not second
    transports.give_back(first)
    transports.give_back(second)
    assert transports.take(1) is second


def test_no_more_than_the_bound_are_lent() -> None:
    transports = Transports(Lane, 1)
    lane = transports.take(1)
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        transports.take(0.01)
    waiting = threading.Timer(0.05, transports.give_back, [lane])
    waiting.start()
    assert transports.take(5) is lane
    waiting.join()


def test_one_that_cannot_be_made_keeps_no_place() -> None:
    made = iter([ValueError("no certificates"), Lane()])

    def make() -> Lane:
        if isinstance(following := next(made), Exception):
            raise following
        return following

    transports = Transports(make, 1)
    with pytest.raises(ValueError, match="certificates"):
        transports.take(1)
    assert isinstance(transports.take(0.01), Lane)


def test_one_that_was_given_up_is_not_lent_again_and_keeps_no_place() -> None:
    transports = Transports(Lane, 1)
    lane = transports.take(1)
    transports.give_up()
    assert transports.take(0.01) is not lane


def test_one_in_use_is_closed_as_it_comes_back() -> None:
    transports = Transports(Lane, 2)
    free, used = Lane(), transports.take(1)
    transports.give_back(free)
    transports.close()
    assert free.closed
    assert isinstance(used, Lane)
    assert not used.closed
    transports.give_back(used)
    assert used.closed


async def test_a_loops_transports_are_bounded_and_lent_again() -> None:
    transports = AsyncTransports(Lane, 1)
    lane = await transports.take()
    waiting = asyncio.create_task(transports.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    await transports.give_back(lane)
    assert await waiting is lane
    await transports.give_back(lane)


async def test_a_call_that_stops_waiting_takes_no_place() -> None:
    transports = AsyncTransports(Lane, 1)
    lane = await transports.take()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await transports.take()
    await transports.give_back(lane)
    assert await transports.take() is lane


async def test_a_loops_transports_in_use_are_closed_as_they_come_back() -> None:
    transports = AsyncTransports(Lane, 2)
    free, used = await transports.take(), await transports.take()
    assert isinstance(free, Lane)
    assert isinstance(used, Lane)
    await transports.give_back(free)
    await transports.aclose()
    assert (free.closed, used.closed) == (True, False)
    await transports.give_back(used)
    assert used.closed


def test_a_loop_closes_its_transports_when_it_ends() -> None:
    async def use() -> Lane:
        transports = AsyncTransports(Lane, 1)
        lane = await transports.take()
        await transports.give_back(lane)
        kept.append(transports)
        assert isinstance(lane, Lane)
        return lane

    kept: list[AsyncTransports] = []
    assert asyncio.run(use()).closed
