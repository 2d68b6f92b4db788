"""The `xpander_*` keys of an app's configuration, read without loading it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from celery import Celery

import xpander_celery as xc
from xpander_celery.celery_settings import configured
from xpander_celery.errors import ConfigurationError


class DjangoLike:
    """As `django.conf.settings`: the attributes come when they are asked for."""

    CELERY_BROKER_URL = "memory://"
    CELERY_XPANDER_AGENT_ID = "from django"
    CELERY_XPANDER_TASKS = ["shop.*"]
    XPANDER_AGENT_ID = "not Celery's"
    DEBUG = False


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("xpander_test_celeryconfig")
    module.__dict__.update(broker_url="memory://", xpander_agent_id="from module")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_keys_that_are_set_before_the_configuration_is_loaded(app: Celery) -> None:
    app.conf.xpander_agent_id = "set"
    app.conf.update(xpander_exclude=["a"])
    assert configured(app) == {"xpander_agent_id": "set", "xpander_exclude": ["a"]}
    assert not app.configured


@pytest.mark.parametrize("source", [DjangoLike, DjangoLike(), vars(DjangoLike), SimpleNamespace(**vars(DjangoLike))])
def test_keys_in_a_namespace(app: Celery, source: Any) -> None:
    app.config_from_object(source, namespace="CELERY")
    expected = {"xpander_agent_id": "from django", "xpander_tasks": ["shop.*"]}
    assert configured(app) == expected
    assert not app.configured
    assert app.conf.broker_url == "memory://"  # loads it
    assert app.configured
    assert configured(app) == expected


def test_keys_in_a_module_that_is_named(app: Celery, module: ModuleType) -> None:
    app.config_from_object(module.__name__)
    assert configured(app) == {"xpander_agent_id": "from module"}
    app.conf.xpander_agent_id = "set later"
    assert configured(app)["xpander_agent_id"] == "set later"


@pytest.mark.parametrize("is_loaded", [False, True])
def test_what_a_configuration_module_imports_is_no_setting(app: Celery, module: ModuleType, is_loaded: bool) -> None:
    module.__dict__["xpander_celery"] = xc
    app.config_from_object(module.__name__)
    if is_loaded:
        assert app.conf.broker_url == "memory://"
    assert configured(app) == {"xpander_agent_id": "from module"}


def test_keys_that_are_set_after_loading_win(app: Celery, module: ModuleType) -> None:
    app.config_from_object(module.__name__)
    assert app.conf.broker_url
    app.conf.xpander_agent_id = "set"
    assert configured(app) == {"xpander_agent_id": "set"}


def test_a_source_that_cannot_be_read_yet_gives_nothing(app: Celery) -> None:
    app.config_from_object("no.such.module")
    assert configured(app) == {}


def test_who_connects_to_on_after_configure_after_instrument_is_called(app: Celery, module: ModuleType) -> None:
    app.config_from_object(module.__name__)
    xc.instrument(app)
    called = []
    app.on_after_configure.connect(lambda **_: called.append(True), weak=False)
    assert not app.finalized
    assert app.conf.broker_url == "memory://"
    assert called == [True]


def test_an_unknown_key_is_named_as_it_was_written(app: Celery) -> None:
    app.config_from_object({"CELERY_XPANDER_AGNET_ID": "a"}, namespace="CELERY")
    with pytest.raises(ConfigurationError, match="xpander_agnet_id: is no setting"):
        xc.instrument(app)
