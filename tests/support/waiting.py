"""Wait for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(
    condition: Callable[[], T], *, timeout_s: float = 60.0, what: str = "the condition", every_s: float = 0.02
) -> T:
    """The first truthy value of `condition()`; AssertionError with `what` where none comes in time."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {timeout_s} s"
        time.sleep(every_s)
    return value
