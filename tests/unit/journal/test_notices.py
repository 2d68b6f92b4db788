"""Log lines that do not flood."""

from __future__ import annotations

import logging

import pytest

from xpander_celery.journal.notices import Notice


def test_a_lasting_trouble_is_logged_at_once_and_then_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    notice = Notice(logging.getLogger("test"), "trouble", clock=lambda: now)
    for second in range(121):
        now = float(second)
        notice.warn("after %d s", second)
    assert [record.getMessage() for record in caplog.records] == ["after 0 s", "after 60 s", "after 120 s"]
    assert {record.__dict__["event"] for record in caplog.records} == {"trouble"}
