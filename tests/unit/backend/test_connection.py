"""The relay's own connection, on loopback sockets, against servers of every kind."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from xpander_celery.backend.connection import Connection

from .loopback import ANSWER, CERTIFICATE, WHOLE, Behaviour, Loopback, answer, serve

BODY = b'{"id":"a"}'


@pytest.fixture
def server() -> Iterator[Loopback]:
    with serve() as running:
        yield running


@pytest.fixture
def secure() -> Iterator[Loopback]:
    with serve(tls=True) as running:
        yield running


def saying(*pieces: bytes, then: bool = True) -> Behaviour:
    """A server that answers with these bytes, each in a packet of its own, and then keeps the connection or not."""

    def speak(connection: socket.socket) -> bool:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number, piece in enumerate(pieces):
            if number:
                time.sleep(0.01)  # so that it is read by itself
            connection.sendall(piece)
        return then

    return speak


def connection(tls: ssl.SSLContext | None = None, *, keep_alive_s: float = 4.0, most: int = 1_000_000) -> Connection:
    return Connection(tls, keep_alive_s=keep_alive_s, max_body_bytes=most)


def request(
    server: Loopback,
    method: str = "POST",
    *,
    body: bytes | None = BODY,
    connect_s: float | None = 5.0,
    read_s: float | None = 5.0,
    headers: dict[str, str] | None = None,
) -> httpx.Request:
    timeout = httpx.Timeout(read_s, connect=connect_s).as_dict()
    url = f"{server.url}/agent-execution/a%2Fb/report_task?x=1"
    return httpx.Request(method, url, headers=headers, content=body, extensions={"timeout": timeout})


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met within 10 s"
        await asyncio.sleep(0.01)


async def test_requests_go_over_one_connection_and_answers_come_whole(server: Loopback) -> None:
    async with connection() as link:
        for _ in range(5):
            response = await link.handle_async_request(request(server, headers={"x-api-key": "key"}))
            assert (response.status_code, response.content) == (200, ANSWER)
            assert response.headers["content-type"] == "application/json"
    assert (len(server.requests), server.connections) == (5, 1)
    await until(lambda: not server.open)


async def test_what_is_sent_is_what_httpx_would_send(server: Loopback) -> None:
    for transport in (connection(), httpx.AsyncHTTPTransport()):
        async with transport:
            await (await transport.handle_async_request(request(server, headers={"x-a": "1"}))).aread()
            await (await transport.handle_async_request(request(server, "GET", body=None))).aread()
    ours, theirs = server.requests[:2], server.requests[2:]
    assert ours == theirs


async def test_it_speaks_tls_and_checks_the_name(secure: Loopback) -> None:
    trusting = ssl.create_default_context(cafile=str(CERTIFICATE))
    async with connection(trusting) as link:
        for _ in range(3):
            assert (await link.handle_async_request(request(secure))).content == ANSWER
    assert (len(secure.requests), secure.connections) == (3, 1)
    async with connection(trusting) as link:
        elsewhere = httpx.Request("GET", f"https://localhost:{secure.port}/")
        with pytest.raises(httpx.ConnectError, match="ostname mismatch"):
            await link.handle_async_request(elsewhere)


async def test_a_certificate_that_nobody_vouches_for_is_refused(secure: Loopback) -> None:
    async with connection(ssl.create_default_context()) as link:
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await link.handle_async_request(request(secure))
    assert secure.requests == []


async def test_tls_without_anything_to_check_it_by_is_refused() -> None:
    with pytest.raises(httpx.UnsupportedProtocol):
        await connection().handle_async_request(httpx.Request("GET", "https://127.0.0.1/"))


@pytest.mark.parametrize("tls", [False, True])
async def test_a_large_report_and_a_large_answer_get_through_whole(
    server: Loopback, secure: Loopback, tls: bool
) -> None:
    where = secure if tls else server
    context = ssl.create_default_context(cafile=str(CERTIFICATE)) if tls else None
    answered = b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + b"y" * 3_000_000

    def answer_slowly(connection: socket.socket) -> bool:
        connection.settimeout(10)
        connection.sendall(answered)
        return True

    where.behaviour = answer_slowly
    async with connection(context, most=3_000_000) as link:
        for _ in range(2):
            response = await link.handle_async_request(request(where, body=b"x" * 3_000_000))
            assert response.content == b"y" * 3_000_000
    assert [len(each.partition(b"\r\n\r\n")[2]) for each in where.requests] == [3_000_000] * 2
    assert where.connections == 1


@pytest.mark.parametrize(
    ("pieces", "connections"),
    [
        ([b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 4\r\n\r", b"\nho", b"la"], 1),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r", b"\nho\r\n2\r\nla\r\n0\r\n", b"\r\n"], 1),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhola"], 1),
        ([b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 4\r\n\r\nhola"], 2),
        ([b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nhola"], 2),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhola", b"more than was asked for"], 2),
    ],
)
async def test_answers_of_every_form_are_read_and_the_connection_is_kept_where_it_can_be(
    server: Loopback, pieces: list[bytes], connections: int
) -> None:
    server.behaviour = saying(*pieces)
    async with connection() as link:
        for number in range(2):
            assert (await link.handle_async_request(request(server))).content == b"hola"
            if connections == 2 and number == 0:
                await asyncio.sleep(0.05)  # what comes unasked comes by now
    assert server.connections == connections


async def test_an_answer_that_ends_with_its_connection_is_whole(server: Loopback) -> None:
    server.behaviour = saying(b"HTTP/1.0 200 OK\r\n\r\nho", b"la", then=False)
    async with connection() as link:
        for _ in range(2):
            assert (await link.handle_async_request(request(server))).content == b"hola"
    assert server.connections == 2


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhola"],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhola\r\n"],
        [b"220 mail.example ESMTP\r\n"],
        [b"HTTP/1.1 101 Switching Protocols\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 1000001\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000],
    ],
)
async def test_an_answer_that_is_none_is_an_error_and_the_next_request_has_a_new_connection(
    server: Loopback, pieces: list[bytes]
) -> None:
    server.behaviour = saying(*pieces, then=False)
    async with connection() as link:
        with pytest.raises(httpx.RemoteProtocolError):
            await link.handle_async_request(request(server))
        server.behaviour = answer
        assert (await link.handle_async_request(request(server))).content == ANSWER
    assert (len(server.requests), server.connections) == (2, 2)


async def test_an_answer_in_a_code_that_is_none_is_a_decoding_error(server: Loopback) -> None:
    server.behaviour = saying(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nhola")
    async with connection() as link:
        with pytest.raises(httpx.DecodingError):
            await link.handle_async_request(request(server))


async def test_a_reset_is_an_error_of_the_network(server: Loopback) -> None:
    def reset(connection: socket.socket) -> bool:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return False

    server.behaviour = reset
    async with connection() as link:
        with pytest.raises(httpx.NetworkError, match="reset"):
            await link.handle_async_request(request(server))


async def test_a_refusal_before_the_report_was_read_is_read_and_ends_the_connection() -> None:
    """As servers answer what is too large for them: 413 at once, and the rest is not wanted."""
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = threading.Event()

        def refuse() -> None:
            accepted, _ = listener.accept()
            with accepted:
                accepted.recv(1000)
                accepted.sendall(refusal)
                done.wait(10)

        thread = threading.Thread(target=refuse)
        thread.start()
        loopback = Loopback(listener.getsockname()[1], threading.Event())
        async with connection() as link:
            response = await link.handle_async_request(request(loopback, body=b"x" * 50_000_000))
            assert response.status_code == 413
            assert link._free is None
        done.set()
        thread.join()


async def test_nobody_there_is_an_error_of_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    async with connection() as link:
        with pytest.raises(httpx.ConnectError, match=r"refused|Connect call failed"):
            await link.handle_async_request(httpx.Request("GET", f"http://127.0.0.1:{port}/"))
        with pytest.raises(httpx.ConnectError):
            await link.handle_async_request(httpx.Request("GET", "http://no-such-host.invalid/"))
        with pytest.raises(httpx.ConnectError):  # a label that no resolver takes
            await link.handle_async_request(httpx.Request("GET", f"http://{'a' * 70}.invalid/"))


async def test_a_server_that_never_takes_the_connection_times_out() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:  # fill its queue
            one.setblocking(False)
            one.connect_ex(address)
        loopback = Loopback(address[1], threading.Event())
        with pytest.raises(httpx.ConnectTimeout):
            await connection().handle_async_request(request(loopback, connect_s=0.1))
        for one in waiting:
            one.close()


async def test_a_server_that_never_shakes_hands_times_out(server: Loopback) -> None:
    silent = Loopback(server.port, server.stopping, ssl.create_default_context())
    with pytest.raises(httpx.ConnectTimeout):
        await connection(ssl.create_default_context()).handle_async_request(request(silent, connect_s=0.1))


async def test_silence_ends_a_request_and_every_byte_begins_it_anew(server: Loopback) -> None:
    server.behaviour = lambda connection: server.stopping.wait(5)
    async with connection() as link:
        began = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):
            await link.handle_async_request(request(server, read_s=0.2))
        assert 0.15 < time.monotonic() - began < 4

        def trickle(connection: socket.socket) -> bool:
            for at in range(0, len(WHOLE), len(WHOLE) // 8):
                time.sleep(0.1)
                connection.sendall(WHOLE[at : at + len(WHOLE) // 8])
            return True

        server.behaviour = trickle
        assert (await link.handle_async_request(request(server, read_s=0.4))).content == ANSWER
    server.stopping.set()


async def test_a_server_that_takes_nothing_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel takes the connection, and a little more
        loopback = Loopback(listener.getsockname()[1], threading.Event())
        with pytest.raises(httpx.WriteTimeout):
            await connection().handle_async_request(request(loopback, body=b"x" * 50_000_000, read_s=0.2))


async def test_a_server_that_takes_a_report_slowly_is_waited_for() -> None:
    size = 12_000_000
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def take_slowly() -> None:
            accepted, _ = listener.accept()
            with accepted:
                left = size
                while left > 0:
                    left -= len(accepted.recv(1_000_000))
                    time.sleep(0.02)
                accepted.sendall(WHOLE)

        thread = threading.Thread(target=take_slowly)
        thread.start()
        loopback = Loopback(listener.getsockname()[1], threading.Event())
        async with connection() as link:
            response = await link.handle_async_request(request(loopback, body=b"x" * size, read_s=0.3))
            assert response.content == ANSWER
        thread.join()


async def test_a_connection_that_the_server_closed_meanwhile_is_replaced(server: Loopback) -> None:
    server.behaviour = saying(WHOLE, then=False)
    async with connection() as link:
        await link.handle_async_request(request(server))
        await until(lambda: not server.open)
        await link.handle_async_request(request(server))
    assert (len(server.requests), server.connections) == (2, 2)


async def test_and_also_where_the_loop_has_not_had_the_time_to_see_it(server: Loopback) -> None:
    server.behaviour = saying(WHOLE, then=False)
    async with connection() as link:
        await link.handle_async_request(request(server))
        while server.open:
            time.sleep(0.01)  # the loop must not run
        await link.handle_async_request(request(server))
    assert (len(server.requests), server.connections) == (2, 2)


async def test_an_idle_connection_is_replaced_before_a_server_would_drop_it(server: Loopback) -> None:
    async with connection(keep_alive_s=0.05) as link:
        await link.handle_async_request(request(server))
        await asyncio.sleep(0.1)
        await link.handle_async_request(request(server))
    assert server.connections == 2


async def test_another_address_has_another_connection(server: Loopback) -> None:
    with serve() as other:
        async with connection() as link:
            for where in (server, other, server):
                assert (await link.handle_async_request(request(where))).content == ANSWER
        assert (server.connections, other.connections) == (2, 1)


async def test_two_requests_at_once_do_not_meet(server: Loopback) -> None:
    async with connection() as link:
        responses = await asyncio.gather(*(link.handle_async_request(request(server)) for _ in range(6)))
        assert {response.content for response in responses} == {ANSWER}
    await until(lambda: not server.open)


async def test_a_request_that_is_given_up_gives_its_connection_up(server: Loopback) -> None:
    reached = threading.Event()

    def hang(connection: socket.socket) -> bool:
        reached.set()
        return server.stopping.wait(0.3) and False

    server.behaviour = hang
    async with connection() as link:
        call = asyncio.create_task(link.handle_async_request(request(server)))
        await asyncio.to_thread(reached.wait, 5)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        server.behaviour = answer
        assert (await link.handle_async_request(request(server))).content == ANSWER
    assert server.connections == 2


def test_another_loop_has_another_connection(server: Loopback) -> None:
    link = connection()

    async def once() -> None:
        assert (await link.handle_async_request(request(server))).content == ANSWER
        await link.aclose()

    asyncio.run(once())
    asyncio.run(once())
    assert server.connections == 2


async def test_it_can_be_used_again_after_it_was_closed(server: Loopback) -> None:
    link = connection()
    await link.aclose()
    await link.handle_async_request(request(server))
    await link.aclose()
    await link.handle_async_request(request(server))
    await link.aclose()
    assert server.connections == 2


@pytest.mark.parametrize("value", ["a\r\nX-Other: b", "a\nb", "a\rb"])
async def test_a_header_cannot_smuggle_in_another(server: Loopback, value: str) -> None:
    async with connection() as link:
        with pytest.raises(httpx.LocalProtocolError):
            await link.handle_async_request(request(server, headers={"x-a": value}))
    assert server.requests == []
