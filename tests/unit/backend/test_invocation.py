"""Starting a task of a platform agent."""

from __future__ import annotations

import enum
import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from xpander_celery import errors
from xpander_celery.backend import Backend, Configuration

from .conftest import TASK, Platform, task

AGENT = httpx.Response(200, json={"id": "agent-1", "name": "An agent"})
KEYS = [
    "id", "input", "payload_extension", "source", "worker_id", "output_format", "output_schema", "run_locally",
    "events_streaming", "additional_context", "instructions_override", "test_run_node_id", "user_oidc_token",
    "expected_output", "mcp_servers", "triggering_agent_id", "title", "think_mode", "disable_attachment_injection",
    "user_tokens", "return_metrics", "llm_model_provider", "llm_model_name", "llm_reasoning_effort", "harness_cli",
    "permission_mode", "tool_call_limit",
]  # fmt: skip


class OutputFormat(enum.StrEnum):
    Json = "json"


@pytest.fixture
def sent(platform: Platform) -> Any:
    """The body that created a task."""
    platform.answers = [AGENT, task(status="pending")]

    def body() -> dict[str, Any]:
        read: dict[str, Any] = json.loads(platform.requests[-1].content)
        return read

    return body


async def test_the_agent_is_looked_up_first_and_the_task_returned(
    backend: Backend, platform: Platform, sent: Any
) -> None:
    created = await backend.ainvoke_agent(prompt="Hello")
    assert (created.id, created.status, created.has_ended) == ("job-1", "pending", False)
    assert platform.paths == ["GET /agents/agent-1", "POST /agent-execution/agent-1"]
    assert list(sent()) == KEYS
    assert sent()["input"] == {"text": "Hello", "files": None, "user": None}
    assert (sent()["source"], sent()["think_mode"], sent()["mcp_servers"]) == ("sdk", "default", [])


def test_the_synchronous_twin_sends_the_same(backend: Backend, platform: Platform, sent: Any) -> None:
    arguments: dict[str, Any] = {
        "agent_id": "agent-2",
        "prompt": "Grüße",
        "existing_task_id": "job-0",
        "file_urls": ("https://f/1",),
        "user_details": {"email": "e@x", "extra": 1},
        "agent_version": "7",
        "tool_call_payload_extension": {"a": 1},
        "source": "worker",
        "worker_id": "w",
        "run_locally": True,
        "output_format": OutputFormat.Json,
        "output_schema": {"type": "object"},
        "events_streaming": True,
        "additional_context": "c",
        "expected_output": "e",
        "attachments": [SimpleNamespace(url="https://f/2", name="n", mime="m", size=3)],
    }
    backend.invoke_agent(**arguments)
    body = sent()
    assert "Grüße".encode() in platform.requests[-1].content
    assert body["input"]["files"] == ["https://f/1"]
    assert list(body["input"]) == ["text", "files", "attachments", "user"]
    assert body["input"]["attachments"][0]["url"] == "https://f/2"
    assert list(body["input"]["user"]) == [
        "id",
        "first_name",
        "last_name",
        "email",
        "additional_attributes",
        "timezone",
    ]
    assert (body["id"], body["output_format"], body["run_locally"]) == ("job-0", "json", True)
    assert body["payload_extension"] == {"a": 1}
    assert platform.requests[0].headers.get("x-agent-version") is None
    assert platform.requests[1].headers["x-agent-version"] == "7"


async def test_the_task_is_created_for_the_agent_that_was_found(backend: Backend, platform: Platform) -> None:
    platform.answers = [httpx.Response(200, json={"id": "agent/real"}), task()]
    await backend.ainvoke_agent("alias")
    assert platform.paths == ["GET /agents/alias", "POST /agent-execution/agent%2Freal"]


@pytest.mark.parametrize("prompt", ['{"xpander_task_id":"job-1"}', ' {"xpander_task_id": "job-1", "more": 1}'])
def test_a_prompt_that_names_a_task_loads_it(backend: Backend, platform: Platform, prompt: str) -> None:
    assert backend.invoke_agent(prompt=prompt).id == "job-1"
    assert platform.paths == ["GET /agent-execution/job-1/status"]


@pytest.mark.parametrize("prompt", ["5", "null", '["xpander_task_id"]', '"xpander_task_id"', "{", '{"other":1}', None])
def test_any_other_prompt_creates_a_task(backend: Backend, platform: Platform, sent: Any, prompt: str | None) -> None:
    backend.invoke_agent(prompt=prompt)
    assert sent()["input"]["text"] == prompt


def test_a_named_task_needs_no_agent(platform: Platform) -> None:
    backend = Backend(Configuration("k"), transport=httpx.MockTransport(platform))
    assert backend.invoke_agent(prompt='{"xpander_task_id":"job-1"}').id == TASK["id"]
    with pytest.raises(errors.InvalidValueError, match="XPANDER_AGENT_ID"):
        backend.invoke_agent(prompt="Hello")


async def test_an_unknown_agent_is_not_found_and_no_task_created(backend: Backend, platform: Platform) -> None:
    platform.answers = [httpx.Response(404, json={"detail": "no agent"})]
    with pytest.raises(errors.NotFoundError, match="no agent"):
        await backend.ainvoke_agent("nobody", "Hello")
    assert platform.paths == ["GET /agents/nobody"]


def test_a_named_task_that_is_not_there_starts_no_other(backend: Backend, platform: Platform) -> None:
    platform.answers = [httpx.Response(404)]
    with pytest.raises(errors.NotFoundError):
        backend.invoke_agent(prompt='{"xpander_task_id":"gone"}')
    assert platform.paths == ["GET /agent-execution/gone/status"]


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("existing_task_id", {"existing_task_id": ""}),
        ("file_urls", {"file_urls": "https://one"}),
        ("file_urls[1]", {"file_urls": ["https://one", 2.5]}),
        ("user_details.email", {"user_details": {"first_name": "A"}}),
        ("user_details", {"user_details": 5}),
        ("attachments[0].url", {"attachments": [{"name": "n"}]}),
        ("attachments", {"attachments": "https://one"}),
        ("tool_call_payload_extension", {"tool_call_payload_extension": [1]}),
        ("output_schema", {"output_schema": "text"}),
        ("output_format", {"output_format": 5.5}),
        ("run_locally", {"run_locally": "no"}),
        ("events_streaming", {"events_streaming": 1}),
        ("agent_version", {"agent_version": "v\n2"}),
        ("agent_id", {"agent_id": ".."}),
    ],
)
def test_a_bad_value_is_refused_before_anything_is_sent(
    backend: Backend, platform: Platform, field: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(errors.InvalidValueError) as caught:
        backend.invoke_agent(**arguments)
    assert caught.value.field == field
    assert platform.requests == []
