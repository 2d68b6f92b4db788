"""What integration tests share: one broker for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.broker import Broker, start_redis


@pytest.fixture(scope="session")
def redis_broker() -> Iterator[Broker]:
    with start_redis() as broker:
        yield broker
