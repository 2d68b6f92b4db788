"""The contract suite runs where the official client is installed: `make contract`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.support.sandbox import Sandbox, start_sandbox

from .capture import Capture, serve

if importlib.util.find_spec("xpander_sdk") is None:
    raise pytest.UsageError("The official client is not installed here. Run this suite with: make contract")


@pytest.fixture(scope="session")
def capture() -> Iterator[Capture]:
    with serve() as running:
        yield running


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    with start_sandbox() as running:
        yield running


@pytest.fixture(autouse=True)
def quiet_and_uncached() -> None:
    """The official client logs much, and caches what it read of an agent for some seconds."""
    from loguru import logger
    from xpander_sdk.utils.cache import agent_payload_cache, backend_config_cache

    logger.remove()
    agent_payload_cache.invalidate()
    backend_config_cache.invalidate()
