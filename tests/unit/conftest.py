"""What unit tests share: an app that leaves nothing behind, and a Redis server that each test flushes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery, _state

import xpander_celery as xc
from tests.support.redis_server import RedisServer, running_redis
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


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Each test that uses it flushes it, or has keys of its own."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server
