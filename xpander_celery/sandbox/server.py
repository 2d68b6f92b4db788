"""Runs the sandbox's application under uvicorn until SIGTERM or Ctrl-C, and says where once it is ready."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn

from xpander_celery.sandbox.app import build_app
from xpander_celery.sandbox.store import Store

_KEEP_ALIVE_S = 75
_SHUTDOWN_S = 1


class _Server(uvicorn.Server):
    """uvicorn's server, with our own word on readiness and on when to stop."""

    def __init__(self, config: uvicorn.Config, *, stop_at_eof: bool) -> None:
        super().__init__(config)
        self._stop_at_eof = stop_at_eof

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._stop_at_eof:
            threading.Thread(target=self._wait_for_eof, args=(asyncio.get_running_loop(),), daemon=True).start()
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        print(f"sandbox ready http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)  # noqa: T201

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises the signal again once it has stopped, so a clean stop would look like a death."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        self.should_exit = True

    def _wait_for_eof(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read standard input by its descriptor: a buffered read in a daemon thread would abort the interpreter."""
        while os.read(0, 4096):
            pass
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            loop.call_soon_threadsafe(self._stop)


def serve(arguments: argparse.Namespace) -> int:
    """Serve as `arguments` say until told to stop; the exit code."""
    store = Store(arguments.db)
    app = build_app(
        store,
        api_keys=frozenset(arguments.api_key),
        keep_requests=arguments.keep_requests,
        model_seed=arguments.model_seed,
    )
    config = uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        lifespan="off",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )
    try:
        _Server(config, stop_at_eof=arguments.stop_at_eof).run()
    finally:
        store.close()
    return 0
