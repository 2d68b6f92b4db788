"""The usage block of a model's answer, as each provider and framework writes it, read into one form. Pure.

It reads mappings and objects alike, by name, and never raises: what is no count is not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from xpander_celery.recording.values import value_at

_PROMPT = ("prompt_tokens", "input_tokens", "inputTokens", "prompt_token_count")
_COMPLETION = ("completion_tokens", "output_tokens", "outputTokens", "candidates_token_count")
_THOUGHTS = "thoughts_token_count"  # Gemini counts them beside the answer
_CACHE_READ = (
    "cache_read_input_tokens",
    "cacheReadInputTokens",
    "cache_read_tokens",
    "cached_content_token_count",
    "cached_prompt_tokens",
    "prompt_tokens_details.cached_tokens",
    "input_tokens_details.cached_tokens",
    "input_token_details.cache_read",
)
_CACHE_WRITE = (
    "cache_creation_input_tokens",
    "cacheWriteInputTokens",
    "cache_write_tokens",
    "cache_creation_tokens",
    "prompt_tokens_details.cache_creation_tokens",
    "prompt_tokens_details.cache_write_tokens",
    "input_tokens_details.cache_write_tokens",
    "input_token_details.cache_creation",
)
_TOTAL = ("total_tokens", "totalTokens", "total_token_count")
# Anthropic counts cache beside this prompt.
_ANTHROPIC = ("input_tokens", ("cache_read_input_tokens", "cache_creation_input_tokens"))
# Bedrock does so too, and its total says it. Strands writes every provider's counts under Bedrock's names.
_BEDROCK = ("inputTokens", ("cacheReadInputTokens", "cacheWriteInputTokens"))

# Langfuse's own buckets are disjoint, so the prompt is the sum of these and of every `input_*`.
_BUCKET_CACHE_READ = ("input_cache_read", "input_cached_tokens", "cache_read_input_tokens")
_BUCKET_CACHE_WRITE = ("input_cache_creation", "cache_creation_input_tokens")


_MOST_DIGITS = 15  # more is no count of tokens, and sums must fit 63 bits
_MOST = 10**_MOST_DIGITS


class Numbers(NamedTuple):
    """One usage block. The prompt includes cache; `beside`: its provider counts cache beside the prompt."""

    prompt: int = 0
    completion: int = 0
    cache_read: int = 0
    cache_write: int = 0
    beside: bool = False


def count(value: object) -> int | None:
    """A count as it is found in the wild: a non-negative integer or a string of digits, nothing else."""
    if type(value) is int:
        return value if 0 <= value < _MOST else None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS:
        return int(value)
    return None


def is_beside(prompt: int, completion: int, cache: int, total: int | None) -> bool:
    """Whether the numbers show a prompt without its cache. That total = prompt + completion proves nothing."""
    return cache > prompt or (cache > 0 and total == prompt + completion + cache)


def numbers_of(usage: object) -> Numbers | None:
    """The counts in a usage block; None if it states neither prompt nor completion."""
    prompt = _first(usage, _PROMPT)
    completion = _first(usage, _COMPLETION)
    if prompt is None and completion is None:
        return None
    prompt = prompt or 0
    completion = (completion or 0) + (_count_at(usage, _THOUGHTS) or 0)
    cache_read = _first(usage, _CACHE_READ) or 0
    cache_write = _first(usage, _CACHE_WRITE) or 0
    cache = cache_read + cache_write
    total = _first(usage, _TOTAL)
    beside = is_beside(prompt, completion, cache, total) or _has(usage, *_ANTHROPIC)
    if total != prompt + completion:
        beside = beside or _has(usage, *_BEDROCK)
    return Numbers(prompt + cache if beside else prompt, completion, cache_read, cache_write, beside)


def numbers_of_buckets(usage: Mapping[str, Any]) -> Numbers | None:
    """The counts in Langfuse's `usage_details`; None if it states neither input nor output."""
    if any(name in usage for name in _PROMPT):
        return numbers_of(usage)
    inputs = [name for name in usage if name == "input" or name.startswith("input_")]
    outputs = [name for name in usage if name == "output" or name.startswith("output_")]
    if not inputs and not outputs:
        return None
    cache_read, cache_write = _sum(usage, _BUCKET_CACHE_READ), _sum(usage, _BUCKET_CACHE_WRITE)
    prompt = _sum(usage, {*inputs, *_BUCKET_CACHE_READ, *_BUCKET_CACHE_WRITE})
    return Numbers(prompt, _sum(usage, outputs), cache_read, cache_write)


def _has(usage: object, prompt: str, cache: tuple[str, ...]) -> bool:
    return _count_at(usage, prompt) is not None and _first(usage, cache) is not None


def _first(usage: object, names: tuple[str, ...]) -> int | None:
    """The first count that is above zero, else the first that is there: some answers hold the zeros of another form."""
    found: int | None = None
    for name in names:
        value = _count_at(usage, name)
        if value:
            return value
        if found is None:
            found = value
    return found


def _count_at(usage: object, path: str) -> int | None:
    outer, _, inner = path.partition(".")
    value = value_at(usage, outer)
    return count(value_at(value, inner) if inner and value is not None else value)


def _sum(usage: Mapping[str, Any], names: Iterable[str]) -> int:
    return sum(count(usage.get(name)) or 0 for name in names)
