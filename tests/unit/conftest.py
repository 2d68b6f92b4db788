"""What unit tests of the worker side share: an app that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery, _state

import xpander_celery as xc
from xpander_celery.testing import CapturedReports, capture_reports


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app in memory. The tasks of a test are not shared with the apps of later ones, as Celery would have it."""
    before = set(_state._on_app_finalizers)
    current = _state._tls.current_app
    with Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=True) as app:
        yield app
    xc.uninstrument()
    _state._tls.current_app = current
    _state._on_app_finalizers.intersection_update(before)


@pytest.fixture
def reports(app: Celery) -> Iterator[CapturedReports]:
    """The reports of every job of the app."""
    with capture_reports(app) as reports:
        yield reports
