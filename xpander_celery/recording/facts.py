"""What is kept of a finished span: a few integers and names, never the span, which holds megabytes of messages.

Pure: it reads any object with the attributes of the SDK's `ReadableSpan`, and imports no OpenTelemetry.
"""

from __future__ import annotations

from collections.abc import Mapping
from sys import intern
from typing import Any, NamedTuple

from xpander_celery.recording import attributes as keys
from xpander_celery.recording.attributes import Kind


class Counts(NamedTuple):
    """Tokens as one span states them. None: not stated."""

    prompt: int | None = None
    completion: int | None = None
    cache_read: int | None = None
    cache_write: int | None = None
    total: int | None = None


class SpanFacts(NamedTuple):
    """One finished span, reduced. Prompts include cache; times are nanoseconds on the spans' clock.

    `prompt` is None where the span states no usage. `beside` says that the provider itself counts cache beside the
    prompt, so that it is taken out again when the numbers are sent.
    """

    span_id: int | str
    parent_id: int | str | None
    scope: str
    kind: Kind
    start: int
    end: int
    failed: bool = False
    prompt: int | None = None
    completion: int = 0
    cache_read: int = 0
    cache_write: int = 0
    beside: bool = False
    model: str | None = None
    response_id: str | None = None
    tool: str | None = None
    requested: tuple[str, ...] = ()

    @property
    def has_usage(self) -> bool:
        """Whether the span states tokens of the job."""
        return self.prompt is not None

    @classmethod
    def from_span(cls, span: Any) -> SpanFacts | None:
        """The facts of an SDK span that has ended; None for a span that stands for another one (logfire's pending).

        Raises what a malformed span makes it raise; the caller contains that.
        """
        scope = span.instrumentation_scope
        parent = span.parent
        return facts_of(
            span_id=span.context.span_id,
            parent_id=None if parent is None else parent.span_id,
            scope="" if scope is None else scope.name,
            name=span.name,
            start=span.start_time or 0,
            end=span.end_time or span.start_time or 0,
            failed=not span.status.is_ok,
            attributes=span.attributes.copy(),  # once: a look-up in the span's own mapping costs five times as much
        )

    @classmethod
    def from_dict(cls, span: Mapping[str, Any]) -> SpanFacts | None:
        """The facts of a span written as a plain mapping: span_id, parent_id, name, scope, start, end, attributes."""
        return facts_of(
            span_id=span["span_id"],
            parent_id=span["parent_id"],
            scope=span["scope"],
            name=span["name"],
            start=span["start"],
            end=span["end"],
            failed=bool(span.get("failed", False)),
            attributes=dict(span["attributes"]),
        )


def facts_of(
    *,
    span_id: int | str,
    parent_id: int | str | None,
    scope: str,
    name: str,
    start: int,
    end: int,
    failed: bool,
    attributes: dict[str, Any],
) -> SpanFacts | None:
    """The facts of one span; None for a pending span, which stands for one that is still open."""
    scope = intern(scope)
    raw = name == keys.LITELLM_RAW_SPAN
    if not raw and keys.RELEVANT.isdisjoint(attributes):
        kind = Kind.TOOL if name.startswith(keys.TOOL_SPAN_PREFIXES) else Kind.PLAIN
        tool = _tool_name(name, attributes) if kind is Kind.TOOL else None
        return SpanFacts(span_id, parent_id, scope, kind, start, end, failed, tool=tool)
    if attributes.get(keys.PENDING[0]) == keys.PENDING[1]:
        return None
    kind = Kind.LLM if raw else _kind(name, attributes)
    if kind is Kind.EXCLUDED:
        return SpanFacts(span_id, parent_id, scope, kind, start, end, failed)
    tool = _tool_name(name, attributes) if kind is Kind.TOOL else None
    counts = _litellm_counts(attributes) if raw else _counts(attributes)
    prompt, completion, cache_read, cache_write, total = counts
    if prompt is None and completion is None:
        return SpanFacts(
            span_id, parent_id, scope, kind, start, end, failed, tool=tool, requested=_requested(attributes, kind)
        )
    if kind is Kind.PLAIN:
        kind = Kind.CONTAINER
    model = _first_text(attributes, keys.MODEL)
    response_id = _first_text(attributes, keys.RESPONSE_ID)
    provider = (_first_text(attributes, keys.PROVIDER) or "").lower()
    prompt, completion, cache_read, cache_write = prompt or 0, completion or 0, cache_read or 0, cache_write or 0
    exclusive = _is_exclusive(scope, name, provider, prompt, completion, cache_read + cache_write, total)
    if exclusive:
        prompt += cache_read + cache_write
    return SpanFacts(
        span_id,
        parent_id,
        scope,
        kind,
        start,
        end,
        failed,
        prompt,
        completion,
        cache_read,
        cache_write,
        exclusive or provider in keys.BESIDE_PROVIDERS or scope in keys.BESIDE_PROVIDER_SCOPES,
        None if model is None else intern(model),
        response_id,
        tool,
        _requested(attributes, kind),
    )


