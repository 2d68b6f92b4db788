"""Nothing of ours raises into a job, and a soft time limit reaches it all the same."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

import pytest
from billiard.exceptions import SoftTimeLimitExceeded

from tests.support.waiting import until
from xpander_celery.guard import Guard, guarded, guarded_in_job


class Hooked:
    def __init__(self) -> None:
        self.now = 0.0
        self.guard = Guard(clock=lambda: self.now)
        self.calls = 0

    @guarded
    def fails(self) -> str:
        raise KeyError("in a hook")

    @guarded
    def works(self) -> str:
        return "done"

    @guarded_in_job
    def is_interrupted_once(self) -> str:
        self.calls += 1
        if self.calls == 1:
            raise SoftTimeLimitExceeded
        return "done"

    @guarded
    def is_interrupted_after_the_body(self) -> str:
        return str(Hooked.is_interrupted_once.__wrapped__(self))  # type: ignore[attr-defined]

    @guarded
    def leaves(self) -> None:
        raise SystemExit(1)


def test_a_failure_is_counted_and_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "xpander_celery.guard")
    hooked = Hooked()
    for seconds in (0, 1, 59, 61):
        hooked.now = seconds
        hooked.fails()
    assert hooked.guard.failures == {"Hooked.fails": 4}
    assert [record.__dict__["hook"] for record in caplog.records] == ["Hooked.fails"] * 2


def test_what_works_gives_its_result() -> None:
    assert Hooked().works() == "done"


def test_what_is_no_exception_passes_through() -> None:
    with pytest.raises(SystemExit):
        Hooked().leaves()


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The soft time limits that were raised, by a handler as billiard sets it."""
    raised: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        raised.append(number)

    before = signal.signal(signal.SIGUSR1, handler)
    yield raised  # type: ignore[misc]
    signal.signal(signal.SIGUSR1, before)


def test_a_soft_limit_that_hits_a_hook_lets_it_finish_and_is_raised_again(limits: list[int]) -> None:
    hooked = Hooked()
    assert hooked.is_interrupted_once() == "done"
    assert until(lambda: limits, what="the limit, raised again") == [signal.SIGUSR1]


def test_a_soft_limit_after_the_body_is_not_raised_again(limits: list[int]) -> None:
    hooked = Hooked()
    assert hooked.is_interrupted_after_the_body() == "done"
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    assert limits == []


def test_without_a_handler_no_signal_is_sent() -> None:
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert Hooked().is_interrupted_once() == "done"
