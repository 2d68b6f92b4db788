"""One stack for all tests: images and containers take a while."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.compose.stack import Stack


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The running stack. Whatever happens, nothing of it stays; after a failure its logs are printed."""
    running = Stack()
    running.down()  # what a killed run left
    try:
        running.up()
        yield running
    finally:
        if request.session.testsfailed:
            print(running.logs())
        running.down()
        assert running.left_overs() == []
