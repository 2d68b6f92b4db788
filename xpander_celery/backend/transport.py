"""Sends calls over HTTP, asynchronously and synchronously. The only module that loads httpx.

It talks to httpx's transports, one layer below its clients: no redirects, no cookies, of the environment only the proxy
and certificate variables, and about twice the throughput.

Connections belong to one process and, where asynchronous, to one event loop: after a fork, or in another loop, new
ones are opened. A loop closes its own when it ends (`_until_the_loop_ends`), so `asyncio.run` in every job leaks none.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import AsyncGenerator
from functools import lru_cache
from importlib.util import find_spec
from urllib.request import getproxies_environment, proxy_bypass
from weakref import WeakKeyDictionary

import httpx

from xpander_celery import __version__
from xpander_celery.backend.calls import Answer, Call
from xpander_celery.backend.configuration import Configuration
from xpander_celery.backend.timeouts import Timeouts
from xpander_celery.errors import BackendError, ConfigurationError, NetworkError, ProtocolError

MAX_ANSWER_BYTES = 32 * 1024 * 1024
# Below the five seconds after which common servers drop an idle connection: who closes first loses no request.
KEEP_ALIVE_S = 4.0

_USER_AGENT = f"xpander-celery/{__version__}"


class Transport:
    """Sends calls to the platform that a configuration names; opens nothing until the first call.

    `given` and `given_async` replace the network, which is what tests do. Safe to share between threads.
    """

    def __init__(
        self,
        timeouts: Timeouts,
        *,
        ssl_context: ssl.SSLContext | None = None,
        max_connections: int = 10,
        given: httpx.BaseTransport | None = None,
        given_async: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._timeouts = timeouts
        self._ssl_context = ssl_context
        self._limits = httpx.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections, keepalive_expiry=KEEP_ALIVE_S
        )
        self._given = given
        self._given_async = given_async
        self._pid = os.getpid()
        self._opened: dict[str, httpx.BaseTransport] = {}
        self._opened_async: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Opened]] = WeakKeyDictionary()
        self._url = lru_cache(maxsize=256)(_url)
        self._extensions = {
            "timeout": httpx.Timeout(
                timeouts.read_timeout_s, connect=timeouts.connect_timeout_s, pool=timeouts.total_timeout_s
            ).as_dict()
        }

    def send(self, configuration: Configuration, call: Call) -> Answer:
        """The answer to `call`, whatever its status; raises `NetworkError` where none came. Uses no event loop."""
        deadline = time.monotonic() + self._timeouts.total_timeout_s
        try:
            request = self._request(configuration, call)
            response = self._transport(request.url).handle_request(request)
            try:
                body = bytearray()
                for chunk in response.iter_bytes():
                    _take(call, body, chunk)
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"no whole answer within {self._timeouts.total_timeout_s:g} s")
            finally:
                response.close()
        except (httpx.HTTPError, OSError) as error:
            raise _failure(call, error) from error
        return Answer(response.status_code, bytes(body), response.headers)

    async def asend(self, configuration: Configuration, call: Call) -> Answer:
        """As `send`, on the running asyncio loop, and with a total deadline that holds in every phase."""
        try:
            async with asyncio.timeout(self._timeouts.total_timeout_s):
                request = self._request(configuration, call)
                transport = await self._async_transport(request.url)
                response = await transport.handle_async_request(request)
                try:
                    body = bytearray()
                    async for chunk in response.aiter_bytes():
                        _take(call, body, chunk)
                finally:
                    await response.aclose()
        except (httpx.HTTPError, OSError) as error:  # asyncio's TimeoutError is an OSError
            raise _failure(call, error) from error
        return Answer(response.status_code, bytes(body), response.headers)

    def close(self) -> None:
        """Close the synchronous connections."""
        opened, self._opened = self._opened, {}
        for transport in opened.values():
            transport.close()

    async def aclose(self) -> None:
        """Close the connections of the running loop, and the synchronous ones."""
        for opened in self._opened_async.pop(asyncio.get_running_loop(), {}).values():
            await opened.guard.aclose()
        self.close()

    def _request(self, configuration: Configuration, call: Call) -> httpx.Request:
        headers = [
            ("x-api-key", configuration.require_key()),
            ("user-agent", _USER_AGENT),
            ("accept", "application/json"),
            *call.headers,
        ]
        if call.body is not None:
            headers.append(("content-type", "application/json"))
        url = self._url(configuration.get_full_url() + call.path)
        return httpx.Request(call.method, url, headers=headers, content=call.body, extensions=self._extensions)

    def _transport(self, url: httpx.URL) -> httpx.BaseTransport:
        if self._given is not None:
            return self._given
        if self._pid != os.getpid():  # forked: the parent's connections are not ours to use, nor to close
            self._pid, self._opened = os.getpid(), {}
        origin = _origin(url)
        opened = self._opened.get(origin)
        if opened is None:
            fresh = httpx.HTTPTransport(verify=self._verify(url), limits=self._limits, proxy=_proxy_of(url))
            opened = self._opened.setdefault(origin, fresh)  # atomic: of two threads, one wins
        return opened

    async def _async_transport(self, url: httpx.URL) -> httpx.AsyncBaseTransport:
        if self._given_async is not None:
            return self._given_async
        of_loop = self._opened_async.setdefault(asyncio.get_running_loop(), {})
        origin = _origin(url)
        opened = of_loop.get(origin)
        if opened is None:
            transport = httpx.AsyncHTTPTransport(verify=self._verify(url), limits=self._limits, proxy=_proxy_of(url))
            opened = of_loop[origin] = _Opened(transport)
            await anext(opened.guard)
        return opened.transport

    def _verify(self, url: httpx.URL) -> ssl.SSLContext | bool:
        """What checks certificates; loading the authorities takes 30 ms, so not for plain HTTP."""
        if url.scheme == "http" and self._ssl_context is None:
            return False
        if self._ssl_context is None:
            self._ssl_context = httpx.create_ssl_context()
        return self._ssl_context


class _Opened:
    """An asynchronous transport of one loop, with the generator that closes it."""

    __slots__ = ("guard", "transport")

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self.transport = transport
        self.guard = _until_the_loop_ends(transport)


async def _until_the_loop_ends(transport: httpx.AsyncBaseTransport) -> AsyncGenerator[None, None]:
    """Once begun, closes `transport` when finalized: asyncio finalizes a loop's generators before closing the loop."""
    try:
        yield
    finally:
        await transport.aclose()


