"""From the facts of a job's spans to its tokens and tools. Pure: no OpenTelemetry, no clock, no state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from xpander_celery.recording.attributes import Kind
from xpander_celery.recording.facts import SpanFacts
from xpander_celery.recording.results import Added, Returned
from xpander_celery.report import Tokens


@dataclass(frozen=True)
class Usage:
    """What a job spent. `inclusive` counts cached tokens inside the prompt; `sent` keeps each provider's semantics."""

    inclusive: Tokens = field(default_factory=Tokens)
    sent: Tokens = field(default_factory=Tokens)
    by_model: Mapping[str, Tokens] = field(default_factory=dict)  # inclusive; "" where no model was named
    used_tools: tuple[str, ...] = ()  # distinct, in order of first use
    llm_calls: int = 0
    llm_errors: int = 0
    tool_calls: int = 0
    tool_errors: int = 0


def usage_of(spans: Iterable[SpanFacts], *, added: Iterable[Added] = (), returned: Returned | None = None) -> Usage:
    """The usage that the spans of one job state, and what was added explicitly, each call once.

    An added response that a span gave already is not counted again; plain tokens always are. `returned`, read from the
    job's return value, counts only if there is nothing else.
    """
    prompt = completion = 0
    tools: dict[str, None] = {}
    for span in spans:
        if span.kind is Kind.LLM and span.prompt is not None:
            prompt += span.prompt
            completion += span.completion
        if span.tool:
            tools[span.tool] = None
    tokens = Tokens(prompt_tokens=prompt, completion_tokens=completion)
    return Usage(inclusive=tokens, sent=tokens, used_tools=tuple(tools))
