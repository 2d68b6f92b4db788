"""Sends calls over HTTP, asynchronously and synchronously. Beside `lending` and `connection` alone in loading httpx.

It talks to httpx's transports, one layer below its clients: no redirects, no cookies, of the environment only the proxy
and certificate variables, and about twice the throughput.

Connections belong to one process and, where asynchronous, to one event loop: after a fork, or in another loop, new
ones are opened. A loop closes its own when it ends, so `asyncio.run` in every job leaks none.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any
from urllib.request import getproxies_environment, proxy_bypass
from weakref import WeakKeyDictionary

import httpx

from xpander_celery import __version__
from xpander_celery.backend.calls import Answer, Call
from xpander_celery.backend.configuration import Configuration
from xpander_celery.backend.lending import AsyncTransports, Transports
from xpander_celery.backend.timeouts import Timeouts
from xpander_celery.errors import BackendError, ConfigurationError, NetworkError, ProtocolError

MAX_ANSWER_BYTES = 32 * 1024 * 1024
# Below the five seconds after which common servers drop an idle connection: who closes first loses no request.
KEEP_ALIVE_S = 4.0

_USER_AGENT = f"xpander-celery/{__version__}"
_ONE_CONNECTION = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEP_ALIVE_S)


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
        self._total_s = timeouts.total_timeout_s
        self._ssl_context = ssl_context
        self._max_connections = max_connections
        self._given = given
        self._given_async = given_async
        self._pid = os.getpid()
        self._opened: dict[str, Transports] = {}
        self._opened_async: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, AsyncTransports]] = (
            WeakKeyDictionary()
        )
        self._address = lru_cache(maxsize=256)(_address)  # parsing either costs as much as half a request
        self._headers = lru_cache(maxsize=16)(_headers)
        timeout = httpx.Timeout(timeouts.read_timeout_s, connect=timeouts.connect_timeout_s)
        self._timeout = timeout.as_dict()

    def send(self, configuration: Configuration, call: Call) -> Answer:
        """The answer to `call`, whatever its status; raises `NetworkError` where none came. Uses no event loop."""
        total_s = self._total_of(call)
        deadline = time.monotonic() + total_s
        request, origin = self._request(configuration, call)
        transports = self._transports(request.url, origin)
        try:
            transport = transports.take(total_s)
            try:
                response = transport.handle_request(request)
                try:
                    body = bytearray()
                    for chunk in response.iter_bytes():
                        _add(call, body, chunk)
                        if time.monotonic() > deadline:
                            raise TimeoutError(f"no whole answer within {total_s:g} s")
                finally:
                    response.close()
            except (httpx.HTTPError, OSError, UnicodeError, BackendError):
                transports.give_back(transport)
                raise
            except BaseException:  # of a signal's handler, such as a soft time limit
                transports.give_up()
                raise
            transports.give_back(transport)
        except (httpx.HTTPError, OSError, UnicodeError) as error:  # the last one by the resolver, of a malformed name
            raise _failure(call, error) from error
        return Answer(response.status_code, bytes(body), response.headers)

    async def asend(self, configuration: Configuration, call: Call) -> Answer:
        """As `send`, on the running asyncio loop, and with a total deadline that holds in every phase."""
        request, origin = self._request(configuration, call)
        transports = self._async_transports(request.url, origin)
        try:
            async with asyncio.timeout(self._total_of(call)):
                transport = await transports.take()
                try:
                    response = await transport.handle_async_request(request)
                    body = bytearray()
                    if response.is_closed:  # it was read as it came
                        _add(call, body, response.content)
                    else:
                        try:
                            async for chunk in response.aiter_bytes():
                                _add(call, body, chunk)
                        finally:
                            await response.aclose()
                finally:
                    await transports.give_back(transport)
        except (httpx.HTTPError, OSError) as error:  # asyncio's TimeoutError is an OSError
            raise _failure(call, error) from error
        return Answer(response.status_code, bytes(body), response.headers)

    def close(self) -> None:
        """Close the synchronous connections."""
        opened, self._opened = self._opened, {}
        for transports in opened.values():
            transports.close()

    async def aclose(self) -> None:
        """Close the connections of the running loop, and the synchronous ones."""
        for transports in self._opened_async.pop(asyncio.get_running_loop(), {}).values():
            await transports.aclose()
        self.close()

    def _request(self, configuration: Configuration, call: Call) -> tuple[httpx.Request, str]:
        """The request, and whom it is for."""
        url, origin = self._address(configuration.get_full_url() + call.path)
        headers = self._headers(configuration.require_key(), call.body is not None, call.headers)
        timeout, within_s = self._timeout, call.within_s
        if within_s is not None:
            timeout = {phase: within_s if given is None else min(given, within_s) for phase, given in timeout.items()}
        extensions = {"timeout": timeout}
        return httpx.Request(call.method, url, headers=headers, content=call.body, extensions=extensions), origin

    def _total_of(self, call: Call) -> float:
        return self._total_s if call.within_s is None else min(self._total_s, call.within_s)

    def _transports(self, url: httpx.URL, origin: str) -> Transports:
        if self._pid != os.getpid():  # forked: the parent's connections are not ours to use, nor to close
            self._pid, self._opened = os.getpid(), {}
        if (opened := self._opened.get(origin)) is None:
            given = self._given
            make = partial(httpx.HTTPTransport, **self._options(url)) if given is None else lambda: given
            opened = self._opened.setdefault(origin, Transports(make, self._max_connections))  # atomic: one thread wins
        return opened

    def _async_transports(self, url: httpx.URL, origin: str) -> AsyncTransports:
        loop = asyncio.get_running_loop()
        if loop not in self._opened_async:
            self._forget_closed_loops()
        of_loop = self._opened_async.setdefault(loop, {})
        if (opened := of_loop.get(origin)) is None:
            given = self._given_async
            make = partial(httpx.AsyncHTTPTransport, **self._options(url)) if given is None else lambda: given
            opened = of_loop[origin] = AsyncTransports(make, self._max_connections)
        return opened

    def _forget_closed_loops(self) -> None:
        """What is kept for a loop refers to it, so that it would stay for ever; so would a socket that it left open."""
        for reference in self._opened_async.keyrefs():
            loop = reference()
            if loop is not None and loop.is_closed():
                self._opened_async.pop(loop, None)

    def _options(self, url: httpx.URL) -> dict[str, Any]:
        return {"verify": self._verify(url), "limits": _ONE_CONNECTION, "proxy": _proxy_of(url)}

    def _verify(self, url: httpx.URL) -> ssl.SSLContext | bool:
        """What checks certificates; loading the authorities takes 30 ms, so once, and not for plain HTTP."""
        if url.scheme == "http" and self._ssl_context is None:
            return False
        if self._ssl_context is None:
            try:
                self._ssl_context = httpx.create_ssl_context()
            except OSError as error:
                raise ConfigurationError(
                    "SSL_CERT_FILE", f"cannot be read ({error})", "Give a file of PEM certificates, or unset it."
                ) from error
        return self._ssl_context


def _add(call: Call, body: bytearray, chunk: bytes) -> None:
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


def _headers(api_key: str, has_body: bool, more: tuple[tuple[str, str], ...]) -> httpx.Headers:
    own = [("x-api-key", api_key), ("user-agent", _USER_AGENT), ("accept", "application/json"), *more]
    return httpx.Headers([*own, ("content-type", "application/json")] if has_body else own)


def is_proxied(address: str) -> bool:
    """Whether the environment wants a proxy for this address; raises `ConfigurationError` where it cannot be used."""
    return _proxy_of(_url(address)) is not None


def _address(text: str) -> tuple[httpx.URL, str]:
    url = _url(text)
    return url, f"{url.scheme}://{url.host}:{url.port}"


def _proxy_of(url: httpx.URL) -> httpx.Proxy | None:
    """The proxy that the environment names for `url`.

    Read from the variables alone: the system lookup of macOS, which httpx's clients use, crashes in forked processes
    (`proxy_bypass` asks the system only where no variable is set).
    """
    proxies = getproxies_environment()
    address = proxies.get(url.scheme) or proxies.get("all")
    if not address or proxy_bypass(url.netloc.decode()):
        return None
    variable = f"{url.scheme.upper()}_PROXY"
    try:
        proxy = httpx.Proxy(address if "://" in address else f"http://{address}")
    except (ValueError, httpx.InvalidURL) as error:
        raise ConfigurationError(variable, f"is no proxy ({error})", "Give a URL such as http://proxy:3128.") from error
    if proxy.url.scheme.startswith("socks") and find_spec("socksio") is None:
        raise ConfigurationError(variable, "is a SOCKS proxy", "Install what it needs: pip install 'httpx[socks]'.")
    return proxy


def _failure(call: Call, error: Exception) -> BackendError:
    """Ours for what httpx raised."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, httpx.DecodingError):
        return ProtocolError(f"{call}: an answer that cannot be decoded ({said})")
    return NetworkError(f"{call}: no answer ({said})")