def _take(call: Call, body: bytearray, chunk: bytes) -> None:
    if len(body) + len(chunk) > MAX_ANSWER_BYTES:
        raise ProtocolError(f"{call}: an answer of more than {MAX_ANSWER_BYTES} bytes")
    body += chunk


def _url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
        _ = url.host  # decodes an international name, and raises where it is none
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigurationError("XPANDER_BASE_URL", f"cannot be used ({error})", "Check the host's name.") from error
    return url


def _origin(url: httpx.URL) -> str:
    return f"{url.scheme}://{url.host}:{url.port}"


def _proxy_of(url: httpx.URL) -> httpx.Proxy | None:
    """The proxy that the environment names for `url`.

    Read from the variables alone: the system lookup of macOS, which httpx's clients use, crashes in forked processes
    (`proxy_bypass` asks the system only where no variable is set).
    """
    proxies = getproxies_environment()
    address = proxies.get(url.scheme) or proxies.get("all")
    if not address or proxy_bypass(url.netloc.decode()):
        return None
    try:
        proxy = httpx.Proxy(address if "://" in address else f"http://{address}")
    except (ValueError, httpx.InvalidURL) as error:
        raise ConfigurationError(
            f"{url.scheme.upper()}_PROXY", f"is no proxy ({error})", "Give a URL such as http://proxy:3128."
        ) from error
    if proxy.url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ConfigurationError(
            f"{url.scheme.upper()}_PROXY", "is a SOCKS proxy", "Install what it needs: pip install 'httpx[socks]'."
        )
    return proxy


def _failure(call: Call, error: Exception) -> BackendError:
    """Ours for what httpx raised."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, httpx.DecodingError):
        return ProtocolError(f"{call}: an answer that cannot be decoded ({said})")
    return NetworkError(f"{call}: no answer ({said})")
