"""Random jobs made of known calls: however many layers repeat a call, and whatever agents restate, totals are those."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from xpander_celery.recording import calls as added_calls
from xpander_celery.recording.calls import Added, Returned
from xpander_celery.recording.facts import SpanFacts
from xpander_celery.recording.usage import usage_of

# Client layers see every call of the job; a framework layer sees those of its own agents.
CLIENTS = {
    "openinference.instrumentation.openai": "openinference",
    "opentelemetry.instrumentation.genai.openai": "gen_ai",
    "opentelemetry.instrumentation.openai": "gen_ai",
    "com.anthropic.sdk.python": "gen_ai",
}
MODELS = ("gpt-4o", "claude-sonnet-4")


@dataclass(frozen=True)
class Call:
    """One call, as the provider served it."""

    prompt: int
    completion: int
    cache_read: int
    cache_write: int
    model: str
    beside_agent: bool  # some layers' spans lie outside of the agent's, as callbacks that lose the context do


@dataclass(frozen=True)
class Agent:
    """One agent of a framework, or plain code."""

    framework: str
    calls: tuple[Call, ...]
    agents: tuple[Agent, ...] = ()
    parallel: bool = False

    def all_calls(self) -> list[Call]:
        return [*self.calls, *(call for agent in self.agents for call in agent.all_calls())]


@dataclass
class Builder:
    """Writes the spans that the layers would write."""

    clients: tuple[str, ...]
    nested_clients: bool
    with_ids: bool
    without_cache: frozenset[str]
    spans: list[dict[str, Any]] = field(default_factory=list)
    now: int = 0

    def span(self, parent: str | None, scope: str, start: int, end: int, attributes: dict[str, Any]) -> str:
        span_id = f"s{len(self.spans)}"
        self.spans.append(
            {
                "span_id": span_id,
                "parent_id": parent,
                "name": span_id,
                "scope": scope,
                "start": start,
                "end": end,
                "attributes": attributes,
            }
        )
        return span_id

    def job(self, agents: tuple[Agent, ...]) -> None:
        root = self.span(None, "xpander_celery", 0, 10**9, {})
        for agent in agents:
            self.agent(agent, root)

    def agent(self, agent: Agent, parent: str) -> None:
        start = self.now
        own = parent
        if agent.framework != "plain":
            own = self.span(parent, SCOPES[agent.framework], start, 0, self.agent_attributes(agent))
        for call in agent.calls:
            if not agent.parallel:
                self.now += 1000
            self.call(call, agent, own, parent)
        self.now += 1000
        for inner in agent.agents:
            tool = self.span(own, SCOPES[agent.framework], self.now, self.now + 1, {"tool.name": "delegate"})
            self.agent(inner, tool)
        self.now += 1000
        for span in self.spans:
            if span["span_id"] == own and own != parent:
                span["end"] = self.now

    def call(self, call: Call, agent: Agent, own: str, outside: str) -> None:
        layers = [] if agent.framework in ("plain", "agents only") else [SCOPES[agent.framework]]
        layers += self.clients
        response_id = f"r{len(self.spans)}" if self.with_ids else None
        parent = own
        for depth, layer in enumerate(layers):
            if depth and not self.nested_clients:
                parent = outside if call.beside_agent else own
            start, end = self.now + depth, self.now + 900 - depth
            span_id = self.span(parent, layer, start, end, self.call_attributes(call, layer, response_id, depth))
            if self.nested_clients:
                parent = span_id

    def call_attributes(self, call: Call, layer: str, response_id: str | None, depth: int) -> dict[str, Any]:
        cached = layer not in self.without_cache or depth == 0
        if CLIENTS.get(layer) == "openinference" or layer == SCOPES["agno"]:
            attributes: dict[str, Any] = {
                "openinference.span.kind": "LLM",
                "llm.model_name": call.model,
                "llm.token_count.prompt": call.prompt,
                "llm.token_count.completion": call.completion,
            }
            if cached:
                attributes["llm.token_count.prompt_details.cache_read"] = call.cache_read
                attributes["llm.token_count.prompt_details.cache_write"] = call.cache_write
            return attributes
        attributes = {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": call.model,
            "gen_ai.usage.input_tokens": call.prompt,
            "gen_ai.usage.output_tokens": call.completion,
        }
        if cached:
            attributes["gen_ai.usage.cache_read.input_tokens"] = call.cache_read
            attributes["gen_ai.usage.cache_creation.input_tokens"] = call.cache_write
        if response_id is not None:
            attributes["gen_ai.response.id"] = response_id
        return attributes

    def agent_attributes(self, agent: Agent) -> dict[str, Any]:
        calls = agent.calls if agent.framework == "agents only" else agent.all_calls()
        if agent.framework == "agno":
            return {"openinference.span.kind": "AGENT"}
        prefix = "gen_ai.aggregated_usage" if agent.framework == "pydantic-ai" else "gen_ai.usage"
        attributes: dict[str, Any] = {"gen_ai.operation.name": "invoke_agent"}
        if calls:
            attributes[f"{prefix}.input_tokens"] = sum(call.prompt for call in calls)
            attributes[f"{prefix}.output_tokens"] = sum(call.completion for call in calls)
            attributes[f"{prefix}.cache_read.input_tokens"] = sum(call.cache_read for call in calls)
            attributes[f"{prefix}.cache_creation.input_tokens"] = sum(call.cache_write for call in calls)
        return attributes


SCOPES = {
    "plain": "none",
    "agno": "openinference.instrumentation.agno",
    "strands": "strands.telemetry.tracer",
    "pydantic-ai": "pydantic-ai",
    "agents only": "opentelemetry.instrumentation.agno",
}

calls = st.builds(
    lambda prompt, completion, read, write, model, beside: Call(
        prompt + read + write, completion, read, write, model, beside
    ),
    prompt=st.integers(1, 5) | st.integers(1, 10_000),
    completion=st.integers(1, 3) | st.integers(1, 2_000),
    read=st.just(0) | st.integers(0, 500),
    write=st.just(0) | st.integers(0, 500),
    model=st.sampled_from(MODELS),
    beside=st.booleans(),
)


def agents_in(frameworks: tuple[str, ...], *, depth: int) -> st.SearchStrategy[Agent]:
    """Agents of these frameworks. One that reports only its agents has only its own kind below."""
    below: st.SearchStrategy[tuple[Agent, ...]] = st.just(())

    def agent(framework: str) -> st.SearchStrategy[Agent]:
        inner = below
        if depth:
            kinds = ("agents only",) if framework == "agents only" else frameworks
            inner = st.lists(agents_in(kinds, depth=depth - 1), max_size=2).map(tuple)
        return st.builds(
            Agent,
            framework=st.just(framework),
            calls=st.lists(calls, min_size=1, max_size=4).map(tuple),
            agents=inner,
            parallel=st.booleans(),
        )

    return st.sampled_from(frameworks).flatmap(agent)


agents = agents_in(tuple(sorted(SCOPES)), depth=2)


@settings(max_examples=150, deadline=None)
@given(
    job=st.lists(agents, min_size=1, max_size=3).map(tuple),
    clients=st.lists(st.sampled_from(sorted(CLIENTS)), unique=True, max_size=3).map(tuple),
    nested_clients=st.booleans(),
    with_ids=st.booleans(),
    without_cache=st.frozensets(st.sampled_from(sorted(CLIENTS)), max_size=2),
    shuffled=st.randoms(use_true_random=False),
)
def test_totals_are_those_of_the_known_calls(
    job: tuple[Agent, ...],
    clients: tuple[str, ...],
    nested_clients: bool,
    with_ids: bool,
    without_cache: frozenset[str],
    shuffled: Any,
) -> None:
    if any(agent.framework == "plain" for agent in walk(job)) and not clients:
        clients = (sorted(CLIENTS)[0],)  # plain code needs a layer that sees its calls
    builder = Builder(clients, nested_clients, with_ids, without_cache)
    builder.job(job)
    shuffled.shuffle(builder.spans)

    tokens = usage_of(facts for span in builder.spans if (facts := SpanFacts.from_dict(span)) is not None).inclusive

    known = [call for agent in job for call in agent.all_calls()]
    assert tokens.prompt_tokens == sum(call.prompt for call in known)
    assert tokens.completion_tokens == sum(call.completion for call in known)
    assert tokens.cache_read_tokens == sum(call.cache_read for call in known)
    assert tokens.cache_write_tokens == sum(call.cache_write for call in known)


@settings(max_examples=300, deadline=None)
@given(
    job=st.lists(agents, min_size=1, max_size=3).map(tuple),
    clients=st.lists(st.sampled_from(sorted(CLIENTS)), unique=True, max_size=2).map(tuple),
    nested_clients=st.booleans(),
    with_ids=st.booleans(),
    told=st.sampled_from(("by message", "by run", "as a whole")),
    times=st.integers(1, 2),
)
def test_runs_that_are_added_too_change_nothing(
    job: tuple[Agent, ...], clients: tuple[str, ...], nested_clients: bool, with_ids: bool, told: str, times: int
) -> None:
    if any(agent.framework == "plain" for agent in walk(job)) and not clients:
        clients = (sorted(CLIENTS)[0],)
    numbers = random.Random(0)
    job = tuple(told_apart(agent, numbers) for agent in job)
    builder = Builder(clients, nested_clients, with_ids, frozenset())
    builder.job(job)
    spans = [facts for span in builder.spans if (facts := SpanFacts.from_dict(span)) is not None]
    outputs = [
        Added(Returned(calls=tuple(calls_told(agent, told, f"{number}"))), builder.now)
        for number, agent in enumerate(job)
    ]

    usage = usage_of(spans, added=outputs * (1 if told == "as a whole" else times))

    assert usage.inclusive == usage_of(spans).inclusive


def calls_told(agent: Agent, told: str, run_id: str) -> list[added_calls.Call]:
    """What the agent's output says of its calls and of those of its agents."""
    if told == "as a whole":
        return [total_of(agent.all_calls(), None)]
    own = (
        [total_of([call], run_id) for call in agent.calls] if told == "by message" else [total_of(agent.calls, run_id)]
    )
    return [
        *own,
        *(call for number, inner in enumerate(agent.agents) for call in calls_told(inner, told, f"{run_id}.{number}")),
    ]


def told_apart(agent: Agent, numbers: random.Random) -> Agent:
    """The same with counts of which no others are the sum: of those that are equal by chance, either may be meant."""
    calls = tuple(replace(call, prompt=call.prompt + numbers.randrange(10**9)) for call in agent.calls)
    return replace(agent, calls=calls, agents=tuple(told_apart(inner, numbers) for inner in agent.agents))


def total_of(calls: Sequence[Call], run_id: str | None) -> added_calls.Call:
    return added_calls.Call(
        prompt=sum(call.prompt for call in calls),
        completion=sum(call.completion for call in calls),
        cache_read=sum(call.cache_read for call in calls),
        cache_write=sum(call.cache_write for call in calls),
        run_id=run_id,
    )


def walk(agents: tuple[Agent, ...]) -> list[Agent]:
    return [each for agent in agents for each in (agent, *walk(agent.agents))]
