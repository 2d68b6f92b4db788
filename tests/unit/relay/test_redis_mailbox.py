"""Asking the relay that leads through Redis, from anywhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.redis_server import RedisServer
from xpander_celery.journal.redis.keys import Keys
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.launch import Launcher
from xpander_celery.relay.mailbox import Request
from xpander_celery.relay.redis_mailbox import RedisMailbox, ask
from xpander_celery.relay.status import RelayLock

KEYS = Keys("destination")


@pytest.fixture
def server(redis_server: RedisServer) -> RedisServer:
    redis_server.client.ask("FLUSHALL")
    redis_server.client.ask("SET", KEYS.lease, "somebody")
    return redis_server


@contextmanager
def serving(server: RedisServer, answer: dict[str, Any]) -> Iterator[list[Request]]:
    """A relay that leads, and gives everybody the same answer."""
    mailbox, seen, is_over = RedisMailbox(server.url, "destination"), list[Request](), threading.Event()

    def serve() -> None:
        while not is_over.wait(0.005):
            for request in mailbox.take():
                seen.append(request)
                mailbox.answer(request, answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()
        mailbox._client.forget()


def test_a_request_is_answered(server: RedisServer) -> None:
    with serving(server, {"jobs": [1, 2]}) as seen:
        answer = ask(server.url, "destination", "list", timeout_s=5, phase="dead", limit=3)
    assert answer == {"jobs": [1, 2]}
    assert [(each.verb, each.arguments) for each in seen] == [("list", {"phase": "dead", "limit": 3})]
    assert 0 < seen[0].expires_at - time.time() <= 5
    assert [name for name in server.client.ask("KEYS", "*") if b"request" in name or b"answer" in name] == []


def test_where_no_relay_leads_nobody_waits(server: RedisServer) -> None:
    server.client.ask("DEL", KEYS.lease)
    began = time.monotonic()
    assert ask(server.url, "destination", "flush", timeout_s=30) is None
    assert time.monotonic() - began < 5
    assert server.client.ask("EXISTS", KEYS.mailbox) == 0


def test_a_relay_that_goes_away_meanwhile_is_not_waited_for(server: RedisServer) -> None:
    server.client.ask("PEXPIRE", KEYS.lease, 100)
    began = time.monotonic()
    assert ask(server.url, "destination", "flush", timeout_s=30) is None
    assert time.monotonic() - began < 5


def test_a_request_that_nobody_waits_for_any_more_is_not_taken(server: RedisServer) -> None:
    assert ask(server.url, "destination", "flush", timeout_s=0.1) is None
    mailbox = RedisMailbox(server.url, "destination")
    assert list(mailbox.take()) == []
    assert server.client.ask("EXISTS", KEYS.mailbox) == 0
    mailbox._client.forget()


def test_while_redis_is_away_nobody_asks_and_nobody_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    url = "redis://:hunter2@127.0.0.1:1/0"
    mailbox = RedisMailbox(url, "destination")
    for _ in range(3):
        assert list(mailbox.take()) == []
    mailbox.answer(Request("id", "flush", {}, 0.0), {})
    assert ask(url, "destination", "flush", timeout_s=1) is None
    assert len(caplog.records) == 2
    assert "hunter2" not in caplog.text


def config(server: RedisServer, directory: Path) -> RelayConfig:
    return RelayConfig(directory / "destination", journal=server.url)


NO_PROCESS = ("false",)


def test_to_flush_asks_the_relay_that_leads_wherever_it_runs(server: RedisServer, tmp_path: Path) -> None:
    with serving(server, {"drained": True}):
        assert Launcher(config(server, tmp_path), command=NO_PROCESS).flush(5)


def test_to_flush_beside_a_relay_that_stands_by_waits_for_one_that_leads(server: RedisServer, tmp_path: Path) -> None:
    server.client.ask("DEL", KEYS.lease)
    here = config(server, tmp_path)
    here.directory.mkdir()
    lock = RelayLock.acquire(here.directory)
    assert lock is not None
    began = time.monotonic()
    assert not Launcher(here, command=NO_PROCESS).flush(0.5)
    assert time.monotonic() - began >= 0.5
    lock.release()
    assert list(here.directory.glob("relay.log")) == []  # nothing was executed


def test_to_flush_where_no_relay_runs_anywhere_runs_one_here(server: RedisServer, tmp_path: Path) -> None:
    server.client.ask("DEL", KEYS.lease)
    here = config(server, tmp_path)
    assert Launcher(here, command=("true",)).flush(5)
    assert (here.directory / "relay.log").exists()