def count(value: object) -> int | None:
    """A count as instrumentations write it: a non-negative integer or a string of digits, nothing else."""
    if type(value) is int:
        return value if value >= 0 else None
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    return None


def _kind(name: str, attributes: Mapping[str, Any]) -> Kind:
    named: Kind | None = None
    for key, kinds in keys.FRAMEWORK_KIND.items():
        value = attributes.get(key)
        if isinstance(value, str):
            kind = kinds.get(value.lower(), Kind.PLAIN)
            if kind is Kind.TOOL:
                return kind
            named = kind if named is None or kind > named else named
    operation = Kind.PLAIN
    for key in keys.OPERATION:
        value = attributes.get(key)
        if isinstance(value, str):
            operation = keys.OPERATION_KIND.get(value, Kind.PLAIN)
            break
    if operation is Kind.TOOL or (named is None and _has_tool_name(name, attributes)):
        return Kind.TOOL
    return operation if named is None else named


def _has_tool_name(name: str, attributes: Mapping[str, Any]) -> bool:
    return name.startswith(keys.TOOL_SPAN_PREFIXES) or any(key in attributes for key in keys.TOOL_NAME)


def _tool_name(name: str, attributes: Mapping[str, Any]) -> str:
    tool = _first_text(attributes, keys.TOOL_NAME)
    if tool is None:
        tool = name
        for prefix in keys.TOOL_SPAN_PREFIXES:
            tool = tool.removeprefix(prefix)
    return intern(tool)


def _requested(attributes: Mapping[str, Any], kind: Kind) -> tuple[str, ...]:
    """The tools that the model asked for, in its order."""
    if kind is not Kind.LLM:
        return ()
    names: list[str] = []
    for key in keys.REQUESTED_TOOL:
        name = attributes.get(key)
        if not isinstance(name, str):
            break
        names.append(intern(name))
    return tuple(names)


def _first_count(attributes: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        if name in attributes:
            value = count(attributes[name])
            if value is not None:
                return value
    return None


def _first_text(attributes: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        value = attributes.get(name)
        if value and isinstance(value, str):
            return value
    return None


def _counts(attributes: Mapping[str, Any]) -> Counts:
    counts = Counts(
        _first_count(attributes, keys.PROMPT),
        _first_count(attributes, keys.COMPLETION),
        _first_count(attributes, keys.CACHE_READ),
        _first_count(attributes, keys.CACHE_WRITE),
        _first_count(attributes, keys.TOTAL),
    )
    if counts.prompt is None and counts.completion is None and keys.LANGFUSE_USAGE in attributes:
        return _langfuse_counts(attributes[keys.LANGFUSE_USAGE])
    return counts


def _is_exclusive(
    scope: str, name: str, provider: str, prompt: int, completion: int, cache: int, total: int | None
) -> bool:
    """Whether the prompt was written without the cache. That total = prompt + completion proves nothing."""
    if not cache:
        return False
    if cache > prompt or total == prompt + completion + cache or scope in keys.BESIDE_SCOPES:
        return True
    if provider in keys.BESIDE_SCOPES_BY_PROVIDER.get(scope, ()):
        return True
    return scope == keys.AGNO_SCOPE and provider == keys.AGNO_CLAUDE_PROVIDER and name.startswith(keys.AGNO_CLAUDE_SPAN)


def _langfuse_counts(text: object) -> Counts:
    return Counts()


def _litellm_counts(attributes: Mapping[str, Any]) -> Counts:
    return Counts()
