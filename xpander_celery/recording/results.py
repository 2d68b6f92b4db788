"""Usage from what a job holds in its hands: responses and run outputs. It imports no provider's library.

Objects are recognized by the module and name of their class and by their attributes. Nothing here ever raises, and
nothing here decides whether a call was already counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xpander_celery.recording.agent_runs import agno_run, openai_agents_calls, pydantic_ai_calls, strands_calls
from xpander_celery.recording.calls import Call, Returned
from xpander_celery.recording.contained import pass_limit
from xpander_celery.recording.provider_usage import Numbers, numbers_of
from xpander_celery.recording.values import nanoseconds, result_of, text_in, value_at

_AGNO_RUNS = frozenset(
    {
        "RunOutput",
        "TeamRunOutput",
        "WorkflowRunOutput",
        "RunCompletedEvent",
        "TeamRunCompletedEvent",
        "WorkflowCompletedEvent",
    }
)
_WITH_RESPONSE_ID = ("openai", "anthropic", "litellm")  # libraries whose `id` is the provider's own
_NOT_MODEL_CALLS = ("CreateEmbeddingResponse", "EmbeddingResponse")
_CALLS_OF = {"agents": openai_agents_calls, "strands": strands_calls}  # agents' results, by the module of their class
_USAGE_PLACES = (
    ("usage",),
    ("usage_metadata",),
    ("metrics", "accumulated_usage"),
    ("accumulated_usage",),
    ("token_usage",),
)


def read_result(value: object) -> Returned | None:
    """What `value` says about usage, tools, content and failure; None if it is no response that is known here.

    Known are Agno's run, team and workflow outputs and their completion events; responses of OpenAI, Anthropic and
    LiteLLM; run results of the OpenAI Agents SDK, pydantic-ai, LangChain, CrewAI and Strands; and any mapping or object
    with a `usage` block, or that is one.
    """
    try:
        return _read(value)
    except Exception as failure:  # noqa: BLE001  a stranger's `__class__`, `__eq__`, `__bool__` or `__hash__`
        pass_limit(failure)
        return None


def _read(value: object) -> Returned | None:
    if value is None or isinstance(value, (str, bytes, int, float, list, tuple, set)):
        return None
    kind = type(value)
    root = (text_in(kind.__module__) or "").partition(".")[0]
    if root == "agno" and kind.__name__ in _AGNO_RUNS:
        return agno_run(value)
    if (
        kind.__name__ in _NOT_MODEL_CALLS or text_in(value_at(value, "object")) == "list"
    ):  # embeddings, as an object or mapping
        return None
    if root in _CALLS_OF and (calls := _CALLS_OF[root](value)):
        return Returned(calls=tuple(calls))
    numbers = _numbers_in(value, call=root == "pydantic_ai")
    if numbers is None:
        return None
    if root == "pydantic_ai":
        return Returned(calls=tuple(pydantic_ai_calls(value, numbers)))
    has_id = root in _WITH_RESPONSE_ID or isinstance(value, Mapping)
    return Returned(
        calls=(
            Call(
                *numbers,
                model=text_in(value_at(value, "model")),
                response_id=text_in(value_at(value, "id")) if has_id else None,
                created=nanoseconds(value_at(value, "created")) or nanoseconds(value_at(value, "created_at")),
            ),
        )
    )


def _numbers_in(value: object, *, call: bool) -> Numbers | None:
    """The usage block of a response, wherever it keeps one. pydantic-ai has a method where others have an attribute."""
    for places in _USAGE_PLACES:
        block: Any = value
        for place in places:
            block = value_at(block, place)
        if call and callable(block):
            block = result_of(block)
        numbers = None if block is None else numbers_of(block)
        if numbers is not None:
            return numbers
    return numbers_of(value)
