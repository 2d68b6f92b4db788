"""Where reports go: the platform through our own client, or a user's backend object; and what a user's hook makes of
them on the way. It sends one report at a time and rules on nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import signal
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import FrameType
from typing import Any, Protocol

from xpander_celery.errors import ConfigurationError
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.replies import status_of
from xpander_celery.report import TaskReport

_ENDED = frozenset({"completed", "failed", "error", "stopped"})
_HOOK_MAY_TAKE_S = 5.0
# What the HTTP client loads where it is installed and the relay never uses: httpx's command line, with it rich and
# pygments (httpx/__init__.py, 0.28), and HTTP/2 (httpcore/_async/__init__.py, 1.0). 5.5 MB together.
_PASSENGERS = ("httpx._main", "h2")


class Target(Protocol):
    """One sending worker's way to the platform. Raises what `replies.read_error` understands."""

    async def send(self, report: TaskReport) -> None:
        """Deliver one report."""

    async def has_ended(self, report: TaskReport) -> bool:
        """Whether the platform has a record of this report's id that already ended."""

    async def aclose(self) -> None:
        """Close its connection."""


class Platform:
    """The platform, over one connection."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    async def send(self, report: TaskReport) -> None:
        await self._backend.asend_report(report)

    async def has_ended(self, report: TaskReport) -> bool:
        return await _has_ended(self._backend, report)

    async def aclose(self) -> None:
        await self._backend.aclose()


class OwnBackend:
    """A user's object with `areport_external_task`, such as the official `Backend`."""

    def __init__(self, backend: Any, timeout_s: float) -> None:
        self._backend = backend
        self._timeout_s = timeout_s

    async def send(self, report: TaskReport) -> None:
        tokens = report.tokens.to_wire() if report.tokens is not None else None
        values = dict(report) | {"tokens": tokens, "used_tools": list(report.used_tools)}
        async with asyncio.timeout(self._timeout_s):
            answer = self._backend.areport_external_task(**values)
            if inspect.isawaitable(answer):
                await answer

    async def has_ended(self, report: TaskReport) -> bool:
        if not hasattr(self._backend, "aload_task"):
            return False
        async with asyncio.timeout(self._timeout_s):
            return await _has_ended(self._backend, report)

    async def aclose(self) -> None:
        close = getattr(self._backend, "aclose", None)
        if close is not None:
            await close()


async def _has_ended(backend: Any, report: TaskReport) -> bool:
    try:
        task = await backend.aload_task(report.id)
    except Exception as error:
        if status_of(error) in (404, 410):
            return False
        raise
    return getattr(task, "status", None) in _ENDED


def make_targets(config: RelayConfig) -> Callable[[], Target]:
    """A factory of targets as the settings want them; raises `ConfigurationError` where that cannot be."""
    if config.backend is not None:
        backend = imported("backend", config.backend, config.search_path)
        if isinstance(backend, type) or (not hasattr(backend, "areport_external_task") and callable(backend)):
            backend = backend()
        if not hasattr(backend, "areport_external_task"):
            raise ConfigurationError("backend", f"{config.backend} has no areport_external_task", "Name one that has.")
        return lambda: OwnBackend(backend, config.total_timeout_s)
    return _platforms(config)


def _platforms(config: RelayConfig) -> Callable[[], Target]:
    with _without(*_PASSENGERS):
        import httpx

        from xpander_celery.backend import Backend, Configuration
        from xpander_celery.backend.connection import Connection
        from xpander_celery.backend.transport import KEEP_ALIVE_S, MAX_ANSWER_BYTES, is_proxied

        configuration = Configuration(config.api_key, config.organization_id, config.base_url)
        address = str(configuration.base_url)
        try:
            is_direct = not is_proxied(address)
        except ConfigurationError:  # the first request says so, and delivery is paused with it
            is_direct = False
        if not is_direct:
            import httpcore  # noqa: F401 - httpx loads it by its first transport
    ssl_context = None if address.startswith("http:") else httpx.create_ssl_context()

    def platform() -> Platform:
        own = Connection(ssl_context, keep_alive_s=KEEP_ALIVE_S, max_body_bytes=MAX_ANSWER_BYTES)
        backend = Backend(
            configuration,
            connect_timeout_s=config.connect_timeout_s,
            read_timeout_s=config.read_timeout_s,
            total_timeout_s=config.total_timeout_s,
            max_connections=1,
            ssl_context=ssl_context,
            async_transport=own if is_direct else None,
        )
        return Platform(backend)

    return platform


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Imports in here find these modules absent; afterwards anybody may load them."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: an import of it fails
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def make_hook(config: RelayConfig) -> Callable[[TaskReport], TaskReport | None] | None:
    """`before_send` with a deadline and checked; None where there is none. What it raises is the hook's failure."""
    if config.before_send is None:
        return None
    name = config.before_send
    function = imported("before_send", name, config.search_path)

    def hook(report: TaskReport) -> TaskReport | None:
        previous = signal.signal(signal.SIGALRM, _too_long)
        others, _ = signal.setitimer(signal.ITIMER_REAL, _HOOK_MAY_TAKE_S)
        try:
            changed = function(report)
        finally:
            signal.setitimer(signal.ITIMER_REAL, others)
            signal.signal(signal.SIGALRM, previous)
        if changed is not None and not isinstance(changed, TaskReport):
            raise TypeError(f"{name} returned a {type(changed).__name__}, and neither a report nor None")
        if changed is not None and changed.id != report.id:
            raise ValueError(f"{name} changed the id of a report, which would leave two records")
        return changed

    return hook


def imported(setting: str, path: str, search_path: tuple[str, ...]) -> Any:
    """What an import path such as `package.module:name` names, found as the worker would find it."""
    sys.path.extend(entry for entry in search_path if entry not in sys.path)
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        return getattr(import_module(module), name)
    except Exception as error:
        problem = f"{path} cannot be imported ({type(error).__name__}: {error})"
        raise ConfigurationError(setting, problem, "Give an import path such as 'package.module:name'.") from error


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"it did not return within {_HOOK_MAY_TAKE_S:g} s")
