"""A platform that misbehaves, over real HTTP, while the relay's clock is ours. The numbers are those of the table."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support.relay import RelayHouse, SentThrough
from tests.support.sandbox import Sandbox, start_sandbox
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.policy import Flow
from xpander_celery.relay.rows import Phase
from xpander_celery.relay.targets import make_targets

AGENT = "agent"
TLS = Path(__file__).parents[1] / "support" / "tls"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with start_sandbox() as sandbox:
        yield sandbox


@pytest.fixture(autouse=True)
def _clean(sandbox: Sandbox) -> None:
    sandbox.set_faults()
    sandbox.clear_requests()
    sandbox.clear_records()


@asynccontextmanager
async def relaying(
    directory: Path, url: str, key: str, **settings: Any
) -> AsyncIterator[tuple[RelayHouse, SentThrough]]:
    """A relay in this process with the real client, and what it sent when."""
    config = RelayConfig(directory, api_key=key, base_url=url, **settings)
    through = SentThrough(make_targets(config))
    async with RelayHouse(directory, targets=through, **settings) as house:
        through.now = house.clock.now
        yield house, through


@pytest.fixture
async def relayed(sandbox: Sandbox, tmp_path: Path) -> AsyncIterator[tuple[RelayHouse, SentThrough]]:
    async with relaying(tmp_path, sandbox.url, sandbox.api_key) as both:
        yield both


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def most_in_a_minute(times: list[float]) -> int:
    return max((sum(first <= at < first + 60 for at in times) for first in times), default=0)


@pytest.mark.fault(13)
async def test_13_an_outage_of_six_hours_costs_a_request_a_minute_kills_nothing_and_drains_at_the_rate_limit(
    tmp_path: Path,
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with relaying(tmp_path, url, "sandbox-key-for-tests", rate_limit_per_minute=120) as (house, through):
        began = house.clock.now()
        ids = {house.job() for _ in range(500)}
        await house.go_on(6 * 3600, step_s=10)
        later = [at for at in through.times if at > began + 180]
        assert later
        assert min(b - a for a, b in pairwise(later)) >= 60
        assert len(through.times) <= 6 * 60 + 15
        assert house.index.count(Phase.DEAD) == 0
        assert house.index.count(Phase.DUE) == 500
        through.times.clear()
        with start_sandbox(port=port) as sandbox:
            await house.go_on(900, step_s=1)
            assert {record["id"] for record in sandbox.records(AGENT)} == ids
            assert set(sandbox.posts_by_id().values()) == {1}
        assert most_in_a_minute(through.times) <= 120
        assert house.index.count(Phase.DUE) == 0


@pytest.mark.fault(13)
async def test_13_a_single_report_in_an_outage_is_no_reason_to_ask_more_often(tmp_path: Path) -> None:
    async with relaying(tmp_path, f"http://127.0.0.1:{free_port()}", "key") as (house, through):
        began = house.clock.now()
        house.job()
        await house.go_on(3 * 3600, step_s=5)
        later = [at for at in through.times if at > began + 180]
        assert min(b - a for a, b in pairwise(later)) >= 60
        assert max(b - a for a, b in pairwise(later)) <= 310
        assert house.index.count(Phase.DEAD) == 0


@pytest.mark.fault(14)
async def test_14_a_platform_that_never_answers_times_out_and_is_left_alone(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.set_faults({"drop": "hang"})
    async with relaying(tmp_path, sandbox.url, sandbox.api_key, read_timeout_s=0.2, total_timeout_s=0.5) as (house, _):
        ids = {house.job() for _ in range(20)}
        began = time.monotonic()
        appended = house.journal.counters.durable
        house.job("while it hangs")
        assert time.monotonic() - began < 0.1
        assert house.journal.counters.durable == appended + 2
        await house.settle()
        assert house.relay.gate.flow is Flow.BROKEN
        assert house.index.count(Phase.DUE) == 21
        sandbox.set_faults()
        await house.go_on(400, step_s=5)
        assert ids <= {record["id"] for record in sandbox.records(AGENT)}


@pytest.mark.fault(15)
async def test_15_a_reply_that_is_lost_leads_to_a_second_post_and_one_record(
    sandbox: Sandbox, relayed: tuple[RelayHouse, SentThrough]
) -> None:
    house, _ = relayed
    sandbox.set_faults({"drop": "reply", "method": "POST", "count": 1})
    job_id = house.job()
    await house.go_on(10)
    assert sandbox.posts_by_id() == {job_id: 2}
    assert [record["id"] for record in sandbox.records(AGENT)] == [job_id]
    assert house.phase(job_id) is Phase.SETTLED


@pytest.mark.parametrize("form", ["seconds", "date"])
@pytest.mark.fault(16)
async def test_16_after_a_429_nothing_is_sent_for_as_long_as_the_platform_asks(
    sandbox: Sandbox, relayed: tuple[RelayHouse, SentThrough], form: str
) -> None:
    house, through = relayed
    asked = "120" if form == "seconds" else formatdate(house.clock.wall() + 120, usegmt=True)
    sandbox.set_faults({"status": 429, "headers": {"Retry-After": asked}, "count": 8})
    ids = {house.job() for _ in range(50)}
    began = house.clock.now()
    await house.settle()
    assert house.relay.gate.flow is Flow.THROTTLED
    await house.go_on(30)
    await house.restart()  # the promise to wait outlives the relay
    await house.go_on(200)
    before = [at for at in through.times if at < began + 119]
    assert len(before) <= 8
    assert max(before) - began < 1
    assert {record["id"] for record in sandbox.records(AGENT)} == ids
    assert house.index.count(Phase.DEAD) == 0


@pytest.mark.parametrize(
    ("asked", "silence_s"), [("1000000000", 3600), ("soon", 0), ("-17", 0), ("Wed, 99 Foo 2026 99:99:99 GMT", 0)]
)
@pytest.mark.fault(17)
async def test_17_an_absurd_retry_after_is_clamped_or_ignored(
    sandbox: Sandbox, relayed: tuple[RelayHouse, SentThrough], asked: str, silence_s: float
) -> None:
    house, through = relayed
    sandbox.set_faults({"status": 429, "headers": {"Retry-After": asked}, "count": 1})
    house.job("a")
    began = house.clock.now()
    await house.go_on(3700, step_s=10)
    assert len(through.times) == 2
    assert silence_s <= through.times[1] - began <= silence_s + 20
    assert sandbox.record("a") is not None


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.fault(18)
async def test_18_a_refused_report_is_dead_after_one_attempt_and_the_rest_is_unaffected(
    sandbox: Sandbox, relayed: tuple[RelayHouse, SentThrough], status: int
) -> None:
    house, _ = relayed
    sandbox.set_faults({"status": status, "id": "bad"})
    good = {house.job() for _ in range(20)}
    house.job("bad")
    good |= {house.job() for _ in range(20)}
    await house.go_on(3600, step_s=60)
    assert sandbox.posts_by_id() == dict.fromkeys(good, 1) | {"bad": 1}
    assert house.phase("bad") is Phase.DEAD
    assert f"HTTP {status}" in str(house.row("bad").reason)
    assert {record["id"] for record in sandbox.records(AGENT)} == good
    assert house.relay.gate.flow is Flow.FLOWING


@pytest.mark.fault(19)
async def test_19_a_report_that_alone_fails_is_dead_at_twelve_and_the_breaker_stays_closed(
    sandbox: Sandbox, relayed: tuple[RelayHouse, SentThrough]
) -> None:
    house, _ = relayed
    sandbox.set_faults({"status": 500, "id": "bad"})
    good = {house.job()}
    await house.settle()
    house.job("bad")
    for _ in range(400):
        good.add(house.job())
        await house.go_on(10, step_s=5)
        assert house.relay.gate.flow is Flow.FLOWING
        if house.phase("bad") is Phase.DEAD:
            break
    assert house.phase("bad") is Phase.DEAD
    assert sandbox.posts_by_id()["bad"] == 12
    assert "12 times" in str(house.row("bad").reason)
    assert {record["id"] for record in sandbox.records(AGENT)} == good


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.fault(20)
async def test_20_a_key_that_is_revoked_for_two_hours_pauses_delivery_and_kills_nothing(
    sandbox: Sandbox, relayed: tuple[RelayHouse, SentThrough], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    house, through = relayed
    sandbox.set_faults({"status": status})
    ids = {house.job() for _ in range(100)}
    await house.go_on(2 * 3600, step_s=5)
    assert house.relay.gate.flow is Flow.PAUSED
    assert len(through.times) <= 8 + 120
    assert min(b - a for a, b in pairwise(through.times[8:])) >= 60
    assert house.index.count(Phase.DEAD) == 0
    assert all(house.row(job_id).attempts == 0 for job_id in ids)
    assert caplog.text.count("XPANDER_API_KEY") == 1
    sandbox.set_faults()
    await house.go_on(400, step_s=1)
    assert {record["id"] for record in sandbox.records(AGENT)} == ids
    assert caplog.text.count("takes reports again") == 1


@pytest.mark.parametrize("jump_s", [3600, -3600])
@pytest.mark.fault(30)
async def test_30_when_the_clock_jumps_there_is_neither_a_storm_nor_a_stall(
    sandbox: Sandbox, relayed: tuple[RelayHouse, SentThrough], jump_s: float
) -> None:
    house, through = relayed
    sandbox.set_faults({"status": 503})
    waiting = {house.job() for _ in range(50)}
    await house.go_on(600, step_s=5)
    sent_before = len(through.times)
    house.clock.jump(jump_s)
    await house.go_on(600, step_s=5)
    assert len(through.times) - sent_before <= 11
    sandbox.set_faults()
    through.times.clear()
    began = house.clock.now()
    house.job("after")
    await house.go_on(400, step_s=1)
    assert {record["id"] for record in sandbox.records(AGENT)} == waiting | {"after"}
    assert max(through.times) - began <= 400


@pytest.mark.parametrize("jump_s", [3600, -3600])
@pytest.mark.fault(30)
async def test_30_nor_when_it_jumped_while_no_relay_ran(sandbox: Sandbox, tmp_path: Path, jump_s: float) -> None:
    async with relaying(tmp_path, sandbox.url, sandbox.api_key) as (house, through):
        sandbox.set_faults({"status": 503})
        waiting = {house.job() for _ in range(50)}
        await house.go_on(600, step_s=5)
        await house.die()
        house.clock.advance(jump_s)  # a relay takes its time from the time of day when it starts
        through.times.clear()
        house.start()
        await house.go_on(120, step_s=5)
        assert len(through.times) <= 8
        sandbox.set_faults()
        await house.go_on(400, step_s=1)
        assert {record["id"] for record in sandbox.records(AGENT)} == waiting


@pytest.mark.fault(31)
async def test_31_a_stale_connection_is_noticed_and_costs_nothing(
    sandbox: Sandbox, relayed: tuple[RelayHouse, SentThrough]
) -> None:
    house, _ = relayed
    house.job("first")
    await house.settle()
    sandbox.set_faults({"drop": "request", "method": "POST", "count": 3})
    ids = {house.job() for _ in range(20)}
    await house.go_on(60)
    assert ids <= {record["id"] for record in sandbox.records(AGENT)}
    assert house.index.count(Phase.DEAD) == 0


@pytest.mark.fault(31)
async def test_31_connections_that_the_platform_drops_when_they_are_idle_cost_no_second_request(tmp_path: Path) -> None:
    """As load balancers do, without a word in the answer before."""
    with closing_after_each_answer() as (port, taken):
        async with relaying(tmp_path, f"http://127.0.0.1:{port}", "key") as (house, through):
            ids = set()
            for _ in range(10):
                ids |= {house.job() for _ in range(8)}
                await house.settle()
                time.sleep(0.02)  # the connections end while the loop does not look
            assert house.index.count(Phase.SETTLED) == 80
            assert len(through.times) == 80
            assert len(taken) == 80
            assert house.index.counters["retried"] == 0


@pytest.mark.fault(31)
async def test_31_a_name_that_does_not_resolve_uses_no_attempt(tmp_path: Path) -> None:
    async with relaying(tmp_path, "http://no-such-host.invalid", "key") as (house, through):
        ids = [house.job() for _ in range(10)]
        await house.go_on(3600, step_s=10)
        assert len(through.times) > 10
        assert {(house.row(job_id).phase, house.row(job_id).attempts) for job_id in ids} == {(Phase.DUE, 0)}


@pytest.mark.fault(31)
@pytest.mark.parametrize("server", ["untrusted", "not_tls"])
async def test_31_a_certificate_that_nobody_trusts_uses_no_attempt(tmp_path: Path, server: str) -> None:
    with refusing_handshakes(with_certificate=server == "untrusted") as port:
        async with relaying(tmp_path, f"https://127.0.0.1:{port}", "key") as (house, through):
            ids = [house.job() for _ in range(10)]
            await house.go_on(1200, step_s=10)
            assert len(through.times) > 10
            assert {(house.row(job_id).phase, house.row(job_id).attempts) for job_id in ids} == {(Phase.DUE, 0)}
            reason = str(house.row(ids[0]).reason)
            assert ("CERTIFICATE_VERIFY_FAILED" if server == "untrusted" else "SSL") in reason


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.fault(33)
async def test_33_a_redirect_is_not_followed_and_pauses_delivery_with_one_clear_line(
    sandbox: Sandbox, relayed: tuple[RelayHouse, SentThrough], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    house, through = relayed
    sandbox.set_faults({"status": status, "headers": {"Location": f"{sandbox.url}/elsewhere"}})
    job_id = house.job()
    await house.go_on(600, step_s=5)
    assert house.relay.gate.flow is Flow.PAUSED
    assert {request["path"] for request in sandbox.requests()} == {f"/agent-execution/{AGENT}/report_task"}
    assert len(through.times) <= 11
    assert house.phase(job_id) is Phase.DUE
    assert sum("XPANDER_BASE_URL" in record.getMessage() for record in caplog.records) == 1
    sandbox.set_faults()
    await house.go_on(120, step_s=1)
    assert sandbox.record(job_id) is not None


@contextmanager
def serving(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that gives each connection to `serve`, one after the other, and then closes it."""

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                serve(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def refusing_handshakes(*, with_certificate: bool) -> Iterator[int]:
    """A server that speaks TLS with a certificate that it signed itself; or none at all, where TLS is expected."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "certificate.pem", TLS / "key.pem")

    def serve(connection: socket.socket) -> None:
        if with_certificate:
            context.wrap_socket(connection, server_side=True).close()
        else:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with serving(serve) as port:
        yield port


@contextmanager
def closing_after_each_answer() -> Iterator[tuple[int, list[bytes]]]:
    """A platform that says nothing of it, but closes each connection when it has answered; and what it took."""
    taken: list[bytes] = []
    body = b'{"id":"a"}'

    def serve(connection: socket.socket) -> None:
        with connection.makefile("rb") as file:
            size = 0
            while (line := file.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    size = int(line.split(b":")[1])
            if size:
                taken.append(file.read(size))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    with serving(serve) as port:
        yield port, taken
