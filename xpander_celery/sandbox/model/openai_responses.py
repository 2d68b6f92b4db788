"""The wire form of OpenAI's responses: a request read, an answer written whole or as a stream."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

from xpander_celery.sandbox.model import openai_chat
from xpander_celery.sandbox.model.openai_chat import pieces, text_of
from xpander_celery.sandbox.model.script import Conversation, Tool, Turn, Usage

ID_PREFIX = "resp_"
counted = openai_chat.counted
error = openai_chat.error


def read(body: dict[str, Any], seed: int) -> Conversation:
    """The conversation in a request body; `input` is text or a list of items."""
    given = body.get("input") or ""
    items: list[dict[str, Any]] = [{"role": "user", "content": given}] if isinstance(given, str) else given
    last_user = max((index for index, item in enumerate(items) if item.get("role") == "user"), default=-1)
    since = items[last_user + 1 :]
    answer_format = (body.get("text") or {}).get("format") or {}
    return Conversation(
        model=str(body.get("model", "")),
        user_text=text_of(items[last_user].get("content")) if last_user >= 0 else "",
        size=len(json.dumps([body.get("instructions"), items, body.get("tools")])),
        tools=tuple(
            Tool(tool["name"], tool.get("parameters") or {})
            for tool in body.get("tools") or ()
            if tool.get("type") == "function"
        ),
        called=tuple(item["name"] for item in since if item.get("type") == "function_call"),
        tool_results=tuple(text_of(item["output"]) for item in since if item.get("type") == "function_call_output"),
        answer_schema=answer_format.get("schema"),
        seed=seed,
    )


def answer(turn: Turn, conversation: Conversation, response_id: str) -> dict[str, Any]:
    """The whole answer."""
    return _response(conversation, response_id, "completed", _output(turn, response_id), turn.usage)


def chunks(turn: Turn, conversation: Conversation, response_id: str, body: dict[str, Any]) -> Iterator[str]:
    """The answer as server-sent events; the last one holds the whole answer with its usage."""
    numbers = iter(range(10**9))

    def event(kind: str, **data: Any) -> str:
        numbered = {"type": f"response.{kind}", "sequence_number": next(numbers), **data}
        return f"event: response.{kind}\ndata: {json.dumps(numbered)}\n\n"

    begun = _response(conversation, response_id, "in_progress", [], None)
    yield event("created", response=begun)
    yield event("in_progress", response=begun)
    for index, item in enumerate(_output(turn, response_id)):
        place = {"output_index": index, "item_id": item["id"]}
        if item["type"] == "function_call":
            yield event(
                "output_item.added", output_index=index, item={**item, "arguments": "", "status": "in_progress"}
            )
            yield event("function_call_arguments.delta", **place, delta=item["arguments"])
            yield event("function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"])
        else:
            [part] = item["content"]
            yield event("output_item.added", output_index=index, item={**item, "content": [], "status": "in_progress"})
            yield event("content_part.added", **place, content_index=0, part={**part, "text": ""})
            for piece in pieces(part["text"]):
                yield event("output_text.delta", **place, content_index=0, delta=piece, logprobs=[])
            yield event("output_text.done", **place, content_index=0, text=part["text"], logprobs=[])
            yield event("content_part.done", **place, content_index=0, part=part)
        yield event("output_item.done", output_index=index, item=item)
    yield event("completed", response=answer(turn, conversation, response_id))


def _output(turn: Turn, response_id: str) -> list[dict[str, Any]]:
    if turn.calls:
        return [
            {
                "type": "function_call",
                "id": f"fc_{call.id}",
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments,
                "status": "completed",
            }
            for call in turn.calls
        ]
    part = {"type": "output_text", "text": turn.text, "annotations": [], "logprobs": []}
    return [
        {"type": "message", "id": f"msg_{response_id}", "role": "assistant", "status": "completed", "content": [part]}
    ]


def _response(
    conversation: Conversation, response_id: str, status: str, output: list[dict[str, Any]], usage: Usage | None
) -> dict[str, Any]:
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "model": conversation.model,
        "output": output,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "usage": None if usage is None else _usage(usage),
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cache_read, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt + usage.completion,
    }
