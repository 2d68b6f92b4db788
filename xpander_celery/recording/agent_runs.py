"""What agents of Agno, OpenAI, pydantic-ai and Strands say of a run, call by call, so that the spans are recognized.

It imports none of these libraries: their objects are read by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from xpander_celery.recording.attributes import AGNO_PROVIDERS_BESIDE, AGNO_VERTEX
from xpander_celery.recording.calls import Call, Returned
from xpander_celery.recording.provider_usage import Numbers, numbers_of
from xpander_celery.recording.values import items_of, nanoseconds, result_of, text_in, value_at

_DEEPEST = 16  # members of members
_MOST_INVOCATIONS = 100  # of one agent, the latest: an agent may live as long as its process


def agno_run(value: object) -> Returned:
    """An Agno run with its members and steps, each run once."""
    runs = list(_runs_in(value))
    calls = [call for run in runs for call in _calls_of_run(run)]
    if not calls:
        run_id = text_in(value_at(value, "run_id"))
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
        key = text_in(value_at(run, "run_id")) or id(run)
        if run is None or key in seen or depth > _DEEPEST:
            continue
        seen.add(key)
        yield run
        for place in ("member_responses", "step_executor_runs"):
            waiting += [(member, depth + 1) for member in items_of(value_at(run, place))]
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
    provider, model, run_id = (text_in(value_at(run, name)) for name in ("model_provider", "model", "run_id"))
    whole = _agno_numbers(value_at(run, "metrics"), provider, model)
    if whole is None:
        return []
    calls: list[Call] = []
    for message in items_of(value_at(run, "messages")):
        if value_at(message, "from_history") is True or value_at(message, "role") != "assistant":
            continue
        numbers = _agno_numbers(value_at(message, "metrics"), provider, model)
        if numbers is not None:
            data = value_at(message, "provider_data")
            response_id = text_in(value_at(data, "id")) or text_in(value_at(data, "response_id"))
            began = nanoseconds(value_at(message, "created_at"))
            calls.append(Call(*numbers, model=model, response_id=response_id, run_id=run_id, began=began))
    return _all_of(Call(*whole, model=model, run_id=run_id), calls)


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


def _all_of(whole: Call, calls: list[Call]) -> list[Call]:
    """The calls, and what the whole holds beyond them as one more; the whole alone if it holds less than they do."""
    rest = replace(
        whole,
        prompt=whole.prompt - sum(call.prompt for call in calls),
        completion=whole.completion - sum(call.completion for call in calls),
        cache_read=whole.cache_read - sum(call.cache_read for call in calls),
        cache_write=whole.cache_write - sum(call.cache_write for call in calls),
    )
    if min(rest.prompt, rest.completion, rest.cache_read, rest.cache_write) < 0:
        return [whole]
    return [*calls, rest] if rest.prompt or rest.completion else calls


def _tools_of(run: object) -> Iterator[str]:
    for tool in items_of(value_at(run, "tools")):
        name = text_in(value_at(tool, "tool_name"))
        if name:
            yield name


def _is_error(status: object) -> bool:
    return str(getattr(status, "value", status)).lower() == "error"


def pydantic_ai_calls(result: object, whole: Numbers) -> list[Call]:
    """The calls of one run of pydantic-ai, whose own sum is `whole`."""
    new_messages = value_at(result, "new_messages")
    run_id = text_in(value_at(result, "run_id"))
    model = None
    calls: list[Call] = []
    for message in items_of(result_of(new_messages) if callable(new_messages) else None):
        numbers = numbers_of(value_at(message, "usage")) if value_at(message, "kind") == "response" else None
        if numbers is not None:
            model = text_in(value_at(message, "model_name"))
            response_id = text_in(value_at(message, "provider_response_id"))
            calls.append(Call(*numbers, model=model, response_id=response_id, run_id=run_id))
    return _all_of(Call(*whole, model=model, run_id=run_id), calls)


def openai_agents_calls(result: object) -> list[Call]:
    """The calls of one run of the OpenAI Agents SDK. Its sum holds those of agents that it used as tools, too."""
    calls: list[Call] = []
    for response in items_of(value_at(result, "raw_responses")):
        numbers = numbers_of(value_at(response, "usage"))
        if numbers is not None:
            calls.append(Call(*numbers, response_id=text_in(value_at(response, "response_id"))))
    whole = numbers_of(value_at(value_at(result, "context_wrapper"), "usage"))
    return calls if whole is None else _all_of(Call(*whole), calls)


def strands_calls(result: object) -> list[Call]:
    """The calls of a Strands agent, cycle by cycle, in all of its latest invocations.

    It keeps one object of metrics for its lifetime, which all of its results share: none tells of one invocation alone.
    """
    metrics = value_at(result, "metrics")
    cycles: list[tuple[str | None, object]] = []
    for invocation in items_of(value_at(metrics, "agent_invocations"))[-_MOST_INVOCATIONS:]:
        its_cycles = items_of(value_at(invocation, "cycles"))
        run_id = text_in(value_at(its_cycles[0], "event_loop_cycle_id")) if its_cycles else None
        cycles += [(run_id, value_at(cycle, "usage")) for cycle in its_cycles]
    if not cycles:
        return []
    traces = items_of(value_at(metrics, "traces"))[-len(cycles) :]  # one of each cycle
    times = [None] * (len(cycles) - len(traces)) + [nanoseconds(value_at(trace, "start_time")) for trace in traces]
    calls: list[Call] = []
    for (run_id, usage), began in zip(cycles, times, strict=True):
        numbers = numbers_of(usage)
        if numbers is not None:
            calls.append(Call(*numbers, run_id=run_id, began=began))
    return calls
