"""Nothing of ours raises into a job, and a soft time limit reaches it all the same."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
from billiard.exceptions import SoftTimeLimitExceeded
from celery import Celery, signals

from tests.support.waiting import until
from xpander_celery import guard as guard_module
from xpander_celery.guard import Guard, guarded, guarded_in_job


class Hooked:
    def __init__(self) -> None:
        self.now = 0.0
        self.guard = Guard(clock=lambda: self.now)
        self.calls = 0

    @guarded
    def fails(self) -> str:
        raise KeyError("in a hook")

    @guarded_in_job
    def fails_in_a_job(self) -> str:
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


def test_a_handler_of_the_log_that_raises_does_not_reach_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("no space left")

    monkeypatch.setattr(logging.getLogger("xpander_celery.guard"), "handlers", [Broken()])
    hooked = Hooked()
    assert hooked.fails() is None
    assert hooked.guard.failures == {"Hooked.fails": 1}


def test_a_soft_limit_that_hits_the_log_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise SoftTimeLimitExceeded

    again: list[bool] = []
    monkeypatch.setattr(guard_module, "_raise_limit_again", lambda: again.append(True))
    monkeypatch.setattr(logging.getLogger("xpander_celery.guard"), "handlers", [Slow()])
    assert Hooked().fails_in_a_job() is None
    assert again == [True]


def test_what_works_gives_its_result() -> None:
    assert Hooked().works() == "done"


def test_what_is_no_exception_passes_through() -> None:
    with pytest.raises(SystemExit):
        Hooked().leaves()


@pytest.fixture
def limits() -> Iterator[list[int]]:
    """The soft time limits that were raised, by a handler as billiard sets it."""
    raised: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        raised.append(number)
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGUSR1, handler)
    yield raised
    signal.signal(signal.SIGUSR1, before)


def wait_for_limit() -> str:
    try:
        return until(lambda: "", timeout_s=20)
    except SoftTimeLimitExceeded:
        return "the limit arrived"


def test_a_soft_limit_that_hits_a_hook_lets_it_finish_and_reaches_the_body(app: Celery, limits: list[int]) -> None:
    hooked = Hooked()

    @app.task
    def work() -> str:
        assert hooked.is_interrupted_once() == "done"
        return wait_for_limit()

    assert work.apply().get() == "the limit arrived"
    assert limits == [signal.SIGUSR1]


def test_a_soft_limit_that_hits_before_the_body_waits_for_it(app: Celery, limits: list[int]) -> None:
    hooked = Hooked()

    def prerun(**_: Any) -> None:
        hooked.is_interrupted_once()
        time.sleep(0.1)  # in the dispatch, which would swallow it

    signals.task_prerun.connect(prerun, weak=False, dispatch_uid="test")

    @app.task
    def work() -> str:
        return wait_for_limit()

    try:
        assert work.apply().get() == "the limit arrived"
    finally:
        signals.task_prerun.disconnect(dispatch_uid="test")
    assert limits == [signal.SIGUSR1]


def test_a_soft_limit_is_not_raised_where_no_job_runs(limits: list[int]) -> None:
    before = threading.active_count()
    assert Hooked().is_interrupted_once() == "done"
    until(lambda: threading.active_count() == before, what="the end of the thread that looks for the job")
    assert limits == []


def test_a_soft_limit_after_the_body_is_not_raised_again(limits: list[int]) -> None:
    before = threading.active_count()
    assert Hooked().is_interrupted_after_the_body() == "done"
    assert threading.active_count() == before
    assert limits == []


def test_without_a_handler_no_signal_is_sent() -> None:
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert Hooked().is_interrupted_once() == "done"
