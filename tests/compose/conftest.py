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
        try:
            running.up()
        except AssertionError:
            print(running.logs())
            raise
        yield running
        if request.session.testsfailed:
            print(running.logs())
    finally:
        running.down()
    assert running.left_overs() == []
