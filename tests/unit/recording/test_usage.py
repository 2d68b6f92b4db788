"""Usage from span trees: the recorded ones, odd ones, added responses, and sizes."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from xpander_celery.recording.attributes import Kind
from xpander_celery.recording.calls import Added, Call, Returned
from xpander_celery.recording.facts import SpanFacts, key_of
from xpander_celery.recording.packed import PackedSpans
from xpander_celery.recording.usage import Usage, usage_of
from xpander_celery.report import Tokens

VECTORS = json.loads((Path(__file__).parent / "vectors" / "spans.json").read_text())["vectors"]
SECOND = 1_000_000_000
OPENAI = "openinference.instrumentation.openai"
AGNO = "openinference.instrumentation.agno"
AGENTS = "opentelemetry.instrumentation.agno"
GENAI = "opentelemetry.instrumentation.genai.openai"


def span(
    span_id: str,
    parent_id: str | None,
    scope: str,
    start: int = 0,
    end: int = 10,
    name: str | None = None,
    **attributes: Any,
) -> SpanFacts:
    facts = SpanFacts.from_dict(
        {
            "span_id": span_id,
            "parent_id": parent_id,
            "name": name or span_id,
            "scope": scope,
            "start": start,
            "end": end,
            "attributes": {key.replace("__", "."): value for key, value in attributes.items()},
        }
    )
    assert facts is not None
    return facts


def chat(span_id: str, parent_id: str | None, scope: str, prompt: int, completion: int, **more: Any) -> SpanFacts:
    attributes = {
        "gen_ai__operation__name": "chat",
        "gen_ai__usage__input_tokens": prompt,
        "gen_ai__usage__output_tokens": completion,
    }
    return span(span_id, parent_id, scope, **{**attributes, **more})


def agent_span(span_id: str, parent_id: str | None, prompt: int, completion: int, *, start: int) -> SpanFacts:
    return span(
        span_id,
        parent_id,
        AGENTS,
        start=start,
        gen_ai__operation__name="invoke_agent",
        gen_ai__usage__input_tokens=prompt,
        gen_ai__usage__output_tokens=completion,
    )


def counts(usage: Usage) -> tuple[int, int, int, int]:
    tokens = usage.inclusive
    return tokens.prompt_tokens, tokens.completion_tokens, tokens.cache_read_tokens, tokens.cache_write_tokens


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
@pytest.mark.parametrize("order", ["as recorded", "reversed", "shuffled"])
def test_recorded_trees_give_what_the_provider_served(vector: dict[str, Any], order: str) -> None:
    spans = [facts for each in vector["spans"] if (facts := SpanFacts.from_dict(each)) is not None]
    if order == "reversed":
        spans.reverse()
    elif order == "shuffled":
        random.Random(vector["name"]).shuffle(spans)

    usage = usage_of(spans)

    assert usage.inclusive == Tokens(**vector["inclusive"])
    assert usage.sent == Tokens(**vector["sent"])
    if order == "as recorded":
        assert list(usage.used_tools) == vector["used_tools"]
    else:
        assert sorted(usage.used_tools) == sorted(vector["used_tools"])


def test_no_spans_are_no_usage() -> None:
    assert usage_of(()) == Usage()


def test_a_span_that_arrives_twice_counts_once() -> None:
    call = chat("a", None, GENAI, 100, 10)
    assert counts(usage_of([call, call])) == (100, 10, 0, 0)


def test_parents_in_a_circle_are_counted_and_end() -> None:
    spans = [chat("a", "b", GENAI, 100, 10, start=0, end=4), chat("b", "a", GENAI, 100, 10, start=5, end=9)]
    assert usage_of(spans).llm_calls in (1, 2)


def test_a_chain_as_deep_as_a_job_may_have_does_not_recurse() -> None:
    spans = [chat("0", None, GENAI, 100, 10), *(chat(str(n), str(n - 1), GENAI, 100, 10) for n in range(1, 5000))]
    assert counts(usage_of(spans)) == (100, 10, 0, 0)


def test_models_are_summed_apart() -> None:
    usage = usage_of(
        [
            chat("a", None, GENAI, 100, 10, gen_ai__request__model="gpt-4o"),
            chat("b", None, GENAI, 50, 5, gen_ai__request__model="gpt-4o", gen_ai__response__model="gpt-4o-2024"),
            chat("c", None, GENAI, 7, 1),
        ]
    )
    assert usage.by_model == {
        "gpt-4o": Tokens(prompt_tokens=100, completion_tokens=10),
        "gpt-4o-2024": Tokens(prompt_tokens=50, completion_tokens=5),
        "": Tokens(prompt_tokens=7, completion_tokens=1),
    }
    assert usage.llm_calls == 3


class TestValues:
    @pytest.mark.parametrize(("value", "expected"), [("100", 100), (0, 0), (100, 100)])
    def test_integers_and_digit_strings_count(self, value: object, expected: int) -> None:
        assert counts(usage_of([chat("a", None, GENAI, value, 10)]))[0] == expected  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [True, -5, 1.5, "-5", "many", "", None, [1], 10**30, "9" * 5000, "٣"])
    def test_anything_else_does_not(self, value: object) -> None:
        assert counts(usage_of([chat("a", None, GENAI, value, 10)])) == (0, 10, 0, 0)  # type: ignore[arg-type]

    def test_an_unusable_value_leaves_the_next_alias(self) -> None:
        attributes = {"gen_ai__usage__input_tokens": -1, "llm__token_count__prompt": 100}
        assert counts(usage_of([span("a", None, GENAI, **attributes)]))[0] == 100

    def test_usage_alone_makes_a_span_count_when_its_operation_was_evicted(self) -> None:
        evicted = span("a", None, GENAI, gen_ai__usage__input_tokens=100, gen_ai__usage__output_tokens=10)
        assert counts(usage_of([evicted])) == (100, 10, 0, 0)


class TestKinds:
    def test_a_pending_span_is_not_there(self) -> None:
        attributes = {"logfire.span_type": "pending_span", "gen_ai.usage.input_tokens": 100}
        pending = {"span_id": "a", "parent_id": None, "name": "a", "scope": "logfire", "start": 0, "end": 0}
        assert SpanFacts.from_dict({**pending, "attributes": attributes}) is None

    def test_litellm_overwriting_a_tool_span_leaves_it_a_tool_with_the_call_in_it(self) -> None:
        tool = chat("t", None, OPENAI, 100, 10, openinference__span__kind="TOOL", tool__name="look")
        usage = usage_of([tool])
        assert usage.used_tools == ("look",)
        assert counts(usage) == (100, 10, 0, 0)

    def test_calls_of_litellm_on_one_span_are_taken_from_its_children(self) -> None:
        raw = "{'prompt_tokens': 100, 'completion_tokens': 10, 'prompt_tokens_details': {'cached_tokens': 40}}"
        spans = [
            chat("agent", None, AGNO, 100, 10, openinference__span__kind="AGENT"),
            span("r1", "agent", "litellm", name="raw_gen_ai_request", llm__openai__usage=raw),
            span("r2", "agent", "litellm", name="raw_gen_ai_request", llm__openai__usage=raw, start=20, end=30),
        ]
        assert counts(usage_of(spans)) == (200, 20, 80, 0)

    @pytest.mark.parametrize(("system", "sent"), [("openai", 100), ("anthropic", 60)])
    def test_the_cache_that_litellm_leaves_out_of_its_counts_is_in_its_usage_object(
        self, system: str, sent: int
    ) -> None:
        usage = "{'prompt_tokens': 100, 'completion_tokens': 10, 'prompt_tokens_details': {'cached_tokens': 40}}"
        request = chat("r", None, "litellm", 100, 10, gen_ai__system=system, **{"metadata.usage_object": usage})
        assert counts(usage_of([request])) == (100, 10, 40, 0)
        assert usage_of([request]).sent.prompt_tokens == sent

    @pytest.mark.parametrize(
        ("raw", "expected"),
        [
            (
                '{"prompt_tokens":100,"completion_tokens":10,"prompt_tokens_details":{"cached_tokens":40}}',
                (100, 10, 40),
            ),
            ('{"input_tokens":100,"output_tokens":10,"input_tokens_details":{"cached_tokens":40}}', (100, 10, 40)),
            ('{"input_tokens":100,"output_tokens":10,"cache_read_input_tokens":40}', (140, 10, 40)),
        ],
        ids=["openai", "responses", "anthropic"],
    )
    def test_the_cache_that_logfire_leaves_out_of_its_counts_is_in_the_raw_usage(
        self, raw: str, expected: tuple[int, int, int]
    ) -> None:
        request = chat("r", None, "logfire.openai", "100", "10", **{"gen_ai.usage.raw": raw})  # type: ignore[arg-type]
        assert counts(usage_of([request]))[:3] == expected

    @pytest.mark.parametrize("key", ["metadata.usage_object", "gen_ai.usage.raw"])
    @pytest.mark.parametrize("text", ["", "{", 5, ["x"], "[1]", "{" * 100_000, "[" * 100_000])
    def test_a_malformed_usage_object_leaves_the_counts(self, key: str, text: object) -> None:
        request = chat("r", None, "litellm", 100, 10, **{key: text})
        assert counts(usage_of([request])) == (100, 10, 0, 0)

    @pytest.mark.parametrize("text", ["", "{", "None", "print(1)", "[1]", "{'prompt_tokens': 'x'}", "(" * 10_000])
    def test_a_malformed_usage_of_litellm_counts_nothing(self, text: str) -> None:
        raw = span("r", None, "litellm", name="raw_gen_ai_request", llm__openai__usage=text)
        assert counts(usage_of([raw])) == (0, 0, 0, 0)

    @pytest.mark.parametrize(
        ("details", "expected"),
        [
            ('{"input":60,"output":7,"total":110,"input_cache_read":40,"output_reasoning":3}', (100, 10, 40, 0)),
            (
                '{"prompt_tokens":100,"completion_tokens":10,"total_tokens":110,'
                '"prompt_tokens_details":{"cached_tokens":40}}',
                (100, 10, 40, 0),
            ),
            (
                '{"input":60,"output":10,"cache_read_input_tokens":30,"cache_creation_input_tokens":10}',
                (100, 10, 30, 10),
            ),
            ("no json", (0, 0, 0, 0)),
            ("[]", (0, 0, 0, 0)),
        ],
    )
    def test_langfuse_writes_disjoint_buckets_or_openais_names(
        self, details: str, expected: tuple[int, int, int, int]
    ) -> None:
        attributes = {"langfuse__observation__type": "generation", "langfuse__observation__usage_details": details}
        assert counts(usage_of([span("a", None, "langfuse-sdk", **attributes)])) == expected

    @pytest.mark.parametrize(
        "attributes",
        [
            {"gen_ai__operation__name": "embeddings"},
            {"openinference__span__kind": "RERANKER"},
            {"openinference__span__kind": "RETRIEVER"},
            {"gen_ai__operation__name": "count_tokens"},
            {"langfuse__observation__type": "embedding"},
        ],
    )
    def test_tokens_that_no_model_generated_from_are_left_out(self, attributes: dict[str, str]) -> None:
        excluded = span("e", None, GENAI, gen_ai__usage__input_tokens=7, **attributes)
        assert counts(usage_of([excluded, chat("c", "e", GENAI, 100, 10)])) == (100, 10, 0, 0)

    def test_members_of_an_enumeration_count_as_their_text(self) -> None:
        class Written(str, Enum):  # noqa: UP042  as libraries still write it
            KIND = "TOOL"
            NAME = "look"
            MODEL = "gpt-4o"

        tool = span("t", None, OPENAI, openinference__span__kind=Written.KIND, tool__name=Written.NAME)
        job = PackedSpans()
        job.append(tool)
        job.append(chat("c", "t", OPENAI, 100, 10, gen_ai__request__model=Written.MODEL))
        usage = usage_of(job)
        assert usage.used_tools == ("look",)
        assert [type(name) for name in (*usage.used_tools, *usage.by_model)] == [str, str]
        assert list(usage.by_model) == ["gpt-4o"]


class TestCache:
    @pytest.mark.parametrize("provider", ["Anthropic", "AwsBedrock", "AzureFoundry"])
    def test_agno_writes_the_prompt_of_these_without_cache(self, provider: str) -> None:
        call = span(
            "a",
            None,
            AGNO,
            openinference__span__kind="LLM",
            llm__provider=provider,
            llm__token_count__prompt=100,
            llm__token_count__completion=10,
            llm__token_count__prompt_details__cache_read=20,
        )
        usage = usage_of([call])
        assert counts(usage) == (120, 10, 20, 0)
        assert usage.sent.prompt_tokens == 100

    @pytest.mark.parametrize(("name", "prompt"), [("Claude.invoke", 120), ("Gemini.invoke", 100)])
    def test_agno_on_vertex_does_so_for_claude_only(self, name: str, prompt: int) -> None:
        call = span(
            "a",
            None,
            AGNO,
            name=name,
            openinference__span__kind="LLM",
            llm__provider="VertexAI",
            llm__token_count__prompt=100,
            llm__token_count__completion=10,
            llm__token_count__prompt_details__cache_read=20,
        )
        assert counts(usage_of([call]))[0] == prompt

    def test_claude_through_a_router_counts_cache_inside(self) -> None:
        call = span(
            "a",
            None,
            AGNO,
            openinference__span__kind="LLM",
            llm__provider="OpenRouter",
            llm__model_name="claude-sonnet-4",
            llm__token_count__prompt=100,
            llm__token_count__completion=10,
            llm__token_count__prompt_details__cache_read=20,
        )
        usage = usage_of([call])
        assert counts(usage)[0] == usage.sent.prompt_tokens == 100

    def test_more_cache_than_prompt_shows_that_it_is_beside(self) -> None:
        call = chat("a", None, "any", 10, 5, gen_ai__usage__cache_read__input_tokens=50)
        assert counts(usage_of([call])) == (60, 5, 50, 0)

    def test_a_total_with_cache_shows_that_it_is_beside(self) -> None:
        more = {"gen_ai__usage__cache_read__input_tokens": 50, "gen_ai__usage__total_tokens": 155}
        assert counts(usage_of([chat("a", None, "any", 100, 5, **more)])) == (150, 5, 50, 0)

    def test_a_total_without_cache_proves_nothing(self) -> None:
        more = {"gen_ai__usage__cache_read__input_tokens": 50, "gen_ai__usage__total_tokens": 105}
        assert counts(usage_of([chat("a", None, "any", 100, 5, **more)])) == (100, 5, 50, 0)

    def test_a_layer_that_saw_the_cache_completes_the_one_that_did_not(self) -> None:
        spans = [
            chat("a", None, GENAI, 100, 10, gen_ai__response__id="r"),
            chat("b", None, OPENAI, 100, 10, gen_ai__response__id="r", gen_ai__usage__cache_read__input_tokens=40),
        ]
        assert counts(usage_of(spans)) == (100, 10, 40, 0)


class TestDuplicates:
    def test_layers_that_overlap_too_little_saw_two_calls(self) -> None:
        spans = [chat("a", None, GENAI, 100, 10, start=0, end=10), chat("b", None, OPENAI, 100, 10, start=5, end=15)]
        assert counts(usage_of(spans)) == (200, 20, 0, 0)

    def test_different_response_ids_are_two_calls(self) -> None:
        spans = [
            chat("a", None, GENAI, 100, 10, gen_ai__response__id="r1"),
            chat("b", None, OPENAI, 100, 10, gen_ai__response__id="r2"),
        ]
        assert counts(usage_of(spans)) == (200, 20, 0, 0)

    def test_different_models_are_two_calls(self) -> None:
        spans = [
            chat("a", None, GENAI, 100, 10, gen_ai__request__model="gpt-4o"),
            chat("b", None, OPENAI, 100, 10, gen_ai__request__model="claude-sonnet-4"),
        ]
        assert counts(usage_of(spans)) == (200, 20, 0, 0)

    def test_a_model_named_with_its_provider_or_date_is_the_same(self) -> None:
        spans = [
            chat("a", None, GENAI, 100, 10, gen_ai__response__model="gpt-4o-2024-08-06"),
            chat("b", None, "litellm", 100, 10, gen_ai__request__model="openai/gpt-4o"),
        ]
        assert counts(usage_of(spans)) == (100, 10, 0, 0)

    def test_one_response_seen_twice_by_one_layer_with_the_same_usage_is_one_call(self) -> None:
        spans = [
            chat("a", None, GENAI, 100, 10, gen_ai__response__id="r"),
            chat("b", None, GENAI, 100, 10, gen_ai__response__id="r", start=50, end=60),
        ]
        assert counts(usage_of(spans)) == (100, 10, 0, 0)

    def test_a_thousand_parallel_equal_calls_in_three_layers_stay_a_thousand(self) -> None:
        spans = [
            chat(f"{layer}{n}", None, layer, 100, 10, start=n, end=10_000 + n)
            for n in range(1000)
            for layer in (GENAI, OPENAI, AGNO)
        ]
        assert usage_of(spans).llm_calls == 1000


class TestContainers:
    def test_an_agent_of_another_layer_that_saw_more_than_its_calls_is_believed(self) -> None:
        spans = [
            span("a", None, "framework", gen_ai__usage__input_tokens=300, gen_ai__usage__output_tokens=30),
            chat("c", "a", GENAI, 100, 10),
        ]
        assert counts(usage_of(spans)) == (300, 30, 0, 0)

    def test_an_agent_with_calls_of_its_own_layer_restates_them(self) -> None:
        spans = [
            span("a", None, GENAI, gen_ai__usage__input_tokens=9000, gen_ai__usage__output_tokens=30),
            chat("c", "a", GENAI, 100, 10),
        ]
        assert counts(usage_of(spans)) == (100, 10, 0, 0)

    def test_an_agent_whose_call_is_kept_elsewhere_does_not_bring_it_back(self) -> None:
        spans = [
            span("a", None, "framework", end=100, gen_ai__usage__input_tokens=100, gen_ai__usage__output_tokens=10),
            chat("c", "a", OPENAI, 100, 10, gen_ai__response__id="r"),
            span("h", None, "http", end=100),
            span("i", "h", "http", end=100),
            chat("d", "i", GENAI, 100, 10, gen_ai__response__id="r"),
        ]
        assert counts(usage_of(spans)) == (100, 10, 0, 0)


class TestTools:
    def test_tools_come_in_order_of_first_use_and_once(self) -> None:
        tool = {"gen_ai__operation__name": "execute_tool"}
        spans = [
            span("a", None, GENAI, start=30, gen_ai__tool__name="b", **tool),
            span("b", None, GENAI, start=10, gen_ai__tool__name="a", **tool),
            span("c", None, GENAI, start=20, gen_ai__tool__name="b", **tool),
        ]
        usage = usage_of(spans)
        assert usage.used_tools == ("a", "b")
        assert usage.tool_calls == 3

    def test_two_layers_that_saw_the_same_uses_count_them_once(self) -> None:
        spans = [
            span(f"{scope}{n}", None, scope, start=n, openinference__span__kind="TOOL", tool__name="look")
            for scope in (AGNO, OPENAI)
            for n in range(3)
        ]
        assert usage_of(spans).tool_calls == 3

    def test_a_tool_span_without_a_name_attribute_is_named_by_the_span(self) -> None:
        spans = [
            span("a", None, "l", name="search", langfuse__observation__type="tool"),
            span("b", None, "s", name="execute_tool fetch", start=1),
            span("c", None, "s", name="anthropic.custom_tool_use add", start=2),
        ]
        assert usage_of(spans).used_tools == ("search", "fetch", "add")

    def test_without_tool_spans_those_count_that_the_model_asked_for(self) -> None:
        key = "llm__output_messages__0__message__tool_calls__{}__tool_call__function__name"
        asking = chat("a", None, OPENAI, 100, 10, **{key.format(0): "weather", key.format(1): "time"})
        assert usage_of([asking]).used_tools == ("weather", "time")
        used = span("t", None, OPENAI, start=5, openinference__span__kind="TOOL", tool__name="weather")
        assert usage_of([asking, used]).used_tools == ("weather",)

    def test_errors_are_counted(self) -> None:
        failed = SpanFacts(1, 0, AGNO, Kind.TOOL, 0, 1, failed=True, tool="look")
        lost = SpanFacts(2, 0, AGNO, Kind.LLM, 0, 1, failed=True)
        usage = usage_of([failed, lost])
        assert (usage.tool_calls, usage.tool_errors, usage.llm_errors) == (1, 1, 1)


class TestAdded:
    def test_plain_tokens_always_count(self) -> None:
        tokens = Tokens(prompt_tokens=100, completion_tokens=10, cache_read_tokens=5)
        usage = usage_of([chat("a", None, GENAI, 100, 10)], added=[Added(tokens, at=10), Added(tokens, at=10)])
        assert usage.sent == Tokens(prompt_tokens=300, completion_tokens=30, cache_read_tokens=10)

    def test_a_response_that_a_span_gave_counts_once(self) -> None:
        added = Added(Returned(calls=(Call(100, 11, response_id="r"),)), at=99)
        usage = usage_of([chat("a", None, GENAI, 100, 10, gen_ai__response__id="r")], added=[added])
        assert counts(usage) == (100, 10, 0, 0)

    def test_a_response_added_twice_counts_once(self) -> None:
        added = Added(Returned(calls=(Call(100, 10, response_id="r"),)), at=99)
        assert counts(usage_of((), added=[added, added])) == (100, 10, 0, 0)

    def test_a_response_with_another_id_counts_too(self) -> None:
        added = Added(Returned(calls=(Call(100, 10, response_id="other"),)), at=99)
        usage = usage_of([chat("a", None, GENAI, 100, 10, gen_ai__response__id="r")], added=[added])
        assert counts(usage) == (200, 20, 0, 0)

    def test_equal_counts_at_the_time_of_a_span_without_id_are_the_same_call(self) -> None:
        call = chat("a", None, OPENAI, 100, 10, start=50 * SECOND, end=52 * SECOND)
        same = Added(Returned(calls=(Call(100, 10, response_id="r", created=51 * SECOND),)), at=53 * SECOND)
        assert counts(usage_of([call], added=[same])) == (100, 10, 0, 0)

    def test_each_span_answers_for_one_added_call(self) -> None:
        call = chat("a", None, OPENAI, 100, 10, start=0, end=2)
        added = [Added(Returned(calls=(Call(100, 10),)), at=3), Added(Returned(calls=(Call(100, 10),)), at=4)]
        assert counts(usage_of([call], added=added)) == (200, 20, 0, 0)

    def test_equal_counts_at_another_time_are_another_call(self) -> None:
        call = chat("a", None, OPENAI, 100, 10, start=500 * SECOND, end=502 * SECOND)
        earlier = Added(Returned(calls=(Call(100, 10),)), at=400 * SECOND)
        created_later = Added(Returned(calls=(Call(100, 10, created=900 * SECOND),)), at=901 * SECOND)
        assert counts(usage_of([call], added=[earlier])) == (200, 20, 0, 0)
        assert counts(usage_of([call], added=[created_later])) == (200, 20, 0, 0)

    def test_a_run_that_states_only_its_sum_is_recognized_by_the_span_around_its_calls(self) -> None:
        spans = [
            span("agent", None, AGNO, end=100, openinference__span__kind="AGENT"),
            chat("a", "agent", AGNO, 100, 10, start=0, end=2),
            chat("b", "agent", AGNO, 200, 20, start=5, end=9),
            chat("c", None, AGNO, 7, 7, start=50, end=51),
        ]
        run = Added(Returned(calls=(Call(300, 30, run_id="run"),), used_tools=("look",)), at=200)
        usage = usage_of(spans, added=[run, run])
        assert counts(usage) == (307, 37, 0, 0)
        assert usage.used_tools == ("look",)

    @pytest.mark.parametrize(("stated", "beside"), [(300, False), (250, True)], ids=["inclusive", "without cache"])
    def test_a_run_whose_agent_states_the_sum_counts_once_and_completes_it(self, stated: int, beside: bool) -> None:
        agent = span("a", None, "l", gen_ai__usage__input_tokens=stated, gen_ai__usage__output_tokens=30)
        calls = (
            Call(100, 10, cache_read=20, beside=beside, run_id="run"),
            Call(200, 20, cache_write=30, beside=beside, run_id="run"),
        )
        usage = usage_of([agent], added=[Added(Returned(calls=calls), at=99)])
        assert counts(usage) == (300, 30, 20, 30)
        assert usage.sent.prompt_tokens == (250 if beside else 300)
        assert usage.llm_calls == 1

    def test_a_response_completes_the_cache_of_the_span_that_gave_it(self) -> None:
        call = Call(100, 10, cache_read=40, model="gpt-4o", response_id="r")
        for attributes in ({"gen_ai__response__id": "r"}, {}):
            usage = usage_of([chat("a", None, GENAI, 100, 10, **attributes)], added=[Added(Returned((call,)), at=99)])
            assert counts(usage) == (100, 10, 40, 0)
            assert list(usage.by_model) == ["gpt-4o"]

    def test_a_member_run_added_before_its_team_counts_once(self) -> None:
        member = Returned(calls=(Call(100, 10, run_id="member"),))
        team = Returned(calls=(Call(50, 5, run_id="team"), Call(100, 10, run_id="member")))
        assert counts(usage_of((), added=[Added(member, at=1), Added(team, at=2)])) == (150, 15, 0, 0)

    def test_a_team_whose_agents_state_only_their_sums_counts_once(self) -> None:
        spans = [
            agent_span("team", None, 300, 30, start=0),
            agent_span("member", "team", 50, 5, start=1),
        ]
        team = Returned(
            calls=(Call(100, 10, run_id="team"), Call(200, 20, run_id="team"), Call(50, 5, run_id="member"))
        )
        assert counts(usage_of(spans, added=[Added(team, at=99)])) == (350, 35, 0, 0)

    def test_a_team_whose_span_restates_its_members_counts_once(self) -> None:
        spans = [
            agent_span("team", None, 350, 35, start=0),
            chat("a", "team", GENAI, 100, 11, start=1),
            chat("b", "team", GENAI, 250, 24, start=2),
        ]
        team = Returned(calls=(Call(300, 30, run_id="team"), Call(50, 5, run_id="member")))
        assert counts(usage_of(spans, added=[Added(team, at=99)])) == (350, 35, 0, 0)

    def test_parallel_agents_that_restate_their_calls_count_once(self) -> None:
        spans = [
            agent_span("x", None, 300, 30, start=0),
            agent_span("y", None, 160, 16, start=0),
            chat("x1", "x", AGENTS, 100, 10, start=1),
            chat("y1", "y", AGENTS, 70, 7, start=2),
            chat("x2", "x", AGENTS, 200, 20, start=3),
            chat("y2", "y", AGENTS, 90, 9, start=4),
        ]
        added = [Added(Returned(calls=(Call(300, 30),)), at=99), Added(Returned(calls=(Call(160, 16),)), at=99)]
        assert counts(usage_of(spans, added=added)) == (460, 46, 0, 0)
        assert counts(usage_of(spans, added=added[:1] * 2)) == (760, 76, 0, 0)  # a span answers for one
        assert counts(usage_of(spans, added=[Added(added[0].what, at=-1)])) == (760, 76, 0, 0)  # it began later

    def test_of_a_run_that_was_continued_the_last_word_counts(self) -> None:
        paused = Added(Returned(calls=(Call(100, 10, run_id="run"),)), at=1)
        at_last = Added(Returned(calls=(Call(100, 10, run_id="run"), Call(200, 20, run_id="run"))), at=2)
        assert counts(usage_of((), added=[paused, at_last])) == (300, 30, 0, 0)
        assert counts(usage_of((), added=[paused, Added(Returned(), at=2)])) == (100, 10, 0, 0)

    def test_a_span_of_a_runs_first_part_answers_for_that(self) -> None:
        paused = agent_span("paused", None, 100, 10, start=0)
        output = Returned(calls=(Call(100, 10, run_id="run"), Call(200, 20, run_id="run")))
        assert counts(usage_of([paused], added=[Added(output, at=2)])) == (300, 30, 0, 0)

    def test_spans_of_calls_without_counts_do_not_hide_what_is_returned(self) -> None:
        returned = Returned(calls=(Call(100, 10),))
        usage = usage_of([chat("a", None, GENAI, 0, 0)], returned=returned)
        assert (counts(usage), usage.llm_calls) == ((100, 10, 0, 0), 1)
        assert usage_of([chat("a", None, GENAI, 0, 0)], returned=Returned()).llm_calls == 1

    def test_what_is_returned_counts_only_where_nothing_else_does(self) -> None:
        returned = Returned(calls=(Call(100, 10, cache_read=20, beside=True),), used_tools=("look",))
        alone = usage_of((), returned=returned)
        assert counts(alone) == (100, 10, 20, 0)
        assert alone.sent.prompt_tokens == 80
        assert alone.used_tools == ("look",)
        assert counts(usage_of([chat("a", None, GENAI, 7, 1)], returned=returned)) == (7, 1, 0, 0)
        added = [Added(Tokens(prompt_tokens=1), at=0)]
        assert counts(usage_of((), added=added, returned=returned)) == (1, 0, 0, 0)


def big_job(spans: int, *, layers: tuple[str, ...]) -> PackedSpans:
    """Agent runs of ten model calls, each in several layers, with tools and the HTTP calls below."""
    chance = random.Random(spans)
    job = PackedSpans()
    start, agent = 1_700_000_000 * SECOND, 0
    while len(job) < spans:
        if len(job) % 40 == 0:
            agent = chance.getrandbits(63)
            job.append(SpanFacts(agent, 7, AGNO, Kind.PLAIN, start, start + SECOND))
        start += SECOND
        parent, prompt, completion = agent, chance.randrange(10, 9999), chance.randrange(1, 999)
        for depth, layer in enumerate(layers):
            key = key_of(str(chance.random())) if layer == GENAI else 0
            facts = SpanFacts(
                chance.getrandbits(63), parent, layer, Kind.LLM, start + depth, start + SECOND - depth, prompt=prompt
            )
            job.append(facts._replace(completion=completion, cache_read=10, model="gpt-4o", response_key=key))
            parent = facts.span_id
        job.append(SpanFacts(chance.getrandbits(63), parent, "http", Kind.PLAIN, start, start + 5))
        job.append(SpanFacts(chance.getrandbits(63), agent, AGNO, Kind.TOOL, start, start + 5, tool="look"))
    return job


@pytest.mark.parametrize("layers", [(GENAI,), (AGNO, GENAI)], ids=["one layer", "two layers"])
def test_a_span_takes_at_most_500_bytes(layers: tuple[str, ...]) -> None:
    """A job of 100,000 spans, at most 50 MB."""
    tracemalloc.start()
    try:
        job = big_job(20_000, layers=layers)
        tracemalloc.reset_peak()
        usage_of(job)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 20_000 * 500


@pytest.mark.parametrize("layers", [(GENAI,), (AGNO, GENAI)], ids=["one layer", "two layers"])
def test_ten_times_the_spans_take_about_ten_times_as_long(layers: tuple[str, ...]) -> None:
    """How long that is in seconds depends on the machine: benchmarks/bench_spans.py."""
    few, many = big_job(4_000, layers=layers), big_job(40_000, layers=layers)
    assert min(seconds_to_sum(many) for _ in range(3)) <= 20 * min(seconds_to_sum(few) for _ in range(3))


def seconds_to_sum(job: PackedSpans) -> float:
    before = time.process_time()
    usage_of(job)
    return time.process_time() - before
