"""What the tests of the Redis journal share: a clock that stands still, an empty server, keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.journal import LeadingReader
from tests.support.redis_server import RedisServer
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.redis.keys import Keys
from xpander_celery.journal.redis.reader import RedisReader
from xpander_celery.journal.redis.writer import RedisJournal


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys() -> Keys:
    return Keys("destination")


@pytest.fixture
def server(redis_server: RedisServer) -> RedisServer:
    redis_server.client.ask("FLUSHALL")
    redis_server.client.ask("CONFIG", "SET", "maxmemory", "0")
    redis_server.client.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    redis_server.client.ask("CONFIG", "SET", "appendonly", "no")
    return redis_server


@pytest.fixture
def make_journal(server: RedisServer, tmp_path: Path, clock: Clock) -> Iterator[Callable[..., RedisJournal]]:
    made: list[RedisJournal] = []

    def make(directory: Path = tmp_path / "spill", *, url: str = server.url, max_bytes: int = 1024**3) -> RedisJournal:
        spill = FileJournal(directory, required=False, clock=clock)
        made.append(RedisJournal(url, "destination", spill=spill, max_bytes=max_bytes, clock=clock))
        return made[-1]

    yield make
    for journal in made:
        journal.close()


@pytest.fixture
def reader(server: RedisServer, clock: Clock) -> Iterator[RedisReader]:
    reader = LeadingReader(server.url, "destination", clock=clock)
    yield reader
    reader.close()
