"""What is kept of a finished span: a few integers and names, never the span, which holds megabytes of messages.

Pure: it reads any object with the attributes of the SDK's `ReadableSpan`, and imports no OpenTelemetry.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Mapping
from json import loads
from typing import Any, NamedTuple

from xpander_celery.recording.attributes import (
    AGNO_PROVIDERS_BESIDE,
    AGNO_SCOPE,
    AGNO_VERTEX,
    AGNO_VERTEX_SPAN,
    BESIDE_PROVIDER_SCOPES,
    BESIDE_PROVIDERS,
    BESIDE_SCOPES,
    CACHE,
    CACHE_READ,
    CACHE_WRITE,
    COMPLETION,
    FRAMEWORK_KIND,
    LANGFUSE_USAGE,
    LITELLM_RAW_SPAN,
    LITELLM_USAGE,
    LOGFIRE_USAGE,
    MODEL,
    OPERATION,
    OPERATION_KIND,
    PENDING_KEY,
    PENDING_VALUE,
    PROMPT,
    PROVIDER,
    RELEVANT,
    REQUESTED_TOOL,
    RESPONSE_ID,
    TOOL_NAME,
    TOOL_SPAN_PREFIXES,
    TOTAL,
    Kind,
)
from xpander_celery.recording.provider_usage import Numbers, count, is_beside, numbers_of, numbers_of_buckets

# By name: looking a member up in an enumeration costs 0.1 µs, ten times in each span.
_PLAIN, _CONTAINER, _LLM, _TOOL, _EXCLUDED = Kind


class SpanFacts(NamedTuple):
    """One finished span, reduced. Prompts include cache; times are nanoseconds on the spans' clock.

    `prompt` is None where the span states no usage. `beside` says that the provider itself counts cache beside the
    prompt, so that it is taken out again when the numbers are sent.
    """

    span_id: int
    parent_id: int  # 0: none
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
    response_key: int = 0  # of the response's id, see `response_key`; 0: none
    tool: str | None = None
    requested: tuple[str, ...] = ()

    @property
    def has_usage(self) -> bool:
        """Whether the span states tokens of the job."""
        return self.prompt is not None

    @classmethod
    def from_span(cls, span: Any, span_id: int) -> SpanFacts | None:
        """The facts of an SDK span that has ended; None for a span that stands for another one (logfire's pending).

        Raises what a malformed span makes it raise; the caller contains that.
        """
        scope = span.instrumentation_scope
        parent = span.parent
        start = span.start_time or 0
        return facts_of(
            span_id,
            0 if parent is None else parent.span_id,
            "" if scope is None else scope.name,
            span.name,
            start,
            span.end_time or start,
            not span.status.is_ok,
            span.attributes.copy(),  # once: a look-up in the span's own mapping costs five times as much
        )

    @classmethod
    def from_dict(cls, span: Mapping[str, Any]) -> SpanFacts | None:
        """The facts of a span written as a plain mapping: span_id, parent_id, name, scope, start, end, attributes."""
        return facts_of(
            key_of(span["span_id"]),
            key_of(span["parent_id"]),
            span["scope"],
            span["name"],
            span["start"],
            span["end"],
            bool(span.get("failed", False)),
            dict(span["attributes"]),
        )


def facts_of(
    span_id: int,
    parent_id: int,
    scope: str,
    name: str,
    start: int,
    end: int,
    failed: bool,
    attributes: dict[str, Any],
) -> SpanFacts | None:
    """The facts of one span; None for a pending span, which stands for one that is still open.

    A user's code waits for this at the end of each span: one construction, and no look-up for spans without usage.
    """
    raw = name == LITELLM_RAW_SPAN
    if not raw and RELEVANT.isdisjoint(attributes) and not name.startswith(TOOL_SPAN_PREFIXES):
        return SpanFacts(span_id, parent_id, scope, _PLAIN, start, end, failed)
    if attributes.get(PENDING_KEY) == PENDING_VALUE:
        return None
    kind = _LLM if raw else _kind(name, attributes)
    if kind is _EXCLUDED:
        return SpanFacts(span_id, parent_id, scope, kind, start, end, failed)
    tool = _tool_name(name, attributes) if kind is _TOOL else None
    requested = _requested(attributes) if REQUESTED_TOOL[0] in attributes and kind is _LLM else ()
    numbers = _litellm_numbers(attributes) if raw else _numbers(scope, name, attributes)
    if numbers is None:
        return SpanFacts(span_id, parent_id, scope, kind, start, end, failed, tool=tool, requested=requested)
    return SpanFacts(
        span_id,
        parent_id,
        scope,
        kind or _CONTAINER,
        start,
        end,
        failed,
        *numbers,
        _first_text(attributes, MODEL),
        key_of(_first_text(attributes, RESPONSE_ID)),
        tool,
        requested,
    )


def key_of(text: str | None) -> int:
    """63 bits that stand for a text within this process, where keeping the text would cost ten times as much."""
    return hash(text) & 0x7FFF_FFFF_FFFF_FFFF if text else 0


def _kind(name: str, attributes: Mapping[str, Any]) -> Kind:
    named: Kind | None = None
    for key, kinds in FRAMEWORK_KIND:
        value = attributes.get(key)
        if value is not None and isinstance(value, str):
            kind = kinds.get(value.lower(), _PLAIN)
            if kind is _TOOL:
                return kind
            named = kind if named is None or kind > named else named
    if named is _LLM:
        return named
    operation = _operation(attributes)
    if operation is _TOOL or (named is None and _has_tool_name(name, attributes)):
        return _TOOL
    return operation if named is None else named


def _operation(attributes: Mapping[str, Any]) -> Kind:
    for key in OPERATION:
        value = attributes.get(key)
        if value is not None and isinstance(value, str):
            return OPERATION_KIND.get(value, _PLAIN)
    return _PLAIN


def _has_tool_name(name: str, attributes: Mapping[str, Any]) -> bool:
    return name.startswith(TOOL_SPAN_PREFIXES) or any(key in attributes for key in TOOL_NAME)


def _tool_name(name: str, attributes: Mapping[str, Any]) -> str:
    tool = _first_text(attributes, TOOL_NAME)
    if tool is None:
        tool = name
        for prefix in TOOL_SPAN_PREFIXES:
            tool = tool.removeprefix(prefix)
    return tool


def _requested(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """The tools that the model asked for, in its order."""
    names: list[str] = []
    for key in REQUESTED_TOOL:
        name = attributes.get(key)
        if not isinstance(name, str):
            break
        names.append(str.__str__(name))
    return tuple(names)


def _first_count(attributes: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = attributes.get(name)
        if value is not None:
            found = count(value)
            if found is not None:
                return found
    return None


def _first_text(attributes: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        value = attributes.get(name)
        if value and isinstance(value, str):
            return value if type(value) is str else str.__str__(value)  # of an enumeration's member, its text
    return None


def _numbers(scope: str, name: str, attributes: Mapping[str, Any]) -> tuple[int, int, int, int, bool] | None:
    """The counts of a span, as `Numbers` has them; None where it states neither prompt nor completion."""
    prompt = _first_count(attributes, PROMPT)
    completion = _first_count(attributes, COMPLETION)
    if prompt is None and completion is None:
        return _langfuse_numbers(attributes)
    prompt, completion = prompt or 0, completion or 0
    if attributes.keys().isdisjoint(CACHE):
        whole = _whole_usage(attributes)
        if whole is None:
            return prompt, completion, 0, 0, False
        return whole._replace(beside=whole.beside or _first_text(attributes, PROVIDER) in BESIDE_PROVIDERS)
    cache_read = _first_count(attributes, CACHE_READ) or 0
    cache_write = _first_count(attributes, CACHE_WRITE) or 0
    cache = cache_read + cache_write
    if not cache:
        return prompt, completion, 0, 0, False
    provider = (_first_text(attributes, PROVIDER) or "").lower()
    if _writes_prompt_without_cache(scope, name, provider) or is_beside(
        prompt, completion, cache, _first_count(attributes, TOTAL)
    ):
        return prompt + cache, completion, cache_read, cache_write, True
    beside = provider in BESIDE_PROVIDERS or scope in BESIDE_PROVIDER_SCOPES
    return prompt, completion, cache_read, cache_write, beside


def _writes_prompt_without_cache(scope: str, name: str, provider: str) -> bool:
    if scope == AGNO_SCOPE:
        return provider in AGNO_PROVIDERS_BESIDE or (provider == AGNO_VERTEX and name.startswith(AGNO_VERTEX_SPAN))
    return scope in BESIDE_SCOPES


def _whole_usage(attributes: Mapping[str, Any]) -> Numbers | None:
    """The provider's own usage block, where a layer keeps it beside counts that leave out the cache."""
    if LITELLM_USAGE in attributes:
        return _read_repr(attributes[LITELLM_USAGE])
    if LOGFIRE_USAGE in attributes:
        return numbers_of(_read_json(attributes[LOGFIRE_USAGE]))
    return None


def _langfuse_numbers(attributes: Mapping[str, Any]) -> Numbers | None:
    usage = _read_json(attributes.get(LANGFUSE_USAGE))
    return None if usage is None else numbers_of_buckets(usage)


def _read_json(text: object) -> dict[str, Any] | None:
    """The JSON object in a text; None for anything else."""
    try:
        value = loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _litellm_numbers(attributes: Mapping[str, Any]) -> Numbers | None:
    """The usage in `llm.<provider>.usage`."""
    for key, text in attributes.items():
        if key.startswith("llm.") and key.endswith(".usage"):
            return _read_repr(text)
    return None


def _read_repr(text: object) -> Numbers | None:
    """The usage in the repr of a dictionary, as LiteLLM writes it."""
    if not isinstance(text, str):
        return None
    try:
        return numbers_of(literal_eval(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
