"""One HTTP/1.1 connection as a transport of httpx: plain requests, whole answers, nothing else.

For the relay, which sends small requests to one address all day. httpx's own transport is several layers of generality
(pool, locks, tracing, two event loop libraries) and takes four times the CPU time of this one for each request. What
it can and this cannot (proxies, HTTP/2, streams) is left to it: see `relay/targets.py`.

A request is written once. Whatever goes wrong, the connection is given up and the error is one of httpx's, so that
callers see no difference; whether a request that got no answer is sent again is theirs to decide.
"""

from __future__ import annotations

import asyncio
import select
import ssl
from contextlib import suppress
from typing import Any

import httpx

from xpander_celery.backend.answers import AnswerReader, MalformedAnswerError

_PORTS = {"http": 80, "https": 443}
_OTHER_ADDRESS_AFTER_S = 0.25  # RFC 8305: the next address of a name is tried while the first one is silent
# An end of the connection that the loop has not seen yet; where a system cannot tell, anything unread counts as one
_END_SEEN = getattr(select, "POLLRDHUP", select.POLLIN) | select.POLLHUP | select.POLLERR


class Connection(httpx.AsyncBaseTransport):
    """Keeps one connection of the running loop open for the next request; others are opened when that one is in use.

    `keep_alive_s`: one that was idle for longer is replaced. Of a request's timeouts (httpx's extension) `connect` is
    for the connection, TLS included, and `read` the longest silence, be it that nothing comes or nothing is taken.
    """

    def __init__(self, ssl_context: ssl.SSLContext | None, *, keep_alive_s: float, max_body_bytes: int) -> None:
        if ssl_context is not None:
            ssl_context.set_alpn_protocols(["http/1.1"])
        self._ssl_context = ssl_context
        self._keep_alive_s = keep_alive_s
        self._max_body_bytes = max_body_bytes
        self._free: _Wire | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request and return its whole answer; raises httpx's `TransportError`s."""
        written = _head_of(request) + await request.aread()
        timeouts = request.extensions.get("timeout", {})
        reader = AnswerReader(method=request.method.encode(), max_body_bytes=self._max_body_bytes)
        wire = await self._wire_to(request.url, timeouts.get("connect"))
        try:
            await wire.exchange(written, reader, timeouts.get("read"))
        except BaseException:
            wire.abort()
            raise
        if reader.may_be_reused and self._free is None and not wire.is_writing:
            wire.rest()
            self._free = wire
        else:
            wire.abort()
        return httpx.Response(reader.status, headers=reader.headers, content=bytes(reader.body), request=request)

    async def aclose(self) -> None:
        """Close the connection; another is opened by the next request."""
        wire, self._free = self._free, None
        if wire is not None:
            await wire.close()

    async def _wire_to(self, url: httpx.URL, timeout_s: float | None) -> _Wire:
        """The open connection if it can still be used, or else a new one."""
        wire, self._free = self._free, None
        origin = url.scheme, url.raw_host, url.port
        if wire is not None:
            if wire.is_fresh(origin, self._keep_alive_s):
                return wire
            wire.abort()
        loop = asyncio.get_running_loop()
        host, is_tls = url.raw_host.decode("ascii"), url.scheme == "https"
        if url.scheme not in _PORTS or (is_tls and self._ssl_context is None):
            raise httpx.UnsupportedProtocol(f"{url.scheme} to {host}, without what it needs")
        tls: dict[str, Any] = {"ssl": self._ssl_context, "server_hostname": host} if is_tls else {}
        try:
            async with asyncio.timeout(timeout_s):
                _, wire = await loop.create_connection(
                    lambda: _Wire(loop, origin),
                    host,
                    url.port or _PORTS[url.scheme],
                    happy_eyeballs_delay=_OTHER_ADDRESS_AFTER_S,
                    **tls,
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"no connection within {timeout_s:g} s") from error
        except (OSError, UnicodeError) as error:  # the latter: a name that cannot be looked up
            raise httpx.ConnectError(str(error)) from error
        return wire


