"""The public test mode: reports of eager jobs and of a worker thread, and everything as before afterwards."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from celery import Celery, Task
from celery.contrib.testing.worker import start_worker

import xpander_celery as xc
from xpander_celery.testing import TEST_AGENT, capture_reports


@pytest.fixture
def kept_logging() -> Iterator[None]:
    """A worker in a thread sets the root logger up for itself."""
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]


@pytest.fixture
def add(app: Celery) -> Task:
    @app.task(name="shop.add")
    def add(x: int, y: int) -> int:
        return x + y

    app.finalize()
    task: Task = app.tasks["shop.add"]
    return task


def test_reports_are_a_sequence_that_grows(app: Celery, add: Task) -> None:
    with capture_reports(app) as reports:
        assert (len(reports), list(reports), repr(reports)) == (0, [], "[]")
        first = add.apply((1, 1))
        add.apply((2, 2))
        assert [each.result for each in reports] == ["2", "4"]
        assert reports[0] == reports.of(first.id)
        assert [each.result for each in reports[1:]] == ["4"]
        assert reports[0].agent_id == TEST_AGENT
        assert reports.of("unknown") is None
    assert [each.result for each in reports] == ["2", "4"]


@pytest.mark.usefixtures("kept_logging")
def test_reports_of_a_worker_in_a_thread(app: Celery, add: Task) -> None:
    app.loader.import_module("celery.contrib.testing.tasks")
    with capture_reports(app) as reports, start_worker(app, pool="solo", perform_ping_check=False, loglevel="ERROR"):
        job_id = add.delay(1, y=2).id
        [report] = reports.wait_for(1)
        assert (report.id, report.input, report.result) == (job_id, '{"x":1,"y":2}', "3")
        assert report.llm_response["celery"]["queue"] == "celery"
        failed = app.send_task("shop.unknown")
        reports.wait_for(2)
        assert "NotRegistered" in (reports.of(failed.id).result or "")  # type: ignore[union-attr]


def test_waiting_for_too_many_times_out(app: Celery) -> None:
    with capture_reports(app) as reports, pytest.raises(TimeoutError, match="0 of 1 reports"):
        reports.wait_for(1, timeout_s=0.01)


def test_the_apps_and_settings_of_instrument_hold_within_and_again_afterwards(app: Celery, add: Task) -> None:
    xc.instrument(app, agent_id="own", exclude=["other.*"])
    with capture_reports() as reports:
        add.apply((1, 1))
        assert reports[0].agent_id == "own"
        with capture_reports(exclude=["shop.*"]) as inner:
            add.apply((1, 1))
            assert len(inner) == 0
        add.apply((1, 1))
        assert len(reports) == 2
    add.apply((1, 1))
    assert len(reports) == 2


def test_nothing_is_captured_of_what_is_switched_off_inside(app: Celery, add: Task) -> None:
    with capture_reports(app) as reports:
        xc.uninstrument()
        add.apply((1, 1))
        assert len(reports) == 0


def test_a_switched_off_environment_does_not_switch_the_test_mode_off(
    app: Celery, add: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XPANDER_CELERY_DISABLED", "1")
    with capture_reports(app) as reports:
        add.apply((1, 1))
        assert len(reports) == 1
