"""Signals that arrive inside `append` (fault 32).

Python runs a handler between two lines at the earliest, so the tests let one run before every single line that an
append executes, in this package: the one that re-enters, and the one that raises, as soft time limits do.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.support.journal import drain, progress
from xpander_celery.journal import Appended
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.reader import FileReader

PACKAGE = str(Path(sys.modules[FileJournal.__module__].__file__ or "").parent)
LIMIT = 400


class SoftLimitError(Exception):
    pass


def at_line(number: int, handler: Callable[[], None], action: Callable[[], Any]) -> bool:
    """Run `action` with `handler` called before the `number`-th line of the journal; whether it got that far."""
    passed = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal passed
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            passed += 1
            if passed == number:
                sys.settrace(None)
                handler()
        return trace

    previous = sys.gettrace()
    gc.disable()  # what is raised in the finalizer of an earlier journal is swallowed by Python itself
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(previous)
        gc.enable()
    return passed >= number


class Situation:
    """A journal in a state in which the next append has much to do."""

    def __init__(self, directory: Path, name: str) -> None:
        self.journal = FileJournal(directory)
        self.kept: list[str] = []
        if name != "first":
            self.append("before")
        if name == "rotation":
            self.journal._segments._rotate_at = 0.0
        if name == "recovery":
            self.journal._retry_at, self.journal._is_troubled = time.monotonic() + 60, True
            for number in range(3):
                self.append(f"held-{number}")
            self.journal._retry_at = 0.0
        if name == "torn":
            self.journal._segments._is_torn = True

    def append(self, name: str) -> None:
        if self.journal.append(progress(name)) is not Appended.DROPPED:
            self.kept.append(f"job-{name}")


SITUATIONS = ["first", "usual", "rotation", "recovery", "torn"]


@pytest.mark.fault(32)
@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.fault(32)
def test_a_handler_that_appends_inside_append_is_recorded_and_so_is_what_it_interrupted(
    tmp_path: Path, name: str
) -> None:
    for line in range(1, LIMIT):
        directory = tmp_path / str(line)
        situation = Situation(directory, name)
        reached = at_line(line, partial(situation.append, "inner"), partial(situation.append, "outer"))
        situation.journal.close()
        found = drain(FileReader(directory))
        assert set(found) == set(situation.kept), f"at line {line}"
        assert len(found) == len(situation.kept) or name == "recovery"  # what was held may be written by both
        if not reached:
            assert line > 10
            return
    pytest.fail("an append has no end")


@pytest.mark.fault(32)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a scandir dies where it raises
@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.fault(32)
def test_a_handler_that_raises_inside_append_reaches_the_job_and_costs_no_kept_event(tmp_path: Path, name: str) -> None:
    def interrupt() -> None:
        raise SoftLimitError

    for line in range(1, LIMIT):
        directory = tmp_path / str(line)
        situation = Situation(directory, name)
        raised = False
        try:
            reached = at_line(line, interrupt, partial(situation.append, "outer"))
        except SoftLimitError:
            reached = raised = True
        assert raised is reached, f"swallowed at line {line}"
        situation.append("after")
        situation.journal.close()
        found = drain(FileReader(directory))
        assert set(situation.kept) <= set(found), f"at line {line}"
        assert "job-after" in found
        if not reached:
            return
    pytest.fail("an append has no end")


@pytest.mark.fault(32)
def test_a_storm_of_real_signals_that_append_deadlocks_nothing_and_loses_nothing(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path)
    kept: list[str] = []
    inner = 0

    def append(name: str) -> None:
        if journal.append(progress(name)) is Appended.DURABLE:
            kept.append(f"job-{name}")

    def handler(number: int, frame: object) -> None:
        nonlocal inner
        inner += 1
        append(f"inner-{inner}")

    threads = [threading.Thread(target=lambda n=n: [append(f"{n}-{i}") for i in range(2000)]) for n in range(2)]
    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        for thread in threads:
            thread.start()
        outer, deadline = 0, time.monotonic() + 30
        while (inner < 300 or outer < 5000) and time.monotonic() < deadline:
            outer += 1
            append(f"outer-{outer}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    for thread in threads:
        thread.join()
    journal.close()
    assert inner >= 300
    assert sorted(drain(FileReader(tmp_path), limit=100_000)) == sorted(kept)


@pytest.mark.fault(32)
def test_a_signal_during_the_write_itself_is_recorded_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = FileJournal(tmp_path)
    journal.open()
    write, pending = os.write, [True]

    def interrupted(descriptor: int, data: bytes) -> int:
        written = write(descriptor, data)
        if pending and b"outer" in data:
            pending.clear()
            signal.raise_signal(signal.SIGUSR1)
        return written

    monkeypatch.setattr("os.write", interrupted)
    previous = signal.signal(signal.SIGUSR1, lambda *_: journal.append(progress("inner")))
    try:
        assert journal.append(progress("outer")) is Appended.DURABLE
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert drain(FileReader(tmp_path)) == ["job-outer", "job-inner"]
