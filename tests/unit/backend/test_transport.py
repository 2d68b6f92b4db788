"""Connections as they really are: loopback sockets, threads, loops and forks."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from xpander_celery import errors
from xpander_celery.backend import Backend, Configuration
from xpander_celery.backend import transport as transport_module

from .loopback import WHOLE, Loopback, answer, serve


@pytest.fixture
def server() -> Iterator[Loopback]:
    with serve() as running:
        yield running


def backend_of(server: Loopback, **options: object) -> Backend:
    return Backend(Configuration("key-1", base_url=server.url, agent_id="agent-1"), **options)  # type: ignore[arg-type]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met within 10 s"
        time.sleep(0.01)


def test_synchronous_calls_share_one_connection(server: Loopback) -> None:
    with backend_of(server) as backend:
        for _ in range(5):
            backend.report_external_task()
    assert (len(server.requests), server.connections) == (5, 1)
    wait_until(lambda: not server.open)


async def test_asynchronous_calls_share_one_connection(server: Loopback) -> None:
    async with backend_of(server) as backend:
        for _ in range(5):
            await backend.areport_external_task()
    assert (len(server.requests), server.connections) == (5, 1)
    wait_until(lambda: not server.open)


def test_a_loop_that_ends_closes_its_connections(server: Loopback) -> None:
    backend = backend_of(server)
    for _ in range(3):
        assert asyncio.run(backend.areport_external_task()).id == "job-1"
        wait_until(lambda: not server.open)
    gc.collect()  # a connection that was left open would be a ResourceWarning, which is an error here
    assert server.connections == 3


async def test_a_backend_that_is_forgotten_closes_its_connections(server: Loopback) -> None:
    backend = backend_of(server)
    await backend.areport_external_task()
    del backend
    gc.collect()
    for _ in range(100):
        if not server.open:
            break
        await asyncio.sleep(0.02)
    assert not server.open


def test_calls_of_several_loops_and_threads_do_not_meet(server: Loopback) -> None:
    with backend_of(server, max_connections=4) as backend, ThreadPoolExecutor(8) as threads:
        synchronous = [threads.submit(backend.report_external_task, id=f"s{n}") for n in range(20)]
        loops = [threads.submit(lambda n=n: asyncio.run(backend.areport_external_task(id=f"a{n}"))) for n in range(20)]
        assert {future.result().id for future in synchronous + loops} == {"job-1"}
    assert len(server.requests) == 40


async def test_a_synchronous_call_inside_a_running_loop_uses_no_loop(server: Loopback) -> None:
    with backend_of(server) as backend:
        before = asyncio.all_tasks()
        assert backend.report_external_task().id == "job-1"
        assert asyncio.all_tasks() == before


def test_at_most_so_many_connections_are_opened(server: Loopback) -> None:
    async def many() -> None:
        async with backend_of(server, max_connections=2) as backend:
            await asyncio.gather(*(backend.areport_external_task() for _ in range(20)))

    asyncio.run(many())
    assert len(server.requests) == 20
    assert server.connections <= 2


def test_a_forked_child_opens_its_own_connection(server: Loopback) -> None:
    with backend_of(server) as backend:
        backend.report_external_task(id="parent-1")
        child = os.fork()
        if child == 0:
            try:
                backend.report_external_task(id="child")
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        backend.report_external_task(id="parent-2")
    assert server.connections == 2
    assert [request.count(b'"id":"child"') for request in server.requests] == [0, 1, 0]


def test_a_connection_that_the_server_closed_meanwhile_is_replaced(server: Loopback) -> None:
    def answer_and_close(connection: socket.socket) -> bool:
        connection.sendall(WHOLE)
        return False

    server.behaviour = answer_and_close
    with backend_of(server) as backend:
        backend.report_external_task()
        wait_until(lambda: not server.open)
        backend.report_external_task()
    assert server.connections == 2


def test_a_refused_connection_is_a_network_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    backend = Backend(Configuration("k", base_url=f"http://127.0.0.1:{port}"))
    with pytest.raises(errors.NetworkError, match="ConnectError") as caught:
        backend.report_external_task("agent-1")
    assert caught.value.__cause__ is not None
    with pytest.raises(errors.NetworkError, match="ConnectError"):
        asyncio.run(backend.areport_external_task("agent-1"))


def test_a_lost_reply_is_a_network_error(server: Loopback) -> None:
    server.behaviour = lambda connection: False
    with backend_of(server) as backend, pytest.raises(errors.NetworkError, match="RemoteProtocolError"):
        backend.report_external_task()
    assert len(server.requests) == 1, "it is not sent twice"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_platform_that_never_answers_is_given_up(server: Loopback, asynchronous: bool) -> None:
    server.behaviour = lambda connection: server.stopping.wait(5)
    backend = backend_of(server, read_timeout_s=0.1)
    with pytest.raises(errors.NetworkError, match="ReadTimeout"):
        asyncio.run(backend.areport_external_task()) if asynchronous else backend.report_external_task()
    server.stopping.set()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_platform_that_trickles_is_given_up_at_the_total_deadline(server: Loopback, asynchronous: bool) -> None:
    def trickle(connection: socket.socket) -> bool:
        connection.sendall(WHOLE[: WHOLE.index(b"{") + 1])
        while not server.stopping.wait(0.05):
            connection.sendall(b" ")
        return False

    server.behaviour = trickle
    backend = backend_of(server, total_timeout_s=0.3)
    started = time.monotonic()
    with pytest.raises(errors.NetworkError, match="Timeout"):
        asyncio.run(backend.areport_external_task()) if asynchronous else backend.report_external_task()
    assert 0.2 < time.monotonic() - started < 5


@pytest.mark.parametrize("asynchronous", [True, False])
def test_waiting_for_a_task_ends_in_time_though_the_platform_never_answers(
    server: Loopback, asynchronous: bool
) -> None:
    server.behaviour = lambda connection: server.stopping.wait(10)
    backend = backend_of(server)
    started = time.monotonic()
    with pytest.raises(errors.TaskNotEndedError):
        asyncio.run(backend.await_task("job-1", 0.1)) if asynchronous else backend.wait_for_task("job-1", 0.1)
    assert time.monotonic() - started < 5
    server.stopping.set()


def test_a_connection_in_which_a_call_was_interrupted_is_not_used_again(
    server: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what a signal's handler raises, such as a soft time limit: httpx's pool may be locked, or busy for ever."""
    used: list[httpx.HTTPTransport] = []
    send = httpx.HTTPTransport.handle_request

    def interrupted_once(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        used.append(self)
        if len(used) == 1:
            raise SoftTimeLimitExceeded
        return send(self, request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", interrupted_once)
    with backend_of(server, max_connections=1, read_timeout_s=2) as backend:
        with pytest.raises(SoftTimeLimitExceeded):
            backend.report_external_task()
        assert backend.report_external_task().id == "job-1"
        assert backend.report_external_task().id == "job-1"
    assert used[0] is not used[1]
    assert used[1] is used[2]


def test_loops_that_were_closed_are_not_kept(server: Loopback) -> None:
    backend = backend_of(server)
    loops = weakref.WeakSet[asyncio.AbstractEventLoop]()
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # as users who end them so are told
        for _ in range(5):
            loop = asyncio.new_event_loop()
            loops.add(loop)
            assert loop.run_until_complete(backend.areport_external_task()).id == "job-1"
            loop.close()
        del loop
        asyncio.run(backend.areport_external_task())
        gc.collect()
        assert len(loops) == 0
        wait_until(lambda: not server.open)


async def test_a_cancelled_call_stays_cancelled_and_the_next_one_works(server: Loopback) -> None:
    reached = threading.Event()

    def hang(connection: socket.socket) -> bool:
        reached.set()
        return server.stopping.wait(0.5) and False

    server.behaviour = hang
    async with backend_of(server) as backend:
        call = asyncio.create_task(backend.areport_external_task())
        await asyncio.to_thread(reached.wait, 5)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        server.behaviour = answer
        assert (await backend.areport_external_task()).id == "job-1"


def test_an_endless_answer_is_refused(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "MAX_ANSWER_BYTES", 50)
    backend = backend_of(server)
    with pytest.raises(errors.ProtocolError, match="50 bytes"):
        backend.report_external_task()
    with pytest.raises(errors.ProtocolError, match="50 bytes"):
        asyncio.run(backend.areport_external_task())


def test_what_is_no_http_is_a_network_error(server: Loopback) -> None:
    def speak_otherwise(connection: socket.socket) -> bool:
        connection.sendall(b"220 mail.example ESMTP\r\n")
        return False

    server.behaviour = speak_otherwise
    with backend_of(server) as backend, pytest.raises(errors.NetworkError, match="RemoteProtocolError"):
        backend.report_external_task()


def test_the_wire_carries_what_the_platform_expects(server: Loopback) -> None:
    with backend_of(server) as backend:
        backend.report_external_task(agent_id="a/b", id="ü")
    [request] = server.requests
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert head.startswith(b"POST /agent-execution/a%2Fb/report_task HTTP/1.1")
    assert {"x-api-key: key-1", "content-type: application/json", f"content-length: {len(body)}"} <= set(lines)
    assert f"host: 127.0.0.1:{server.port}" in lines
    assert not [line for line in lines if line.startswith(("cookie", "authorization", "transfer-encoding"))]


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_the_environments_proxy_is_used(server: Loopback, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, server.url.removeprefix("http://"))
    with Backend(Configuration("k", base_url="http://platform.invalid")) as backend:
        assert backend.report_external_task("agent-1").id == "job-1"
    assert server.requests[0].startswith(b"POST http://platform.invalid/agent-execution/agent-1/report_task")


def test_no_proxy_is_honoured(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with backend_of(server) as backend:
        assert backend.report_external_task().id == "job-1"


@pytest.mark.parametrize("proxy", ["ftp://proxy", "http://proxy:port", "socks5://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used_is_refused_naming_the_variable(
    monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(errors.ConfigurationError, match="HTTP_PROXY"):
        Backend(Configuration("k", base_url="http://platform.invalid")).report_external_task("agent-1")


def test_certificates_that_cannot_be_read_are_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> object:  # as where SSL_CERT_FILE names no file; older releases of httpx ignore that
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(httpx, "create_ssl_context", unreadable)
    backend = Backend(Configuration("key-1", base_url="https://127.0.0.1:1", agent_id="agent-1"))
    with pytest.raises(errors.ConfigurationError, match="SSL_CERT_FILE"):
        backend.report_external_task()
    with pytest.raises(errors.ConfigurationError, match="SSL_CERT_FILE"):
        asyncio.run(backend.areport_external_task())


@pytest.mark.parametrize("host", ["a..b", ".", "a" * 70])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_name_that_the_resolver_cannot_take_is_an_error_of_ours(host: str, asynchronous: bool) -> None:
    backend = Backend(Configuration("key-1", base_url=f"http://{host}", agent_id="agent-1"))
    with pytest.raises(errors.XpanderCeleryError):
        asyncio.run(backend.areport_external_task()) if asynchronous else backend.report_external_task()


def test_an_address_that_no_resolver_can_take_is_a_configuration_error() -> None:
    backend = Backend(Configuration("k", base_url="https://xn--.example"))
    with pytest.raises(errors.ConfigurationError, match="XPANDER_BASE_URL"):
        backend.report_external_task("agent-1")
