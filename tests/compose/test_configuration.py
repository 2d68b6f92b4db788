"""What `docker compose config` makes of the files, also of the services whose images are big: no engine is needed."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest

from tests.compose.stack import ROOT, compose

OURS = {"sandbox", "worker", "beat", "relay"}
ALWAYS = OURS | {"redis"}


def services(*profiles: str, env_file: str = os.devnull, **variables: str) -> dict[str, dict[str, Any]]:
    """The services that these profiles start, as compose understands them."""
    chosen = [part for profile in profiles for part in ("--profile", profile)]
    return dict(
        json.loads(compose(*chosen, "config", "--format", "json", env_file=env_file, variables=variables))["services"]
    )


@pytest.mark.parametrize(
    ("profile", "more"),
    [("traces", {"jaeger"}), ("rabbitmq", {"rabbitmq"}), ("local-model", {"model", "model-pull"})],
)
def test_a_profile_starts_its_services_beside_the_stack(profile: str, more: set[str]) -> None:
    assert services().keys() == ALWAYS
    assert services(profile).keys() == ALWAYS | more


def test_the_stack_itself_needs_two_base_images_only() -> None:
    images = {service["image"] for service in services().values()}
    assert images == {"redis:7-alpine", "xpander-celery-stack"}
    bases = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert set(bases) == {"python:3.12-slim"}


def test_every_image_is_pinned() -> None:
    images = {service["image"] for service in services("*").values()} - {"xpander-celery-stack"}
    assert all(re.fullmatch(r"[\w./-]+:\d[\w.-]*", image) for image in images), images


def test_every_service_is_limited_and_restarted() -> None:
    for name, service in services("*").items():
        assert service["restart"] in ("unless-stopped", "on-failure"), name
        assert service["deploy"]["resources"]["limits"]["memory"], name
        assert service["logging"]["options"].keys() == {"max-size", "max-file"}, name


def test_our_containers_can_write_only_where_they_must() -> None:
    for name in OURS:
        service = services()[name]
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["healthcheck"]["test"], name
        assert service["stop_grace_period"], name


def test_ports_are_published_to_this_machine_only() -> None:
    published = [port for service in services("*").values() for port in service.get("ports", [])]
    assert published
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}


def test_two_variables_point_it_at_the_platform() -> None:
    platform = services(env_file=".env.example", XPANDER_API_KEY="key", XPANDER_AGENT_ID="agent-7")
    for name in ("worker", "relay"):
        environment = platform[name]["environment"]
        assert environment["XPANDER_API_KEY"] == "key"
        assert environment["XPANDER_AGENT_ID"] == "agent-7"
        assert environment["XPANDER_BASE_URL"] == "https://inbound.xpander.ai"


def test_one_variable_puts_the_journal_into_redis() -> None:
    stack = services(XPANDER_CELERY_JOURNAL="redis://redis:6379/3")
    for name in ("worker", "relay"):
        assert stack[name]["environment"]["XPANDER_CELERY_JOURNAL"] == "redis://redis:6379/3"
        assert stack[name]["depends_on"]["redis"]["condition"] == "service_healthy"
    assert "noeviction" in stack["redis"]["command"]
    assert "container_name" not in stack["relay"]  # so that there may be several


def test_the_example_of_settings_changes_nothing_but_traces() -> None:
    assert services("traces", OTEL_EXPORTER_OTLP_ENDPOINT="http://jaeger:4318") == services(env_file=".env.example")


def test_every_variable_is_in_the_example_of_settings() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    documented = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), flags=re.MULTILINE))
    assert documented == used | {"COMPOSE_PROFILES"}
