"""A Redis client of a few functions (RESP2): one deadline for a whole call, no lock, no thread, no second try.

Threads, greenlets and signal handlers may call at the same time: each takes an idle connection or makes one. Whatever
interrupts a call, a signal handler that raises too, closes its connection, so no reply is ever taken for another's.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from xpander_celery.redis_address import Address

_CHUNK_BYTES = 65536
_IDLE_CONNECTIONS = 8

Argument = bytes | str | int
Command = Sequence[Argument]


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error in place of a reply."""

    text: str

    @property
    def code(self) -> str:
        """The first word, such as `NOGROUP` or `OOM`."""
        return self.text.partition(" ")[0]


class RefusedError(Exception):
    """Redis answered a command with an error."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.code = refusal.code


class NoRedisError(OSError):
    """What answers is not a Redis server."""


class Client:
    """Calls one server. `timeout_s` is for a whole call, with connecting and every reply, but not the name's look-up:
    that is done by `resolve`, or by the first call.
    """

    def __init__(self, address: Address, *, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []
        self._places: list[_Place] = []

    def resolve(self) -> None:
        """Look up the name of the server; raises OSError."""
        self._places = _look_up(self.address)

    def ask(self, *command: Argument) -> Any:
        """The reply to one command; raises `RefusedError`, and OSError where there was none in time."""
        [reply] = self.call([command])
        if isinstance(reply, Refusal):
            raise RefusedError(reply)
        return reply

    def call(self, commands: Sequence[Command]) -> list[Any]:
        """The replies to `commands`, sent at once; an error is a `Refusal` among them. Raises OSError."""
        replies = self._call(commands)
        moved = next((reply for reply in replies if isinstance(reply, Refusal) and reply.code == "MOVED"), None)
        if moved is None:
            return replies
        # a cluster: all our keys are in one slot, so they are all where this one is
        host, _, port = moved.text.split(" ")[2].rpartition(":")
        self.address = replace(self.address, host=host or self.address.host, port=int(port))
        self.forget()
        self.resolve()
        return self._call(commands)

    def tell(self, commands: Sequence[Command]) -> None:
        """Send `commands` whose replies do not matter, unless one is refused: raises as `ask`."""
        for reply in self.call(commands):
            if isinstance(reply, Refusal):
                raise RefusedError(reply)

    def forget(self) -> None:
        """Drop all connections; in a forked child this closes what was inherited, and the parent's go on."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _call(self, commands: Sequence[Command]) -> list[Any]:
        if not self._places:
            self.resolve()
        deadline = time.monotonic() + self._timeout_s
        try:
            connection = self._idle.pop()
        except IndexError:
            return self._call_on(self._connection(deadline), commands, deadline)
        try:
            return self._call_on(connection, commands, deadline)
        except ConnectionError:  # closed while it was idle, by a server that restarted or has a time limit
            self.forget()
            return self._call_on(self._connection(deadline), commands, deadline)

    def _connection(self, deadline: float) -> _Connection:
        return _Connection(_connected(self.address, self._places, deadline), self.address.greeting())

    def _call_on(self, connection: _Connection, commands: Sequence[Command], deadline: float) -> list[Any]:
        try:
            replies = connection.call(commands, deadline)
        except BaseException:  # also a signal handler's: what is unread would be taken for the next call's reply
            connection.close()
            raise
        if len(self._idle) < _IDLE_CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.close()
        return replies


@dataclass(frozen=True, slots=True)
class _Place:
    family: int
    address: Any


def _look_up(address: Address) -> list[_Place]:
    if address.path is not None:
        return [_Place(socket.AF_UNIX, address.path)]
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    return [_Place(family, place) for family, _, _, _, place in found]


def _encoded(commands: Sequence[Command]) -> bytes:
    parts = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for argument in command:
            value = argument if isinstance(argument, bytes) else str(argument).encode()
            parts.append(b"$%d\r\n%b\r\n" % (len(value), value))
    return b"".join(parts)


class _Connection:
    """One connection. After any exception it is of no use."""

    def __init__(self, connected: socket.socket, greeting: Sequence[Command]) -> None:
        self._socket = connected
        self._greeting = greeting
        self._buffer = bytearray()

    def call(self, commands: Sequence[Command], deadline: float) -> list[Any]:
        greeting, self._greeting = self._greeting, ()
        self._allow_until(deadline)
        self._socket.sendall(_encoded([*greeting, *commands]))
        for _ in greeting:
            answer = self._reply(deadline)
            if isinstance(answer, Refusal):
                raise PermissionError(f"Redis refused the connection: {answer.code}")
        return [self._reply(deadline) for _ in commands]

    def close(self) -> None:
        self._socket.close()

    __del__ = close

    def _allow_until(self, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("Redis did not answer in time")
        self._socket.settimeout(left_s)

    def _reply(self, deadline: float) -> Any:
        line = self._line(deadline)
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            return Refusal(rest.decode(errors="replace"))
        try:
            number = int(rest)
        except ValueError as error:
            raise NoRedisError("this is not a Redis server") from error
        if kind == b":":
            return number
        if kind == b"$":
            return None if number < 0 else self._exactly(number + 2, deadline)[:-2]
        if kind == b"*":
            return None if number < 0 else [self._reply(deadline) for _ in range(number)]
        raise NoRedisError("this is not a Redis server")

    def _line(self, deadline: float) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            self._receive(deadline)
        return self._exactly(end + 2, deadline)[:-2]

    def _exactly(self, size: int, deadline: float) -> bytes:
        while len(self._buffer) < size:
            self._receive(deadline)
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def _receive(self, deadline: float) -> None:
        self._allow_until(deadline)
        chunk = self._socket.recv(_CHUNK_BYTES)
        if not chunk:
            raise ConnectionResetError("Redis closed the connection")
        self._buffer += chunk


def _connected(address: Address, places: Sequence[_Place], deadline: float) -> socket.socket:
    """A connection to the first of `places` that takes one."""
    for place in places[:-1]:
        with suppress(OSError):
            return _connected_to(place, address, deadline)
    return _connected_to(places[-1], address, deadline)


def _connected_to(place: _Place, address: Address, deadline: float) -> socket.socket:
    connection = socket.socket(place.family, socket.SOCK_STREAM)
    try:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        connection.connect(place.address)
        if address.path is None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.is_encrypted:
            return _encrypting(address).wrap_socket(connection, server_hostname=address.host)
    except BaseException:
        connection.close()
        raise
    return connection


def _encrypting(address: Address) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=address.authorities)
    if not address.verifies:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
