from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from pydantic import SecretStr

from xpander_celery.errors import ConfigurationError
from xpander_celery.relay.config import VARIABLE, RelayConfig
from xpander_celery.settings import Settings

FULL = RelayConfig(
    Path("/state/destination"),
    api_key="secret-key",
    organization_id="org",
    base_url="https://platform",
    journal="redis://:secret-word@redis:6379/3",
    backend="pkg.mod:backend",
    before_send="pkg.mod:hook",
    rate_limit_per_minute=100,
    concurrency=3,
    search_path=("/app", "/lib"),
    loaded_at=5.0,
)


def test_a_configuration_survives_the_environment() -> None:
    assert RelayConfig.from_environ(FULL.to_environ()) == FULL
    least = RelayConfig(Path("/state"))
    assert RelayConfig.from_environ(least.to_environ()) == least


def test_the_key_travels_under_its_own_name_only_and_is_never_shown() -> None:
    environ = FULL.to_environ()
    assert environ["XPANDER_API_KEY"] == "secret-key"
    assert "secret-key" not in environ[VARIABLE]
    assert "secret-key" not in repr(FULL)
    assert "secret-key" not in FULL.fingerprint
    assert "secret-word" not in repr(FULL)
    assert "secret-word" not in FULL.fingerprint


def test_an_unset_value_hides_what_the_worker_inherited() -> None:
    environ = {"XPANDER_API_KEY": "inherited", "XPANDER_BASE_URL": "http://inherited"} | RelayConfig(
        Path("/state")
    ).to_environ()
    assert RelayConfig.from_environ(environ).api_key is None
    assert RelayConfig.from_environ(environ).base_url is None


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"directory": "/x", "unknown": 1, "search_path": []}'])
def test_anything_else_in_the_environment_is_refused(text: str | None) -> None:
    environ = {} if text is None else {VARIABLE: text}
    with pytest.raises(ConfigurationError, match=VARIABLE):
        RelayConfig.from_environ(environ)


def test_the_fingerprint_changes_with_every_setting_and_with_nothing_else() -> None:
    for field in dataclasses.fields(RelayConfig):
        if field.name in ("search_path", "loaded_at"):
            assert dataclasses.replace(FULL, **{field.name: ()}).fingerprint == FULL.fingerprint
        else:
            assert dataclasses.replace(FULL, **{field.name: None}).fingerprint != FULL.fingerprint, field.name
    assert RelayConfig.from_environ(FULL.to_environ()).fingerprint == FULL.fingerprint


def test_names_and_defaults_are_those_of_the_settings() -> None:
    defaults = Settings.load().model_dump()
    for field in dataclasses.fields(RelayConfig):
        if field.name not in ("directory", "search_path", "loaded_at"):
            assert field.default == defaults[field.name], field.name


def test_the_relay_takes_its_share_of_the_settings() -> None:
    values = Settings.load(api_key="secret-key", concurrency=5, tasks=["a.*"]).model_dump()
    assert isinstance(values["api_key"], SecretStr)
    config = RelayConfig.from_values(Path("/state"), values, loaded_at=7.0)
    assert (config.api_key, config.concurrency, config.loaded_at) == ("secret-key", 5, 7.0)
    assert json.loads(config.to_environ()[VARIABLE])["concurrency"] == 5