class _Wire(asyncio.Protocol):
    """An open connection: at most one request at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, origin: tuple[str, bytes, int | None]) -> None:
        self._loop = loop
        self._origin = origin
        self._transport: asyncio.Transport | None = None
        self._poll = select.poll()
        self._reader: AnswerReader | None = None
        self._answered: asyncio.Future[None] | None = None
        self._lost = loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._silence_s: float | None = None
        self._unwritten = 0
        self._heard_at = 0.0

    # What is done with it

    @property
    def is_writing(self) -> bool:
        """Whether part of the request is still to be written: answered before it was read to its end."""
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    def is_fresh(self, origin: tuple[str, bytes, int | None], keep_alive_s: float) -> bool:
        """Whether another request may be sent here."""
        transport = self._transport
        if transport is None or transport.is_closing() or self._lost.done() or origin != self._origin:
            return False
        loop = asyncio.get_running_loop()
        return self._loop is loop and loop.time() - self._heard_at < keep_alive_s and not self._poll.poll(0)

    async def exchange(self, written: bytes, reader: AnswerReader, silence_s: float | None) -> None:
        """Send a request, and return when `reader` has the whole answer."""
        if self._lost.done() or self._transport is None:
            raise httpx.ConnectError("the connection was closed at once")
        self._reader = reader
        self._answered = self._loop.create_future()
        self._silence_s = silence_s
        self._heard_at = self._loop.time()
        self._transport.write(written)
        self._unwritten = self._transport.get_write_buffer_size()
        self._watch()
        try:
            await self._answered
        finally:
            self._reader = self._answered = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def rest(self) -> None:
        """The answer is read, and the next request may come."""
        self._heard_at = self._loop.time()

    def abort(self) -> None:
        """Close it at once; what is not written yet is not sent."""
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Close it, and wait until that is done."""
        if self._transport is None or self._loop is not asyncio.get_running_loop():
            return  # its loop is over, and with it the connection
        self._transport.abort()
        await self._lost

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._poll.register(transport.get_extra_info("socket").fileno(), _END_SEEN)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        if self._reader is None:  # nobody asked
            self.abort()
            return
        try:
            if self._reader.feed(data):
                self._answer(None)
        except MalformedAnswerError as error:
            self._answer(httpx.RemoteProtocolError(str(error)))

    def eof_received(self) -> None:
        if self._reader is not None and self._answered is not None and not self._answered.done():
            try:
                self._reader.feed_end()
            except MalformedAnswerError as error:
                self._answer(httpx.RemoteProtocolError(str(error)))
            else:
                self._answer(None)

    def connection_lost(self, error: Exception | None) -> None:
        with suppress(asyncio.InvalidStateError):
            self._lost.set_result(None)
        if self._reader is not None:
            kind = httpx.ReadError if self._reader.has_begun or error is None else httpx.WriteError
            self._answer(kind(str(error or "the connection was closed")))

    # How

    def _answer(self, error: Exception | None) -> None:
        answered = self._answered
        if answered is None or answered.done():
            return
        if error is None:
            answered.set_result(None)
        else:
            answered.set_exception(error)

    def _watch(self) -> None:
        """See to it that silence ends: every byte that is heard, or taken from us, begins it anew."""
        assert self._transport is not None
        now, unwritten = self._loop.time(), self._transport.get_write_buffer_size()
        if unwritten != self._unwritten:
            self._unwritten, self._heard_at = unwritten, now
        if self._silence_s is None:
            return
        ends_at = self._heard_at + self._silence_s
        if now < ends_at:
            self._timer = self._loop.call_at(ends_at, self._watch)
        elif unwritten:
            self._answer(httpx.WriteTimeout(f"nothing could be written for {self._silence_s:g} s"))
        else:
            self._answer(httpx.ReadTimeout(f"nothing was heard for {self._silence_s:g} s"))


def _head_of(request: httpx.Request) -> bytes:
    """The request line and the headers. A line end inside of one would begin another, so it is refused."""
    target = request.url.raw_path
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), target)]
    lines += [b"%b: %b" % header for header in request.headers.raw]
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1 or b" " in target:
        raise httpx.LocalProtocolError("a header of the request holds a line end")
    return head + b"\r\n\r\n"
