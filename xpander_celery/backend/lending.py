"""Transports of one connection each, lent to one call at a time, and bounded in number.

httpx's own pool looks at every connection for every request: it slows down as it grows, and where threads are greenlets
(eventlet) two of them come to read one socket. A transport that nobody shares has neither trouble.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable

import httpx


class Transports:
    """Synchronous transports; safe to share between threads and greenlets."""

    def __init__(self, make: Callable[[], httpx.BaseTransport], most: int) -> None:
        self._make = make
        self._free: deque[httpx.BaseTransport] = deque()  # its operations are atomic
        self._places = threading.Semaphore(most)
        self._closed = False

    def take(self, timeout_s: float) -> httpx.BaseTransport:
        """The transport that was used last, or a new one; raises `TimeoutError` where all stay in use."""
        if not self._places.acquire(timeout=timeout_s):
            raise TimeoutError(f"no connection became free within {timeout_s:g} s")
        try:
            try:
                return self._free.pop()
            except IndexError:
                return self._make()
        except BaseException:
            self._places.release()
            raise

    def give_back(self, transport: httpx.BaseTransport) -> None:
        """Must follow every `take`, unless `give_up` does."""
        if self._closed:
            transport.close()
        else:
            self._free.append(transport)
        self._places.release()

    def give_up(self) -> None:
        """Instead of `give_back`, for one whose call was interrupted anywhere: what it holds is in no known state, its
        locks too, so that it is neither lent again nor closed, but left to the garbage collector.
        """
        self._places.release()

    def close(self) -> None:
        """Close those that are free now; one in use is closed as it comes back."""
        self._closed = True
        while self._free:
            self._free.pop().close()


class AsyncTransports:
    """Asynchronous transports of the running event loop, closed when that loop ends."""

    def __init__(self, make: Callable[[], httpx.AsyncBaseTransport], most: int) -> None:
        self._make = make
        self._free: list[httpx.AsyncBaseTransport] = []
        self._places = asyncio.Semaphore(most)
        self._closing = False
        self._guard: AsyncGenerator[None, None] | None = None

    async def take(self) -> httpx.AsyncBaseTransport:
        """The transport that was used last, or a new one; waits while all are in use."""
        await self._places.acquire()
        try:
            if self._guard is None:
                self._guard = _close_when_the_loop_ends(self._free)
                await anext(self._guard)
            return self._free.pop() if self._free else self._make()
        except BaseException:
            self._places.release()
            raise

    async def give_back(self, transport: httpx.AsyncBaseTransport) -> None:
        """Must follow every `take`."""
        self._free.append(transport)
        self._places.release()
        if self._closing:
            await _close_all(self._free)

    async def aclose(self) -> None:
        """Close those that are free now; one in use is closed as it comes back."""
        self._closing = True
        if self._guard is not None:
            await self._guard.aclose()


async def _close_when_the_loop_ends(transports: list[httpx.AsyncBaseTransport]) -> AsyncGenerator[None, None]:
    """Once begun, closes them when it is finalized: asyncio finalizes a loop's generators before closing the loop."""
    try:
        yield
    finally:
        await _close_all(transports)


async def _close_all(transports: list[httpx.AsyncBaseTransport]) -> None:
    while transports:
        await transports.pop().aclose()
