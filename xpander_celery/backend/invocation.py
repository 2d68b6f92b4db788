"""The body that creates a task of an agent: 27 keys, always present, in the order of the official client."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from xpander_celery.backend.arguments import identifier, json_value, read, truth
from xpander_celery.errors import InvalidValueError
from xpander_celery.rendering import to_text

_HEADER = re.compile(r"[\x21-\x7e]+")


class _User(BaseModel):
    """A user as the platform takes one; also read from the official client's object."""

    model_config = ConfigDict(from_attributes=True, extra="ignore", defer_build=True)

    id: str | None = None
    first_name: str | None = None
    last_name: str | None = None
    email: str
    additional_attributes: dict[str, Any] | None = None
    timezone: str | None = None


class _Attachment(BaseModel):
    """A file with what is known of it; also read from the official client's object."""

    model_config = ConfigDict(from_attributes=True, extra="ignore", defer_build=True)

    url: str
    name: str | None = None
    mime: str | None = None
    size: int | None = None
    kind: str | None = None
    sha256: str | None = None
    expires_at: str | None = None
    source: str | None = None
    transcript: str | None = None


def body_of(
    *,
    prompt: Any = "",
    existing_task_id: Any = None,
    file_urls: Any = None,
    user_details: Any = None,
    tool_call_payload_extension: Any = None,
    source: Any = "sdk",
    worker_id: Any = None,
    run_locally: Any = False,
    output_format: Any = None,
    output_schema: Any = None,
    events_streaming: Any = False,
    additional_context: Any = None,
    expected_output: Any = None,
    attachments: Any = None,
) -> bytes:
    """The body for these arguments of `ainvoke_agent`; raises `InvalidValueError` for what cannot be sent."""
    given: dict[str, Any] = {"text": read("prompt", to_text, prompt), "files": read("file_urls", _urls, file_urls)}
    if attached := read("attachments", _attachments, attachments):
        given["attachments"] = attached
    given["user"] = _fields("user_details", _User, user_details)
    body = {
        "id": None if existing_task_id is None else identifier("existing_task_id", existing_task_id),
        "input": given,
        "payload_extension": _mapping("tool_call_payload_extension", tool_call_payload_extension),
        "source": read("source", to_text, source),
        "worker_id": read("worker_id", to_text, worker_id),
        "output_format": read("output_format", _name, output_format),
        "output_schema": _mapping("output_schema", output_schema),
        "run_locally": _switch("run_locally", run_locally),
        "events_streaming": _switch("events_streaming", events_streaming),
        "additional_context": read("additional_context", to_text, additional_context),
        "instructions_override": None,
        "test_run_node_id": None,
        "user_oidc_token": None,
        "expected_output": read("expected_output", to_text, expected_output),
        "mcp_servers": [],
        "triggering_agent_id": None,
        "title": None,
        "think_mode": "default",
        "disable_attachment_injection": False,
        "user_tokens": None,
        "return_metrics": False,
        "llm_model_provider": None,
        "llm_model_name": None,
        "llm_reasoning_effort": None,
        "harness_cli": None,
        "permission_mode": None,
        "tool_call_limit": None,
    }
    return to_json(body)


def version_header(agent_version: Any) -> tuple[tuple[str, str], ...]:
    """The header that names an agent's version; none for the latest."""
    if agent_version is None or agent_version == "":
        return ()
    version = identifier("agent_version", agent_version)
    if not _HEADER.fullmatch(version):
        raise InvalidValueError("agent_version", "has characters that no header can carry")
    return (("x-agent-version", version),)


def named_task(prompt: Any) -> Any:
    """The id under `xpander_task_id`, where the prompt is a JSON object with that key; else None."""
    if not isinstance(prompt, str):
        return None
    try:
        parsed = json.loads(prompt)
    except (ValueError, RecursionError):
        return None
    return parsed.get("xpander_task_id") if isinstance(parsed, dict) else None


def _urls(value: Any) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes)) or not isinstance(value, Collection):
        raise InvalidValueError("file_urls", f"must be a list of URLs, is a {type(value).__name__}")
    return [identifier(f"file_urls[{position}]", url) for position, url in enumerate(value)]


def _attachments(value: Any) -> list[dict[str, Any] | None]:
    if value is None:
        return []
    if not isinstance(value, Collection) or isinstance(value, (str, bytes, Mapping)):
        raise InvalidValueError("attachments", f"must be a list, is a {type(value).__name__}")
    return [_fields(f"attachments[{position}]", _Attachment, item) for position, item in enumerate(value)]


def _fields(field: str, model: type[BaseModel], value: Any) -> dict[str, Any] | None:
    """`value`, a mapping or any object with such attributes, as the platform's own keys."""
    if value is None:
        return None
    try:
        fields = read(field, model.model_validate, dict(value) if isinstance(value, Mapping) else value)
    except InvalidValueError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        first = error.__cause__.errors(include_url=False, include_input=False)[0]
        where = ".".join([field, *map(str, first["loc"])])
        raise InvalidValueError(where, first["msg"].lower()) from error.__cause__
    return {name: json_value(f"{field}.{name}", getattr(fields, name)) for name in model.model_fields}


def _mapping(field: str, value: Any) -> Any:
    if value is None or isinstance(value, Mapping):
        return json_value(field, value)
    raise InvalidValueError(field, f"must be a mapping, is a {type(value).__name__}")


def _switch(field: str, value: Any) -> bool | None:
    return None if value is None else truth(field, value)


def _name(value: Any) -> str | None:
    """The value of an enumeration's member, or a plain name."""
    return None if value is None else identifier("output_format", getattr(value, "value", value))
