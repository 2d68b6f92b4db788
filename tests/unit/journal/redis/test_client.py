"""The small Redis client: addresses, replies, deadlines, and what becomes of connections."""

from __future__ import annotations

import contextlib
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.redis_server import RedisServer, running_redis
from xpander_celery.errors import JournalError
from xpander_celery.journal.redis.client import Client, NoRedisError, Refusal, RefusedError
from xpander_celery.redis_address import Address


@contextmanager
def server_saying(*replies: bytes, pause_s: float = 0.0) -> Iterator[Address]:
    """A server that sends the next of `replies` whenever it receives something; a connection each if one is empty."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve() -> None:
        pending = list(replies)
        while pending and not stop.is_set():
            connection, _ = listener.accept()
            with connection, suppress(OSError):  # the client may have gone
                while pending and connection.recv(65536):
                    reply = pending.pop(0)
                    if not reply:
                        break
                    for byte in (reply[place : place + 1] for place in range(len(reply))) if pause_s else [reply]:
                        connection.sendall(byte)
                        stop.wait(pause_s)
                else:
                    stop.wait(30 if not pending else 0)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield Address(host="127.0.0.1", port=listener.getsockname()[1])
    finally:
        stop.set()
        with socket.create_connection(listener.getsockname()) as waker:
            waker.sendall(b"x")
        listener.close()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[Client]:
    client = Client(Address.parse(redis_server.url), timeout_s=5)
    yield client
    client.forget()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", Address()),
        ("redis://cache", Address(host="cache")),
        ("redis://cache:1234/5", Address(host="cache", port=1234, database=5)),
        ("redis://cache?db=7", Address(host="cache", database=7)),
        ("redis://:pass%2Fword@cache", Address(host="cache", password="pass/word")),
        ("redis://me:secret@[::1]:1", Address(host="::1", port=1, username="me", password="secret")),
        ("rediss://cache/1", Address(host="cache", database=1, is_encrypted=True)),
        ("rediss://c?ssl_cert_reqs=none", Address(host="c", is_encrypted=True, verifies=False)),
        ("rediss://c?ssl_ca_certs=/ca.pem", Address(host="c", is_encrypted=True, authorities="/ca.pem")),
        ("unix:///run/redis.sock?db=2", Address(path="/run/redis.sock", database=2)),
    ],
)
def test_a_url_is_understood(url: str, expected: Address) -> None:
    assert Address.parse(url) == expected


@pytest.mark.parametrize(
    "url", ["http://x", "redis://x/notanumber", "redis://x:port", "redis://x?timeout=1", "redis://:secret@x?a=b"]
)
def test_what_is_no_such_url_is_refused_without_telling_the_password(url: str) -> None:
    with pytest.raises(JournalError) as refused:
        Address.parse(url)
    assert "secret" not in str(refused.value)


def test_a_password_is_in_no_text() -> None:
    address = Address.parse("redis://me:secret@cache:1/2")
    assert str(address) == "cache:1/2"
    assert "secret" not in repr(address)


def test_every_kind_of_reply_is_read(client: Client) -> None:
    client.ask("DEL", "list", "text")
    assert client.ask("PING") == b"PONG"
    assert client.ask("SET", "text", b"\r\n\0binary") == b"OK"
    assert client.ask("GET", "text") == b"\r\n\0binary"
    assert client.ask("GET", "nothing") is None
    assert client.ask("RPUSH", "list", "a", 1) == 2
    assert client.ask("LRANGE", "list", 0, -1) == [b"a", b"1"]
    assert client.ask("EVAL", "return {1,{'x',false},'y'}", 0) == [1, [b"x", None], b"y"]
    assert client.ask("SET", "text", "x" * 1_000_000) == b"OK"
    assert client.ask("GET", "text") == b"x" * 1_000_000


def test_a_refused_command_raises_and_the_connection_goes_on(client: Client) -> None:
    with pytest.raises(RefusedError, match="unknown command") as refused:
        client.ask("NONSENSE")
    assert refused.value.code == "ERR"
    assert client.ask("PING") == b"PONG"


def test_many_commands_are_one_call_and_a_refused_one_does_not_hide_the_others(client: Client) -> None:
    one, two, three = client.call([["PING"], ["NONSENSE"], ["ECHO", "x"]])
    assert (one, three) == (b"PONG", b"x")
    assert isinstance(two, Refusal)
    with pytest.raises(RefusedError):
        client.tell([["PING"], ["NONSENSE"]])


def test_a_connection_is_used_again(client: Client) -> None:
    assert client.ask("CLIENT", "ID") == client.ask("CLIENT", "ID")


def test_a_connection_that_the_server_closed_is_replaced(client: Client) -> None:
    own = client.ask("CLIENT", "ID")
    killer = Client(client.address, timeout_s=5)
    killer.ask("CLIENT", "KILL", "ID", own)
    killer.forget()
    assert client.ask("CLIENT", "ID") != own


def test_a_server_that_is_not_there_fails_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        Client(Address(host="127.0.0.1", port=port), timeout_s=5).ask("PING")


@pytest.mark.parametrize("pause_s", [0.0, 0.05])
def test_the_deadline_is_for_the_whole_call_however_the_reply_comes(pause_s: float) -> None:
    reply = b"$100\r\n" if not pause_s else b"$100\r\n" + b"x" * 100
    with server_saying(reply, pause_s=pause_s) as address:
        client = Client(address, timeout_s=0.25)
        before = time.monotonic()
        with pytest.raises(TimeoutError):
            client.ask("PING")
        assert 0.2 < time.monotonic() - before < 1.0
        client.forget()


@pytest.mark.parametrize("reply", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b":x\r\n", b"$x\r\n"])
def test_what_is_no_redis_is_told_from_one(reply: bytes) -> None:
    with server_saying(reply) as address:
        client = Client(address, timeout_s=5)
        with pytest.raises(NoRedisError):
            client.ask("PING")


def test_a_connection_that_ends_within_a_reply_is_an_error() -> None:
    with server_saying(b"", b"") as address, pytest.raises(ConnectionResetError):
        Client(address, timeout_s=5).ask("PING")


def test_a_cluster_node_points_to_the_right_one_and_is_followed(redis_server: RedisServer) -> None:
    with server_saying(b"-MOVED 1234 127.0.0.1:%d\r\n" % redis_server.port) as address:
        client = Client(address, timeout_s=5)
        assert client.ask("PING") == b"PONG"
        assert client.address.port == redis_server.port
        client.forget()


def test_password_user_and_database_come_first(tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        server.client.ask("ACL", "SETUSER", "me", "on", ">secret", "~*", "+@all")
        client = Client(Address.parse(f"redis://me:secret@127.0.0.1:{server.port}/3"), timeout_s=5)
        assert client.ask("ACL", "WHOAMI") == b"me"
        assert b"db=3" in client.ask("CLIENT", "INFO")
        client.forget()
        wrong = Client(Address.parse(f"redis://me:wrong@127.0.0.1:{server.port}"), timeout_s=5)
        with pytest.raises(PermissionError, match="WRONGPASS"):
            wrong.ask("PING")


def test_a_unix_socket_is_a_way_too(tmp_path: Path) -> None:
    with running_redis(tmp_path, "--unixsocket", str(tmp_path / "s")):
        client = Client(Address.parse(f"unix://{tmp_path}/s"), timeout_s=5)
        assert client.ask("PING") == b"PONG"
        client.forget()


def test_an_encrypted_connection_is_verified(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {key} -out {certificate} -subj /CN=localhost"
    try:
        subprocess.run([*command.split(), "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(3):
                connection, _ = listener.accept()
                try:
                    with context.wrap_socket(connection, server_side=True) as encrypted:
                        encrypted.recv(1000)
                        encrypted.sendall(b"+PONG\r\n")
                except OSError:
                    connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        place = f"rediss://localhost:{listener.getsockname()[1]}"
        answers = []
        for options in (f"?ssl_ca_certs={certificate}", "?ssl_cert_reqs=none", ""):
            client = Client(Address.parse(place + options), timeout_s=5)
            try:
                answers.append(client.ask("PING"))
            except OSError as error:
                answers.append(type(error))
            client.forget()
        thread.join()
    assert answers[:2] == [b"PONG", b"PONG"]
    assert answers[2] in (ssl.SSLCertVerificationError, ConnectionRefusedError)


def test_threads_call_at_once_and_get_their_own_replies(client: Client) -> None:
    wrong: list[object] = []

    def work(name: int) -> None:
        for number in range(200):
            reply = client.ask("ECHO", f"{name}-{number}")
            if reply != f"{name}-{number}".encode():
                wrong.append(reply)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a socket dies where it raises
def test_a_signal_handler_that_raises_or_calls_confuses_no_reply(client: Client) -> None:
    class InterruptedCallError(Exception):
        pass

    seen: list[bytes] = []

    def handler(number: int, frame: object) -> None:
        seen.append(client.ask("ECHO", "from the handler"))
        if len(seen) % 2:
            raise InterruptedCallError

    def ask(number: int) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0001 + (number % 10) * 0.00003)
        for turn in range(20):
            assert client.ask("ECHO", f"{number}-{turn}") == f"{number}-{turn}".encode()
        signal.setitimer(signal.ITIMER_REAL, 0)

    previous = signal.signal(signal.SIGALRM, handler)
    deadline = time.monotonic() + 30
    try:
        number = 0
        while len(seen) < 100 and time.monotonic() < deadline:
            number += 1
            with contextlib.suppress(InterruptedCallError):
                ask(number)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert len(seen) >= 100
    assert set(seen) == {b"from the handler"}
