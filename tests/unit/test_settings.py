"""Settings: keyword, then Celery's conf, then environment; what is wrong is named as its author wrote it."""

from __future__ import annotations

from typing import Any

import pytest

from xpander_celery.errors import ConfigurationError
from xpander_celery.settings import Settings, variable_of


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(variable_of(field), raising=False)


def test_defaults_need_nothing() -> None:
    settings = Settings.load()
    assert settings.api_key is None
    assert settings.tasks == ("*",)
    assert settings.relay == "auto"


def test_keyword_beats_conf_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPANDER_AGENT_ID", "from-environment")
    assert Settings.load().agent_id == "from-environment"
    assert Settings.load({"xpander_agent_id": "from-conf"}).agent_id == "from-conf"
    assert Settings.load({"xpander_agent_id": "from-conf"}, agent_id="from-keyword").agent_id == "from-keyword"
    assert Settings.load({"xpander_agent_id": "from-conf"}, agent_id=None).agent_id == "from-conf"


def test_lists_in_variables_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPANDER_CELERY_TASKS", "reports.*, billing.*")
    monkeypatch.setenv("XPANDER_CELERY_AGENTS", '{"billing.*": "agent-2"}')
    settings = Settings.load()
    assert settings.tasks == ("reports.*", "billing.*")
    assert settings.agents == {"billing.*": "agent-2"}


def test_variables_without_our_prefix_are_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.setenv(field.upper(), "theirs")
        monkeypatch.setenv(field, "theirs")
    assert Settings.load().model_dump() == Settings.model_construct().model_dump()


def test_a_keyword_beats_each_variable_of_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in ("api_key", "organization_id", "base_url", "agent_id"):
        monkeypatch.setenv(variable_of(field), "from-environment")
        monkeypatch.setenv(f"XPANDER_CELERY_{field.upper()}", "weaker")
    key = Settings.load().api_key
    assert key is not None
    assert key.get_secret_value() == "from-environment"
    settings = Settings.load(api_key="given", organization_id="given", base_url="given", agent_id="given")
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "given"
    assert (settings.organization_id, settings.base_url, settings.agent_id) == ("given", "given", "given")


def test_empty_variables_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPANDER_API_KEY", "")
    monkeypatch.setenv("XPANDER_BASE_URL", " ")
    monkeypatch.setenv("XPANDER_CELERY_CONCURRENCY", "")
    settings = Settings.load()
    assert settings.api_key is None
    assert settings.base_url is None
    assert settings.concurrency == 8


@pytest.mark.parametrize(
    ("keywords", "conf", "environment", "named"),
    [
        ({"rate_limit_per_minute": 0}, {}, {}, "rate_limit_per_minute"),
        ({"relay": "sometimes"}, {}, {}, "relay"),
        ({"before_send": "not a path"}, {}, {}, "before_send"),
        ({"agentid": "a"}, {}, {}, "agentid"),
        ({}, {"xpander_concurency": 3}, {}, "xpander_concurency"),
        ({}, {"xpander_journal": "ftp://host/0"}, {}, "xpander_journal"),
        ({"journal": "redis://host:many/0"}, {}, {}, "journal"),
        ({"journal": "redis://host/0?retries=3"}, {}, {}, "journal"),
        ({}, {}, {"XPANDER_CELERY_JOURNAL": "rediss://host/first"}, "XPANDER_CELERY_JOURNAL"),
        ({}, {}, {"XPANDER_CELERY_CONCURRENCY": "many"}, "XPANDER_CELERY_CONCURRENCY"),
        ({}, {}, {"XPANDER_CELERY_AGENTS": "billing=agent"}, "XPANDER_CELERY_AGENTS"),
        ({"api_key": 5}, {}, {}, "api_key"),
    ],
)
def test_a_malformed_value_names_the_setting_and_a_remedy(
    keywords: dict[str, Any],
    conf: dict[str, Any],
    environment: dict[str, str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(conf, **keywords)
    assert caught.value.setting == named
    assert caught.value.remedy


def test_the_key_shows_in_no_repr_and_no_error() -> None:
    assert "hunter2" not in repr(Settings.load(api_key="hunter2"))
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(api_key=["hunter2"])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "valkey", "valkeys"])
def test_the_journal_may_be_a_redis_whose_password_shows_nowhere(scheme: str) -> None:
    settings = Settings.load(journal=f"{scheme}://user:hunter2@redis:6379/3")
    assert settings.journal == f"{scheme}://user:hunter2@redis:6379/3"
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    "url",
    ["redis://:hunter2@host:port/0", "redis://:hun/ter2@host/0", "redis://u:hunter2@host/zero", "http://:hunter2@h"],
)
def test_a_redis_url_that_cannot_be_read_is_not_repeated(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"journal: .*Redis") as caught:
        Settings.load(journal=url)
    assert "hun" not in str(caught.value)
    assert "ter2" not in str(caught.value)


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
