"""The wire form of Anthropic's messages: a request read, an answer written whole or as a stream.

Anthropic counts cached tokens beside `input_tokens`, not inside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from xpander_celery.sandbox.model.openai_chat import pieces, text_of
from xpander_celery.sandbox.model.script import Conversation, Tool, Turn, Usage
from xpander_celery.sandbox.model.served import Counts

ID_PREFIX = "msg_"


def read(body: dict[str, Any], seed: int) -> Conversation:
    """The conversation in a request body. A message with tool results has the role `user`, but no user speaks there."""
    messages: list[dict[str, Any]] = body.get("messages") or []
    spoken = [
        index for index, each in enumerate(messages) if each.get("role") == "user" and not _parts(each, "tool_result")
    ]
    last_user = spoken[-1] if spoken else -1
    since = messages[last_user + 1 :]
    return Conversation(
        model=str(body.get("model", "")),
        user_text=text_of(messages[last_user].get("content")) if spoken else "",
        size=len(json.dumps([body.get("system"), messages, body.get("tools")])),
        tools=tuple(
            Tool(tool["name"], tool["input_schema"]) for tool in body.get("tools") or () if "input_schema" in tool
        ),
        called=tuple(part["name"] for message in since for part in _parts(message, "tool_use")),
        tool_results=tuple(
            text_of(part.get("content")) for message in since for part in _parts(message, "tool_result")
        ),
        seed=seed,
    )


def counted(usage: Usage) -> Counts:
    """The counts of a call: Anthropic's prompt tokens are what neither came from the cache nor went into it."""
    return Counts(
        usage.prompt - usage.cache_read - usage.cache_write, usage.completion, usage.cache_read, usage.cache_write
    )


def answer(turn: Turn, conversation: Conversation, response_id: str) -> dict[str, Any]:
    """The whole answer."""
    return _message(conversation, response_id, _content(turn), _stop_reason(turn), _usage(turn.usage))


def chunks(turn: Turn, conversation: Conversation, response_id: str, body: dict[str, Any]) -> Iterator[str]:
    """The answer as server-sent events: the input is counted in the first, the output in the last but one."""
    usage = _usage(turn.usage)
    yield _event("message_start", message=_message(conversation, response_id, [], None, {**usage, "output_tokens": 1}))
    for index, block in enumerate(_content(turn)):
        if block["type"] == "text":
            yield _event("content_block_start", index=index, content_block={"type": "text", "text": ""})
            for piece in pieces(block["text"]):
                yield _event("content_block_delta", index=index, delta={"type": "text_delta", "text": piece})
        else:
            yield _event("content_block_start", index=index, content_block={**block, "input": {}})
            text = json.dumps(block["input"])
            for part in (text[: len(text) // 2], text[len(text) // 2 :]):
                yield _event(
                    "content_block_delta", index=index, delta={"type": "input_json_delta", "partial_json": part}
                )
        yield _event("content_block_stop", index=index)
    yield _event(
        "message_delta",
        delta={"stop_reason": _stop_reason(turn), "stop_sequence": None},
        usage={"output_tokens": usage["output_tokens"]},
    )
    yield _event("message_stop")


def error(status: int) -> dict[str, Any]:
    """The body of a failed request."""
    kind = {429: "rate_limit_error", 401: "authentication_error", 529: "overloaded_error"}.get(status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": f"The sandbox was asked for status {status}."}}


def _parts(message: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    content = message.get("content")
    return [part for part in content if part.get("type") == kind] if isinstance(content, list) else []


def _content(turn: Turn) -> list[dict[str, Any]]:
    if turn.calls:
        return [
            {"type": "tool_use", "id": f"toolu_{call.id}", "name": call.name, "input": json.loads(call.arguments)}
            for call in turn.calls
        ]
    return [{"type": "text", "text": turn.text}]


def _message(
    conversation: Conversation,
    response_id: str,
    content: list[dict[str, Any]],
    stop_reason: str | None,
    usage: dict[str, int],
) -> dict[str, Any]:
    return {
        "id": response_id,
        "type": "message",
        "role": "assistant",
        "model": conversation.model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": usage,
    }


def _stop_reason(turn: Turn) -> str:
    return "tool_use" if turn.calls else "end_turn"


def _usage(usage: Usage) -> dict[str, int]:
    counts = counted(usage)
    return {
        "input_tokens": counts.prompt_tokens,
        "cache_creation_input_tokens": counts.cache_write_tokens,
        "cache_read_input_tokens": counts.cache_read_tokens,
        "output_tokens": counts.completion_tokens,
    }


def _event(kind: str, **data: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"
