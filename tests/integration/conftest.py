"""What integration tests share: one broker for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import jobs
from tests.support.broker import Broker, start_redis


@pytest.fixture(autouse=True)
def _instrumented_sender() -> None:
    """This process sends the jobs, as an instrumented app does; a test before may have taken that back."""
    jobs.instrument()


@pytest.fixture(scope="session")
def redis_broker() -> Iterator[Broker]:
    with start_redis() as broker:
        yield broker
