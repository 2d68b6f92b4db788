"""Where the platform is and who asks."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from xpander_celery.backend import Configuration
from xpander_celery.errors import ConfigurationError


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "ORGANIZATION_ID", "AGENT_ID"):
        monkeypatch.setenv(f"XPANDER_{name}", "from-environment")
    monkeypatch.setenv("XPANDER_BASE_URL", "https://environment.example")
    configuration = Configuration("k", "o", "https://given.example", "a")
    assert (configuration.api_key, configuration.organization_id) == ("k", "o")
    assert (configuration.base_url, configuration.agent_id) == ("https://given.example", "a")


def test_the_environment_is_read_for_each_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPANDER_API_KEY", "first")
    assert Configuration().api_key == "first"
    monkeypatch.setenv("XPANDER_API_KEY", "second")
    assert Configuration().api_key == "second"


@pytest.mark.parametrize("blank", ["", "   ", "\n"])
def test_blank_counts_as_unset(monkeypatch: pytest.MonkeyPatch, blank: str) -> None:
    for name in ("API_KEY", "ORGANIZATION_ID", "AGENT_ID", "BASE_URL"):
        monkeypatch.setenv(f"XPANDER_{name}", blank)
    configuration = Configuration(agent_id=blank)
    assert configuration == Configuration(None, None, "https://inbound.xpander.ai", None)
    assert configuration.api_key is configuration.agent_id is configuration.organization_id is None


@pytest.mark.parametrize(
    ("staging", "expected"),
    [
        ("true", "https://inbound.stg.xpander.ai"),
        ("True", "https://inbound.stg.xpander.ai"),
        ("false", "https://inbound.xpander.ai"),
        ("", "https://inbound.xpander.ai"),
    ],
)
def test_is_stg_chooses_the_default_address(monkeypatch: pytest.MonkeyPatch, staging: str, expected: str) -> None:
    monkeypatch.setenv("IS_STG", staging)
    assert Configuration().base_url == expected
    assert Configuration(base_url="https://own.example").base_url == "https://own.example"


@pytest.mark.parametrize(
    ("base_url", "full_url"),
    [
        ("https://inbound.xpander.ai", "https://inbound.xpander.ai"),
        ("https://inbound.xpander.ai/", "https://inbound.xpander.ai"),
        ("platform.example", "https://platform.example"),
        ("localhost:8080", "https://localhost:8080"),
        ("http://localhost:8080/base/", "http://localhost:8080/base"),
        ("HTTP://localhost:8080", "http://localhost:8080"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("https://agent-controller.xpander.ai", "https://agent-controller.xpander.ai/org-1"),
        ("https://agent-controller.xpander.ai/", "https://agent-controller.xpander.ai/org-1"),
        ("https://Agent-Controller-acme.example", "https://Agent-Controller-acme.example/org-1"),
        ("http://10.0.0.1:9016", "http://10.0.0.1:9016/org-1"),
        ("https://acme.example/agent-controller/", "https://acme.example/agent-controller/org-1"),
        ("https://acme.example/agent-controller/v2", "https://acme.example/agent-controller/v2/org-1"),
        ("https://acme.example/x/agent-controller", "https://acme.example/x/agent-controller"),
        ("https://acme.example/agent-controllers", "https://acme.example/agent-controllers"),
    ],
)
def test_the_organization_is_in_the_path_of_controller_hosts_only(base_url: str, full_url: str) -> None:
    assert Configuration(base_url=base_url, organization_id="org-1").get_full_url() == full_url


def test_a_controller_host_without_an_organization_is_refused_when_used() -> None:
    configuration = Configuration(base_url="https://agent-controller.xpander.ai")
    with pytest.raises(ConfigurationError, match="XPANDER_ORGANIZATION_ID"):
        configuration.get_full_url()


def test_an_organization_cannot_leave_its_segment() -> None:
    configuration = Configuration(base_url="http://h:9016", organization_id="a/../b?c#d")
    assert configuration.get_full_url() == "http://h:9016/a%2F..%2Fb%3Fc%23d"


@pytest.mark.parametrize(
    "base_url",
    [
        "ftp://platform.example",
        "https://",
        "http:///path",
        "https://host:port",
        "https://host:99999",
        "https://host:0",
        "https://[::1",
        "https://user:secret@host",
        "https://host?query=1",
        "https://host#fragment",
        "https://ho st",
        "https://host/pa th",
        "file:///etc/passwd",
    ],
)
def test_a_malformed_address_is_refused_naming_the_variable(base_url: str) -> None:
    with pytest.raises(ConfigurationError, match="XPANDER_BASE_URL") as caught:
        Configuration(base_url=base_url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["a b", "a\nb", "ключ", "a\x00b"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ConfigurationError, match="XPANDER_API_KEY") as caught:
        Configuration(api_key=key)
    assert key not in str(caught.value)


def test_a_key_is_needed_only_when_used() -> None:
    configuration = Configuration()
    with pytest.raises(ConfigurationError, match="XPANDER_API_KEY"):
        configuration.require_key()


def test_the_key_is_never_printed() -> None:
    configuration = Configuration(api_key="very-secret", organization_id="org-1", agent_id="a")
    for text in (repr(configuration), str(configuration), f"{configuration}"):
        assert "very-secret" not in text
        assert "org-1" in text
    assert "api_key=None" in repr(Configuration())


def test_a_secret_object_is_accepted_as_key() -> None:
    assert Configuration(api_key=SecretStr("k")).api_key == "k"  # type: ignore[arg-type]


def test_a_key_that_is_no_text_is_refused_naming_it() -> None:
    with pytest.raises(ConfigurationError, match="api_key"):
        Configuration(api_key=5)  # type: ignore[arg-type]


def test_another_clients_configuration_is_read_by_its_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPANDER_AGENT_ID", "from-environment")
    official = SimpleNamespace(
        api_key="k", base_url="https://h.example", organization_id="o", agent_id=None, state=object()
    )
    assert Configuration.of(official) == Configuration("k", "o", "https://h.example", "from-environment")


def test_of_keeps_ours_and_reads_the_environment_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Configuration("k")
    assert Configuration.of(own) is own
    monkeypatch.setenv("XPANDER_API_KEY", "e")
    assert Configuration.of(None).api_key == "e"
    with pytest.raises(ConfigurationError, match="configuration"):
        Configuration.of("a string")


def test_it_can_be_pickled() -> None:
    own = Configuration("k", "o", "https://h.example", "a")
    assert pickle.loads(pickle.dumps(own)) == own


@given(base_url=st.text(max_size=60))
def test_any_text_is_an_address_or_refused(base_url: str) -> None:
    try:
        configuration = Configuration(base_url=base_url)
    except ConfigurationError:
        return
    assert configuration.get_full_url().startswith(("http://", "https://")) or configuration.base_url
