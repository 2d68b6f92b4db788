"""Usage from what a job holds in its hands: responses and run outputs. It imports no provider's library.

Objects are recognized by the module and name of their class and by their attributes. Nothing here ever raises, and
nothing here decides whether a call was already counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xpander_celery.recording.attributes import AGNO_PROVIDERS_BESIDE, AGNO_VERTEX
from xpander_celery.recording.contained import pass_limit
from xpander_celery.recording.provider_usage import Numbers, numbers_of, value_at
from xpander_celery.report import Tokens

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
_USAGE_PLACES = (("usage",), ("usage_metadata",), ("metrics", "accumulated_usage"))
_DEEPEST = 16  # members of members
_SECOND = 1_000_000_000
_LATEST_S = 2**33  # the year 2242: more is no time in seconds


@dataclass(frozen=True)
class Call:
    """One call to a model (or the sum of several) as a response states it; `prompt` and `beside` as in `SpanFacts`."""

    prompt: int
    completion: int
    cache_read: int = 0
    cache_write: int = 0
    beside: bool = False
    model: str | None = None
    response_id: str | None = None
    created: int | None = None  # nanoseconds since the epoch, as the provider says
    run_id: str | None = None  # of the Agno run that made it
    began: int | None = None  # nanoseconds since the epoch, in whole seconds, as the Agno run says


@dataclass(frozen=True)
class Returned:
    """What a response or a run output says of itself. `content` is an Agno run's answer, as the agent gave it."""

    calls: tuple[Call, ...] = ()
    used_tools: tuple[str, ...] = ()
    content: Any = None
    failed: bool = False  # an Agno run of status error: it swallows the model's errors, and its content is the error


@dataclass(frozen=True)
class Added:
    """Something that `add_usage` got, and when (nanoseconds since the epoch). Plain `Tokens` are never a duplicate."""

    what: Tokens | Returned
    at: int


def read_result(value: object) -> Returned | None:
    """What `value` says about usage, tools, content and failure; None if it is no response that is known here.

    Known are Agno's run, team and workflow outputs and their completion events; responses of OpenAI, Anthropic and
    LiteLLM; run results of pydantic-ai, LangChain and Strands; and any mapping or object with a `usage` block, or that
    is one.
    """
    try:
        return _read(value)
    except Exception as failure:  # noqa: BLE001  a stranger's `__class__`, `__eq__`, `__bool__` or `__hash__`
        pass_limit(failure)
        return None


def without_earlier(returned: Returned, began: int) -> Returned:
    """What was spent since a job `began` (nanoseconds since the epoch), where an Agno run says so of its calls.

    A run that was paused may be continued by another job, and states all of its calls again. An output of which no
    call is of this job was made before, and is told as a whole.
    """
    since = began - began % _SECOND
    earlier = [call for call in returned.calls if call.began is not None and call.began < since]
    if not earlier or all(call.began is None or call.began < since for call in returned.calls):
        return returned
    return replace(returned, calls=tuple(call for call in returned.calls if call not in earlier))


