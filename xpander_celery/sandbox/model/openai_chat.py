"""The wire form of OpenAI's chat completions: a request read, an answer written whole or as a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from xpander_celery.sandbox.model.script import Conversation, Tool, ToolCall, Turn, Usage
from xpander_celery.sandbox.model.served import Counts

ID_PREFIX = "chatcmpl-"
_WORDS_A_CHUNK = 3


def read(body: dict[str, Any], seed: int) -> Conversation:
    """The conversation in a request body."""
    messages: list[dict[str, Any]] = body.get("messages") or []
    last_user = max((index for index, message in enumerate(messages) if message.get("role") == "user"), default=-1)
    since = messages[last_user + 1 :]
    called = [call["function"]["name"] for message in since for call in message.get("tool_calls") or ()]
    response_format = body.get("response_format") or {}
    return Conversation(
        model=str(body.get("model", "")),
        user_text=text_of(messages[last_user].get("content")) if last_user >= 0 else "",
        size=len(json.dumps([messages, body.get("tools")])),
        tools=tuple(
            Tool(tool["function"]["name"], tool["function"].get("parameters") or {})
            for tool in body.get("tools") or ()
            if tool.get("type") == "function"
        ),
        called=tuple(called),
        tool_results=tuple(text_of(message.get("content")) for message in since if message.get("role") == "tool"),
        answer_schema=(response_format.get("json_schema") or {}).get("schema"),
        seed=int(body.get("seed") or seed),
    )


def text_of(content: Any) -> str:
    """The text of a message's content, which is text or a list of parts."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content or () if isinstance(part, dict))


def counted(usage: Usage) -> Counts:
    """The counts of a call: OpenAI's prompt tokens hold the cached ones, and writing a cache is not counted."""
    return Counts(usage.prompt, usage.completion, usage.cache_read, 0)


def answer(turn: Turn, conversation: Conversation, response_id: str) -> dict[str, Any]:
    """The whole answer."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.text or None, "refusal": None}
    if turn.calls:
        message["tool_calls"] = [_call(call) for call in turn.calls]
    choice = {"index": 0, "message": message, "finish_reason": _finish_reason(turn), "logprobs": None}
    return {
        **_head(conversation, response_id, "chat.completion"),
        "choices": [choice],
        "usage": _usage(turn.usage),
    }


def chunks(turn: Turn, conversation: Conversation, response_id: str, body: dict[str, Any]) -> Iterator[str]:
    """The answer as server-sent events, with the usage in a chunk of its own where the request asks for it."""
    head = _head(conversation, response_id, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return _event({**head, "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    for piece in pieces(turn.text):
        yield chunk({"content": piece})
    for index, call in enumerate(turn.calls):
        half = len(call.arguments) // 2
        first = {**_call(call), "function": {"name": call.name, "arguments": call.arguments[:half]}}
        yield chunk({"tool_calls": [{"index": index, **first}]})
        yield chunk({"tool_calls": [{"index": index, "function": {"arguments": call.arguments[half:]}}]})
    yield chunk({}, _finish_reason(turn))
    if (body.get("stream_options") or {}).get("include_usage"):
        yield _event({**head, "choices": [], "usage": _usage(turn.usage)})
    yield "data: [DONE]\n\n"


def error(status: int) -> dict[str, Any]:
    """The body of a failed request."""
    kind = {429: "rate_limit_exceeded", 401: "invalid_request_error"}.get(status, "server_error")
    return {
        "error": {"message": f"The sandbox was asked for status {status}.", "type": kind, "param": None, "code": kind}
    }


def pieces(text: str) -> Iterator[str]:
    """`text` in a few words at a time."""
    words = text.split(" ")
    for start in range(0, len(words), _WORDS_A_CHUNK):
        piece = " ".join(words[start : start + _WORDS_A_CHUNK])
        yield piece if start + _WORDS_A_CHUNK >= len(words) else piece + " "


def _head(conversation: Conversation, response_id: str, kind: str) -> dict[str, Any]:
    return {
        "id": response_id,
        "object": kind,
        "created": int(time.time()),
        "model": conversation.model,
        "system_fingerprint": "fp_sandbox",
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _finish_reason(turn: Turn) -> str:
    return "tool_calls" if turn.calls else "stop"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cache_read, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
