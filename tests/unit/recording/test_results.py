"""Usage from responses and run outputs, real ones of Agno and OpenAI and others by their form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from agno.metrics import MessageMetrics, RunMetrics
from agno.models.message import Message
from agno.models.response import ToolExecution
from agno.run.agent import RunCompletedEvent, RunOutput
from agno.run.base import RunStatus
from agno.run.team import TeamRunOutput
from agno.run.workflow import WorkflowRunOutput
from agno.workflow.types import StepMetrics, WorkflowMetrics
from billiard.exceptions import SoftTimeLimitExceeded
from openai.types import CompletionUsage, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from xpander_celery.recording.calls import Call, Returned, without_earlier
from xpander_celery.recording.results import read_result


def total(returned: Returned | None) -> tuple[int, int, int, int]:
    assert returned is not None
    calls = returned.calls
    return (
        sum(call.prompt for call in calls),
        sum(call.completion for call in calls),
        sum(call.cache_read for call in calls),
        sum(call.cache_write for call in calls),
    )


def metrics(prompt: int, completion: int, read: int = 0, write: int = 0) -> RunMetrics:
    return RunMetrics(
        input_tokens=prompt,
        output_tokens=completion,
        total_tokens=prompt + completion,
        cache_read_tokens=read,
        cache_write_tokens=write,
    )


def answer(prompt: int, completion: int, **more: Any) -> Message:
    return Message(role="assistant", metrics=MessageMetrics(input_tokens=prompt, output_tokens=completion), **more)


def pydantic_ai_response(prompt: int, completion: int, **more: Any) -> SimpleNamespace:
    usage = SimpleNamespace(input_tokens=prompt, output_tokens=completion)
    return SimpleNamespace(kind="response", usage=usage, **more)


def strands_invocation(*cycles: tuple[int, int]) -> SimpleNamespace:
    """Each cycle is named by its prompt."""
    return SimpleNamespace(
        cycles=[
            SimpleNamespace(event_loop_cycle_id=str(prompt), usage={"inputTokens": prompt, "outputTokens": completion})
            for prompt, completion in cycles
        ]
    )


class TestAgno:
    def test_a_run_gives_usage_tools_and_content(self) -> None:
        run = RunOutput(
            run_id="r",
            content="42",
            model="gpt-4o",
            model_provider="OpenAI",
            metrics=metrics(100, 10, 40),
            tools=[ToolExecution(tool_name="look"), ToolExecution(tool_name="add"), ToolExecution(tool_name="look")],
            status=RunStatus.completed,
        )
        returned = read_result(run)
        assert returned == Returned(
            calls=(Call(100, 10, 40, 0, model="gpt-4o", run_id="r"),),
            used_tools=("look", "add"),
            content="42",
            failed=False,
        )

    def test_the_calls_of_a_run_are_told_apart_by_its_messages(self) -> None:
        run = RunOutput(
            run_id="r",
            metrics=metrics(300, 30),
            messages=[
                Message(role="user", content="hi"),
                answer(100, 10, provider_data={"id": "chatcmpl-1"}),
                answer(200, 20, provider_data={"response_id": "resp-2"}),
                answer(7000, 700, from_history=True),
            ],
        )
        returned = read_result(run)
        assert returned is not None
        assert [(call.prompt, call.response_id) for call in returned.calls] == [(100, "chatcmpl-1"), (200, "resp-2")]

    def test_what_the_run_holds_beyond_its_messages_is_one_more_call(self) -> None:
        run = RunOutput(metrics=metrics(150, 15), messages=[answer(100, 10)])
        returned = read_result(run)
        assert returned is not None
        assert [(call.prompt, call.completion) for call in returned.calls] == [(100, 10), (50, 5)]

    @pytest.mark.parametrize(
        ("began", "prompt"),
        [(1000.0, 450), (1000.9, 450), (1001.0, 350), (2000.9, 350), (2001.0, 450)],
        ids=["at first", "in the same second", "continued", "continued in the same second", "after it all"],
    )
    def test_what_a_run_spent_before_another_job_continued_it_is_left_out(self, began: float, prompt: int) -> None:
        member = RunOutput(run_id="m", metrics=metrics(50, 5), messages=[answer(50, 5, created_at=2000)])
        run = TeamRunOutput(
            run_id="r",
            metrics=metrics(400, 40),
            messages=[answer(100, 10, created_at=1000), answer(200, 20, created_at=2000)],
            member_responses=[member],
        )
        returned = read_result(run)
        assert returned is not None
        assert total(without_earlier(returned, int(began * 1e9)))[0] == prompt

    def test_messages_that_hold_more_than_the_run_are_not_believed(self) -> None:
        assert total(read_result(RunOutput(metrics=metrics(50, 5), messages=[answer(100, 10)]))) == (50, 5, 0, 0)

    @pytest.mark.parametrize(
        ("provider", "model", "prompt"),
        [
            ("Anthropic", "claude-sonnet-4", 150),
            ("AwsBedrock", "x", 150),
            ("AzureFoundry", "claude", 150),
            ("VertexAI", "claude-sonnet-4", 150),
            ("VertexAI", "gemini", 100),
            ("LiteLLM", "claude-sonnet-4", 100),
        ],
    )
    def test_the_prompt_of_anthropic_and_bedrock_is_without_cache(self, provider: str, model: str, prompt: int) -> None:
        run = RunOutput(model=model, model_provider=provider, metrics=metrics(100, 10, 20, 30))
        returned = read_result(run)
        assert total(returned) == (prompt, 10, 20, 30)
        assert returned is not None
        assert returned.calls[0].beside == (prompt == 150)

    def test_a_team_adds_its_members_and_theirs(self) -> None:
        def member(run_id: str) -> RunOutput:
            return RunOutput(run_id=run_id, metrics=metrics(100, 10), tools=[ToolExecution(tool_name=run_id)])

        inner = TeamRunOutput(run_id="inner", metrics=metrics(10, 1), member_responses=[member("a")])
        team = TeamRunOutput(run_id="t", content="done", metrics=metrics(1, 1), member_responses=[inner, member("b")])
        returned = read_result(team)
        assert total(returned) == (211, 22, 0, 0)
        assert returned is not None
        assert sorted(returned.used_tools) == ["a", "b"]
        assert returned.content == "done"

    def test_a_workflow_counts_each_run_once_although_it_lists_members_twice(self) -> None:
        member = RunOutput(run_id="m", metrics=metrics(100, 10))
        team = TeamRunOutput(run_id="t", metrics=metrics(10, 1), member_responses=[member])
        workflow = WorkflowRunOutput(
            run_id="w",
            step_executor_runs=[team, member],
            workflow_agent_run=RunOutput(run_id="agent", metrics=metrics(1, 1)),
            metrics=WorkflowMetrics(steps={"s": StepMetrics("s", "team", "t", metrics(10, 1))}),
        )
        assert total(read_result(workflow)) == (111, 12, 0, 0)

    def test_a_workflow_that_keeps_no_runs_gives_the_metrics_of_its_steps(self) -> None:
        steps = {name: StepMetrics(name, "agent", name, metrics(100, 10)) for name in "ab"}
        workflow = WorkflowRunOutput(run_id="w", metrics=WorkflowMetrics(steps=steps))
        assert total(read_result(workflow)) == (200, 20, 0, 0)

    def test_a_run_that_lists_itself_ends(self) -> None:
        team = TeamRunOutput(run_id="t", metrics=metrics(10, 1))
        team.member_responses = [team]
        nameless = TeamRunOutput(metrics=metrics(10, 1))
        nameless.member_responses = [nameless]
        assert total(read_result(team)) == total(read_result(nameless)) == (10, 1, 0, 0)

    def test_the_event_that_completes_a_stream_counts(self) -> None:
        assert total(read_result(RunCompletedEvent(run_id="r", content="x", metrics=metrics(100, 10)))) == (
            100,
            10,
            0,
            0,
        )

    @pytest.mark.parametrize("kind", [RunOutput, TeamRunOutput, WorkflowRunOutput])
    def test_status_error_is_a_failure_whose_content_is_the_error(self, kind: Any) -> None:
        returned = read_result(kind(content="Connection refused", status=RunStatus.error))
        assert returned is not None
        assert (returned.failed, returned.content, returned.calls) == (True, "Connection refused", ())

    @pytest.mark.parametrize("status", [status for status in RunStatus if status is not RunStatus.error])
    def test_every_other_status_is_none(self, status: RunStatus) -> None:
        returned = read_result(RunOutput(status=status))
        assert returned is not None
        assert not returned.failed


class TestOpenAI:
    def test_a_chat_completion(self) -> None:
        usage = CompletionUsage.model_validate(
            {
                "prompt_tokens": 100,
                "completion_tokens": 10,
                "total_tokens": 110,
                "prompt_tokens_details": {"cached_tokens": 40},
            }
        )
        completion = ChatCompletion(
            id="chatcmpl-1", choices=[], created=1_700_000_000, model="gpt-4o", object="chat.completion", usage=usage
        )
        assert read_result(completion) == Returned(
            calls=(Call(100, 10, 40, model="gpt-4o", response_id="chatcmpl-1", created=1_700_000_000 * 10**9),)
        )
        assert total(read_result(usage)) == (100, 10, 40, 0)

    def test_a_response(self) -> None:
        response = Response.model_construct(
            id="resp-1",
            created_at=1_700_000_000.5,
            model="gpt-4o",
            usage=SimpleNamespace(
                input_tokens=100,
                output_tokens=10,
                total_tokens=110,
                input_tokens_details=SimpleNamespace(cached_tokens=40),
            ),
        )
        returned = read_result(response)
        assert total(returned) == (100, 10, 40, 0)
        assert returned is not None
        assert (returned.calls[0].response_id, returned.calls[0].beside) == ("resp-1", False)

    def test_a_completion_without_usage_is_nothing(self) -> None:
        completion = ChatCompletion(id="c", choices=[], created=1, model="gpt-4o", object="chat.completion")
        assert read_result(completion) is None

    def test_embeddings_are_no_tokens_of_a_job(self) -> None:
        embedding = CreateEmbeddingResponse.model_validate(
            {"object": "list", "model": "e", "data": [], "usage": {"prompt_tokens": 7, "total_tokens": 7}}
        )
        assert read_result(embedding) is None
        assert read_result(embedding.model_dump()) is None


def stranger(module: str, name: str, **attributes: Any) -> Any:
    """An object of a library that is not installed here."""
    value = type(name, (), {})()
    type(value).__module__ = module
    vars(value).update(attributes)
    return value


class TestOthers:
    def test_an_anthropic_message_counts_cache_beside_the_prompt(self) -> None:
        usage = SimpleNamespace(
            input_tokens=50, output_tokens=10, cache_read_input_tokens=20, cache_creation_input_tokens=30
        )
        message = stranger("anthropic.types.message", "Message", id="msg_1", model="claude-sonnet-4", usage=usage)
        assert read_result(message) == Returned(
            calls=(Call(100, 10, 20, 30, beside=True, model="claude-sonnet-4", response_id="msg_1"),)
        )

    def test_litellm_repeats_anthropics_names_but_counts_cache_inside(self) -> None:
        usage = SimpleNamespace(
            prompt_tokens=100,
            completion_tokens=10,
            total_tokens=110,
            cache_read_input_tokens=20,
            cache_creation_input_tokens=30,
        )
        assert total(read_result(stranger("litellm.types.utils", "ModelResponse", usage=usage))) == (100, 10, 20, 30)

    def test_pydantic_ai_has_usage_as_a_method_or_as_an_attribute(self) -> None:
        usage = SimpleNamespace(input_tokens=100, output_tokens=10, cache_read_tokens=20, cache_write_tokens=0)
        for value in (usage, lambda: usage):
            result = stranger("pydantic_ai.run", "AgentRunResult", usage=value)
            assert total(read_result(result)) == (100, 10, 20, 0)

    def test_a_run_of_pydantic_ai_is_told_call_by_call(self) -> None:
        messages = [
            SimpleNamespace(kind="request"),
            pydantic_ai_response(100, 10, model_name="gpt-4o", provider_response_id="r1"),
            pydantic_ai_response(200, 20, model_name="gpt-4o", provider_response_id="r2"),
        ]
        returned = read_result(
            stranger(
                "pydantic_ai.run",
                "AgentRunResult",
                usage=SimpleNamespace(input_tokens=350, output_tokens=31),
                run_id="run",
                new_messages=lambda: messages,
            )
        )
        assert returned is not None
        assert returned.calls == (
            Call(100, 10, model="gpt-4o", response_id="r1", run_id="run"),
            Call(200, 20, model="gpt-4o", response_id="r2", run_id="run"),
            Call(50, 1, model="gpt-4o", run_id="run"),  # of an agent that it called
        )

    def test_a_run_of_the_openai_agents_sdk_is_told_call_by_call(self) -> None:
        details = SimpleNamespace(cached_tokens=40, cache_write_tokens=5)
        usage = SimpleNamespace(input_tokens=100, output_tokens=10, input_tokens_details=details)
        responses = [
            SimpleNamespace(usage=usage, response_id="resp-1"),
            SimpleNamespace(usage=SimpleNamespace(input_tokens=200, output_tokens=20), response_id=None),
        ]
        whole = SimpleNamespace(input_tokens=350, output_tokens=35, input_tokens_details=details)
        result = stranger(
            "agents.result", "RunResult", raw_responses=responses, context_wrapper=SimpleNamespace(usage=whole)
        )
        assert read_result(result) == Returned(
            calls=(
                Call(100, 10, cache_read=40, cache_write=5, response_id="resp-1"),
                Call(200, 20),
                Call(50, 5),  # of an agent that it used as a tool
            )
        )

    def test_an_object_of_a_users_own_package_of_that_name_is_no_run(self) -> None:
        assert read_result(stranger("agents.smith", "Agent", raw_responses="many")) is None

    def test_a_strands_agent_that_served_another_job_tells_of_this_one(self) -> None:
        metrics = SimpleNamespace(
            accumulated_usage={"inputTokens": 900, "outputTokens": 90},
            agent_invocations=[
                strands_invocation((100, 10)),
                strands_invocation((300, 30), (500, 50)),
                SimpleNamespace(cycles=[]),
            ],
            traces=[SimpleNamespace(start_time=at) for at in (1000.5, 2000.5, 2001.5)],
        )
        returned = read_result(stranger("strands.agent.agent_result", "AgentResult", metrics=metrics))
        assert returned is not None
        assert [(call.prompt, call.run_id, call.began) for call in returned.calls] == [
            (100, "100", 1_000_500_000_000),
            (300, "300", 2_000_500_000_000),
            (500, "300", 2_001_500_000_000),
        ]
        assert total(without_earlier(returned, 2_000_000_000_000)) == (800, 80, 0, 0)
        assert total(without_earlier(returned, 2_000_900_000_000)) == (500, 50, 0, 0)

    def test_a_strands_agent_without_cycles_has_its_sum(self) -> None:
        metrics = SimpleNamespace(accumulated_usage={"inputTokens": 100, "outputTokens": 10}, agent_invocations=[])
        result = stranger("strands.agent.agent_result", "AgentResult", metrics=metrics)
        assert total(read_result(result)) == (100, 10, 0, 0)

    def test_a_method_that_is_not_pydantic_ais_is_not_called(self) -> None:
        def usage() -> Any:
            raise AssertionError("called")

        assert read_result(stranger("shop.cart", "Cart", usage=usage)) is None

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (SimpleNamespace(usage_metadata={"input_tokens": 100, "output_tokens": 10}), (100, 10, 0, 0)),
            (
                SimpleNamespace(
                    usage_metadata={
                        "input_tokens": 100,
                        "output_tokens": 10,
                        "input_token_details": {"cache_read": 20, "cache_creation": 5},
                    }
                ),
                (100, 10, 20, 5),
            ),
            (
                SimpleNamespace(
                    usage_metadata=SimpleNamespace(
                        prompt_token_count=100,
                        candidates_token_count=7,
                        thoughts_token_count=3,
                        cached_content_token_count=40,
                    )
                ),
                (100, 10, 40, 0),
            ),
            (
                SimpleNamespace(
                    token_usage=SimpleNamespace(
                        prompt_tokens=100,
                        completion_tokens=10,
                        total_tokens=110,
                        cached_prompt_tokens=20,
                        cache_creation_tokens=5,
                    )
                ),
                (100, 10, 20, 5),
            ),
            (SimpleNamespace(accumulated_usage={"inputTokens": 100, "outputTokens": 10}), (100, 10, 0, 0)),
            (
                SimpleNamespace(
                    metrics=SimpleNamespace(
                        accumulated_usage={
                            "inputTokens": 100,
                            "outputTokens": 10,
                            "totalTokens": 130,
                            "cacheReadInputTokens": 20,
                        }
                    )
                ),
                (120, 10, 20, 0),
            ),
            (
                SimpleNamespace(
                    metrics=SimpleNamespace(
                        accumulated_usage={
                            "inputTokens": 100,
                            "outputTokens": 10,
                            "totalTokens": 110,
                            "cacheReadInputTokens": 20,
                        }
                    )
                ),
                (100, 10, 20, 0),
            ),
            ({"usage": {"inputTokens": 100, "outputTokens": 10, "cacheReadInputTokens": 20}}, (120, 10, 20, 0)),
            ({"id": "x", "usage": {"prompt_tokens": 100, "completion_tokens": 10}}, (100, 10, 0, 0)),
            ({"usage": {"input_tokens": 50, "output_tokens": 10, "cache_read_input_tokens": 20}}, (70, 10, 20, 0)),
            ({"prompt_tokens": 100, "completion_tokens": 10}, (100, 10, 0, 0)),
        ],
        ids=[
            "langchain",
            "langchain cache",
            "gemini",
            "crewai",
            "several strands agents",
            "strands on bedrock",
            "strands on openai",
            "bedrock",
            "dict",
            "anthropic dict",
            "bare usage",
        ],
    )
    def test_a_usage_block_is_found_wherever_it_is(self, value: Any, expected: tuple[int, int, int, int]) -> None:
        assert total(read_result(value)) == expected

    def test_the_id_of_a_mapping_is_the_responses(self) -> None:
        returned = read_result({"id": "r", "created": 5, "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
        assert returned is not None
        assert (returned.calls[0].response_id, returned.calls[0].created) == ("r", 5 * 10**9)

    @pytest.mark.parametrize(
        "value",
        [
            *(None, "text", b"x", 5, 1.5, True, [], (), {}, object()),
            *({"usage": None}, {"usage": "much"}, {"usage": {}}, {"created": float("nan")}),
            *({"usage": {"prompt_tokens": -1}}, {"usage": {"prompt_tokens": True}}),
        ],
    )
    def test_what_is_no_response_is_nothing(self, value: object) -> None:
        assert read_result(value) is None

    def test_a_response_that_raises_at_every_touch_is_nothing(self) -> None:
        class Hostile:
            def __getattr__(self, name: str) -> Any:
                raise RuntimeError(name)

        assert read_result(Hostile()) is None

    def test_a_hostile_mapping_or_method_is_nothing(self) -> None:
        class HostileMapping(dict[str, Any]):
            def get(self, *args: Any) -> Any:
                raise RuntimeError("no")

        def usage() -> Any:
            raise RuntimeError("no")

        assert read_result(HostileMapping(usage={})) is None
        assert read_result(stranger("pydantic_ai.run", "AgentRunResult", usage=usage)) is None

    def test_what_compares_like_an_array_is_nothing(self) -> None:
        class Array:
            def __eq__(self, other: object) -> Any:
                return self

            def __bool__(self) -> bool:
                raise ValueError("ambiguous")

        class Text(str):
            __slots__ = ()

            def __eq__(self, other: object) -> bool:
                raise LookupError("no")

            __hash__ = str.__hash__

        assert read_result({"object": Array()}) is None
        assert read_result({"object": Text("x")}) is None
        returned = read_result({"created": Array(), "model": Text("m"), "usage": {"prompt_tokens": 1}})
        assert returned is not None
        assert (returned.calls[0].created, type(returned.calls[0].model)) == (None, str)

    def test_a_class_that_hides_what_it_is_is_nothing(self) -> None:
        class Unnamed:
            pass

        class Hiding:
            @property
            def __class__(self) -> Any:
                raise StoppedError

        class StoppedError(Exception):
            pass

        Unnamed.__module__ = None  # type: ignore[assignment]
        assert read_result(Unnamed()) is None
        assert read_result(Hiding()) is None

    def test_a_soft_time_limit_passes(self) -> None:
        class Slow:
            @property
            def __class__(self) -> Any:
                raise SoftTimeLimitExceeded

        class SlowUsage:
            @property
            def usage(self) -> Any:
                raise SoftTimeLimitExceeded

        for slow in (Slow(), SlowUsage()):
            with pytest.raises(SoftTimeLimitExceeded):
                read_result(slow)

    @pytest.mark.parametrize("created", [float("nan"), float("inf"), -1e300, "now"])
    def test_an_impossible_time_of_creation_is_left_out(self, created: Any) -> None:
        returned = read_result({"created": created, "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
        assert returned is not None
        assert returned.calls[0].created is None
