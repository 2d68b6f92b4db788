"""A raw HTTP server on loopback, in a thread of its own, that misbehaves as it is told."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .conftest import TASK

ANSWER = json.dumps(TASK).encode()
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER)

_TLS = Path(__file__).parents[2] / "support" / "tls"
CERTIFICATE = _TLS / "certificate.pem"  # of 127.0.0.1 alone, signed by itself

Behaviour = Callable[[socket.socket], bool]
"""Answers one request on a connection; False closes it."""


def answer(connection: socket.socket) -> bool:
    connection.sendall(WHOLE)
    return True


@dataclass
class Loopback:
    """The server's address, and what reached it."""

    port: int
    stopping: threading.Event
    tls: ssl.SSLContext | None = None
    behaviour: Behaviour = answer
    connections: int = 0
    requests: list[bytes] = field(default_factory=list)
    open: set[int] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"


@contextlib.contextmanager
def serve(*, tls: bool = False) -> Iterator[Loopback]:
    """Serve until the block ends; every connection is closed then."""
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE, _TLS / "key.pem")
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    listener.settimeout(0.1)
    server = Loopback(listener.getsockname()[1], threading.Event(), context)
    threads = [threading.Thread(target=_accept, args=(listener, server))]
    threads[0].start()
    try:
        yield server
    finally:
        server.stopping.set()
        threads[0].join()
        listener.close()


def _accept(listener: socket.socket, server: Loopback) -> None:
    serving: list[threading.Thread] = []
    while not server.stopping.is_set():
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            server.connections += 1
            thread = threading.Thread(target=_serve, args=(connection, server))
            thread.start()
            serving.append(thread)
    for thread in serving:
        thread.join()


def _serve(connection: socket.socket, server: Loopback) -> None:
    connection.settimeout(0.1)
    server.open.add(id(connection))
    with contextlib.ExitStack() as open_until_the_end, contextlib.suppress(OSError):
        open_until_the_end.enter_context(connection)
        if server.tls is not None:
            connection.settimeout(5)
            connection = open_until_the_end.enter_context(server.tls.wrap_socket(connection, server_side=True))
            connection.settimeout(0.1)
        while (request := _read(connection, server)) is not None:
            server.requests.append(request)
            if not server.behaviour(connection):
                break
    server.open.discard(id(connection))


def _read(connection: socket.socket, server: Loopback) -> bytes | None:
    """One whole request; None once the client has closed or the server stops."""
    read = b""
    while not server.stopping.is_set():
        head, separator, body = read.partition(b"\r\n\r\n")
        if separator and len(body) >= _content_length(head):
            return read
        try:
            received = connection.recv(65536)
        except TimeoutError:
            continue
        if not received:
            return None
        read += received
    return None


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0
