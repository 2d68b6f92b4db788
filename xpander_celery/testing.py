"""For the tests of applications: `capture_reports()` gives what would be sent, and sends nothing. Layer 5.

def test_the_digest_is_reported():
    with capture_reports(app) as reports:
        digest.apply(("monday",))
    assert reports[0].is_success
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

from celery import Celery

from xpander_celery.events import Event
from xpander_celery.fold import Final, fold, verdict
from xpander_celery.journal.memory import MemoryJournal
from xpander_celery.report import TaskReport
from xpander_celery.runtime import recording_into

__all__ = ["TEST_AGENT", "CapturedReports", "capture_reports"]

TEST_AGENT = "test-agent"
_LOOK_EVERY_S = 0.01


class CapturedReports(Sequence[TaskReport]):
    """The reports of the jobs that are over, in the order in which the jobs began. Every look is a fresh one."""

    def __init__(self, journal: MemoryJournal) -> None:
        self._journal = journal
        self._events: list[Event] = []

    @overload
    def __getitem__(self, index: int) -> TaskReport: ...
    @overload
    def __getitem__(self, index: slice) -> list[TaskReport]: ...
    def __getitem__(self, index: int | slice) -> TaskReport | list[TaskReport]:
        return self._reports()[index]

    def __len__(self) -> int:
        return len(self._reports())

    def __repr__(self) -> str:
        return repr(self._reports())

    def of(self, job_id: str) -> TaskReport | None:
        """The report of one job; None while it is not over, or if it names no agent."""
        return next((report for report in self._reports() if report.id == job_id), None)

    def wait_for(self, count: int, timeout_s: float = 10.0) -> list[TaskReport]:
        """The reports, once there are `count` of them; for workers in a thread. Raises `TimeoutError`."""
        deadline = time.monotonic() + timeout_s
        while len(reports := self._reports()) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(reports)} of {count} reports within {timeout_s} s")
            time.sleep(_LOOK_EVERY_S)
        return reports

    def _reports(self) -> list[TaskReport]:
        while (batch := self._journal.poll(1000)).events:
            self._events += batch.events
            self._journal.settle(batch)
        by_job: dict[str, list[Event]] = {}
        for event in self._events:
            by_job.setdefault(event.job_id, []).append(event)
        now = time.time()
        verdicts = [verdict(fold(events), now=now, gone={}, redelivery_wait_s=now) for events in by_job.values()]
        return [each.report for each in verdicts if isinstance(each, Final) and each.report is not None]


@contextmanager
def capture_reports(app: Celery | None = None, **settings: Any) -> Iterator[CapturedReports]:
    """Capture the reports of jobs that run in this process: eagerly, or in a worker thread.

    Takes the settings of `instrument()`, on top of those of an `instrument()` before; `app` is needed where there was
    none. Tasks without an agent belong to `TEST_AGENT`. Needs no API key and touches neither disk nor network.
    """
    journal = MemoryJournal()
    with recording_into(journal, app, settings, agent_id=TEST_AGENT):
        yield CapturedReports(journal)