def _read(value: object) -> Returned | None:
    if value is None or isinstance(value, (str, bytes, int, float, list, tuple, set)):
        return None
    kind = type(value)
    root = (_text(kind.__module__) or "").partition(".")[0]
    if root == "agno" and kind.__name__ in _AGNO_RUNS:
        return _run_output(value)
    if (
        kind.__name__ in _NOT_MODEL_CALLS or _text(value_at(value, "object")) == "list"
    ):  # embeddings, as an object or mapping
        return None
    numbers = _numbers_in(value, call=root == "pydantic_ai")
    if numbers is None:
        return None
    has_id = root in _WITH_RESPONSE_ID or isinstance(value, Mapping)
    return Returned(
        calls=(
            Call(
                *numbers,
                model=_text(value_at(value, "model")),
                response_id=_text(value_at(value, "id")) if has_id else None,
                created=_nanoseconds(value_at(value, "created")) or _nanoseconds(value_at(value, "created_at")),
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
            block = _called(block)
        numbers = None if block is None else numbers_of(block)
        if numbers is not None:
            return numbers
    return numbers_of(value)


def _called(method: Callable[[], object]) -> object:
    try:
        return method()
    except Exception as failure:  # noqa: BLE001  a stranger's method
        pass_limit(failure)
        return None


def _run_output(value: object) -> Returned:
    """An Agno run with its members and steps, each run once."""
    runs = list(_runs_in(value))
    calls = [call for run in runs for call in _calls_of_run(run)]
    if not calls:
        run_id = _text(value_at(value, "run_id"))
        calls = [replace(call, run_id=run_id) for step in _steps_of(value) for call in _calls_of_run(step)]
    return Returned(
        calls=tuple(calls),
        used_tools=tuple(dict.fromkeys(name for run in runs for name in _tools_of(run))),
        content=value_at(value, "content"),
        failed=_is_error(value_at(value, "status")),
    )


def _runs_in(value: object) -> Iterator[object]:
    """The run itself and every run below it. A workflow lists the members of a team both there and in the team."""
    seen: set[object] = set()
    waiting: list[tuple[object, int]] = [(value, 0)]
    while waiting:
        run, depth = waiting.pop(0)
        key = _text(value_at(run, "run_id")) or id(run)
        if run is None or key in seen or depth > _DEEPEST:
            continue
        seen.add(key)
        yield run
        for place in ("member_responses", "step_executor_runs"):
            waiting += [(member, depth + 1) for member in _items(value_at(run, place))]
        waiting.append((value_at(run, "workflow_agent_run"), depth + 1))


def _steps_of(value: object) -> Iterator[object]:
    """The steps of a workflow that keeps no run outputs, only their metrics."""
    steps = value_at(value_at(value, "metrics"), "steps")
    if isinstance(steps, Mapping):
        yield from steps.values()


def _calls_of_run(run: object) -> list[Call]:
    """The calls that one run made itself: message by message, so that each can be told from what spans gave.

    What the run's own sum holds beyond its messages (a memory or parser model) is one more.
    """
    provider, model, run_id = (_text(value_at(run, name)) for name in ("model_provider", "model", "run_id"))
    whole = _agno_numbers(value_at(run, "metrics"), provider, model)
    if whole is None:
        return []
    calls: list[Call] = []
    for message in _items(value_at(run, "messages")):
        if value_at(message, "from_history") is True or value_at(message, "role") != "assistant":
            continue
        numbers = _agno_numbers(value_at(message, "metrics"), provider, model)
        if numbers is not None:
            data = value_at(message, "provider_data")
            response_id = _text(value_at(data, "id")) or _text(value_at(data, "response_id"))
            began = _nanoseconds(value_at(message, "created_at"))
            calls.append(Call(*numbers, model=model, response_id=response_id, run_id=run_id, began=began))
    rest = _rest(whole, calls)
    if rest is None:
        return [Call(*whole, model=model, run_id=run_id)]
    return [*calls, Call(*rest, model=model, run_id=run_id)] if any(rest[:2]) else calls


def _agno_numbers(metrics: object, provider: str | None, model: str | None) -> Numbers | None:
    """Agno's metrics, whose prompt is without cache where the provider's is; None if they are empty."""
    numbers = numbers_of(metrics)
    if numbers is None or not any(numbers[:4]):
        return None
    provider = (provider or "").lower()
    beside = provider in AGNO_PROVIDERS_BESIDE or (provider == AGNO_VERTEX and (model or "").startswith("claude"))
    if beside and not numbers.beside:
        return numbers._replace(prompt=numbers.prompt + numbers.cache_read + numbers.cache_write, beside=True)
    return numbers


def _rest(whole: Numbers, calls: Iterable[Call]) -> Numbers | None:
    """What the whole holds beyond the calls; None if it holds less than they do."""
    prompt, completion, cache_read, cache_write, beside = whole
    for call in calls:
        prompt -= call.prompt
        completion -= call.completion
        cache_read -= call.cache_read
        cache_write -= call.cache_write
    rest = Numbers(prompt, completion, cache_read, cache_write, beside)
    return None if min(rest[:4]) < 0 else rest


def _tools_of(run: object) -> Iterator[str]:
    for tool in _items(value_at(run, "tools")):
        name = _text(value_at(tool, "tool_name"))
        if name:
            yield name


def _is_error(status: object) -> bool:
    return str(getattr(status, "value", status)).lower() == "error"


def _items(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else ()


def _text(value: object) -> str | None:
    """A plain `str`: a class derived from it may compare and hash as it likes."""
    return str.__str__(value) or None if isinstance(value, str) else None


def _nanoseconds(seconds: object) -> int | None:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < _LATEST_S:
        return None
    return int(seconds * 1e9)
