"""Fits an event into one record: what is too large or cannot be encoded is cut, the event is not lost. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from xpander_celery.events import encode
from xpander_celery.journal.segments import MAX_RECORD_BYTES
from xpander_celery.rendering import cut, to_text

_KEPT_BYTES = 4096
_IDENTITY = ("v", "kind", "job_id", "attempt_id", "at", "child", "owner")
_ESSENTIAL = (*_IDENTITY, "outcome", "duration_s", "continues", "before_start")


def record_text(event: dict[str, Any]) -> tuple[bytes | None, bool]:
    """The text of `event`, and whether it had to be trimmed to fit; None if it cannot be recorded at all."""
    try:
        text = encode(event)
    except (ValueError, TypeError, RecursionError):
        return fitted(event), True
    return (text, False) if len(text) <= MAX_RECORD_BYTES else (fitted(event), True)


def fitted(event: dict[str, Any]) -> bytes | None:
    """The text of `event` with its largest values cut, as few of them as it takes; None if nothing helps."""
    for candidate in _smaller_and_smaller(event):
        try:
            text = encode(candidate)
        except (ValueError, TypeError, RecursionError):
            continue  # what cannot be encoded is in a value that a later step cuts
        if len(text) <= MAX_RECORD_BYTES:
            return text
    return None


def _smaller_and_smaller(event: dict[str, Any]) -> Iterator[dict[str, Any]]:
    smaller = dict(event)
    for key, reduced in _STEPS:
        if smaller.get(key):
            smaller[key] = reduced(smaller[key])
            yield smaller
    yield {key: smaller[key] for key in (*_ESSENTIAL, "tokens", "facts") if key in smaller}
    facts = smaller.get("facts") or {}
    bare = {key: smaller[key] for key in _ESSENTIAL if key in smaller}
    yield {**bare, "facts": {"task": cut(str(facts.get("task")), _KEPT_BYTES), "agent_id": facts.get("agent_id")}}


def _beginning(value: Any) -> str:
    return cut(to_text(value) or "", _KEPT_BYTES)


def _facts_without_input(facts: dict[str, Any]) -> dict[str, Any]:
    return {**facts, "input": _beginning(facts["input"])} if facts.get("input") else facts


def _first_hundred(values: Any) -> list[Any]:
    return list(values)[:100]


_STEPS: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("llm_response", _beginning),
    ("result", _beginning),
    ("input", _beginning),
    ("facts", _facts_without_input),
    ("used_tools", _first_hundred),
    ("carried", _first_hundred),
)
