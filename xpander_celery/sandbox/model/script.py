"""What the scripted model says to a conversation, and what it counts for it. Pure; knows no provider's wire form."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xpander_celery.sandbox.model.samples import sample

_ORDER = re.compile(r"\[(error|slow) (\d+(?:\.\d+)?)\]")
_ONE_BY_ONE = "[one by one]"
_NO_TOOLS = "[no tools]"
_OVERHEAD_TOKENS = 96  # what a provider adds of its own, and enough for a cache to matter
_CACHE_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that the request offers; `schema` is the JSON schema of its arguments."""

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A request in no provider's words. `called` are the tools called since the user spoke last."""

    model: str
    user_text: str
    size: int  # characters of everything that was sent
    tools: tuple[Tool, ...] = ()
    called: tuple[str, ...] = ()
    tool_results: tuple[str, ...] = ()
    answer_schema: Mapping[str, Any] | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call. `prompt` holds the cached ones too; a provider that counts them apart subtracts."""

    prompt: int
    completion: int
    cache_read: int
    cache_write: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer of the model: tool calls, or text."""

    text: str
    calls: tuple[ToolCall, ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class Orders:
    """What the user's text orders beside an answer."""

    error_status: int | None = None
    delay_s: float = 0.0


def orders(conversation: Conversation) -> Orders:
    """The orders in the user's text."""
    found = dict(_ORDER.findall(conversation.user_text))
    status = found.get("error")
    return Orders(None if status is None else int(float(status)), float(found.get("slow", 0)))


def next_turn(conversation: Conversation) -> Turn:
    """What the model says next."""
    digest = zlib.crc32(f"{conversation.seed}|{conversation.size}|{conversation.user_text}".encode())
    calls = _calls(conversation, digest)
    text = "" if calls else _answer(conversation)
    written = len(text) + sum(len(call.name) + len(call.arguments) for call in calls)
    return Turn(text, calls, _usage(conversation, digest, written))


def _calls(conversation: Conversation, digest: int) -> tuple[ToolCall, ...]:
    if _NO_TOOLS in conversation.user_text:
        return ()
    wanted = [tool for tool in conversation.tools if tool.name not in conversation.called]
    if conversation.called and _ONE_BY_ONE not in conversation.user_text:
        return ()
    if _ONE_BY_ONE in conversation.user_text:
        wanted = wanted[:1]
    return tuple(
        ToolCall(
            id=f"call_{digest:08x}_{number + len(conversation.called)}",
            name=tool.name,
            arguments=json.dumps(sample(tool.schema, _without_orders(conversation.user_text))),
        )
        for number, tool in enumerate(wanted)
    )


def _answer(conversation: Conversation) -> str:
    question = _without_orders(conversation.user_text)
    if conversation.answer_schema is not None:
        return json.dumps(sample(conversation.answer_schema, question))
    if not conversation.tool_results:
        return f"The scripted model has no tools to ask about: {question}"
    said = zip(conversation.called, conversation.tool_results, strict=False)
    return f"My tools said {', '.join(f'{name}: {result}' for name, result in said)}. You asked: {question}"


def _without_orders(text: str) -> str:
    for order in (_ONE_BY_ONE, _NO_TOOLS):
        text = text.replace(order, "")
    return _ORDER.sub("", text).strip()


def _usage(conversation: Conversation, digest: int, written: int) -> Usage:
    """Counts that vary with the digest: up to three quarters cached, and at least half after tool calls."""
    prompt = _OVERHEAD_TOKENS + conversation.size // 4 + digest % 7
    quarters = digest // 7 % 4
    if conversation.called:
        quarters = max(2, quarters)
    cache_read = prompt * quarters // 4 // _CACHE_BLOCK * _CACHE_BLOCK
    cache_write = (prompt - cache_read) // 2 // _CACHE_BLOCK * _CACHE_BLOCK
    return Usage(prompt, max(1, written // 4) + digest % 5, cache_read, cache_write)
