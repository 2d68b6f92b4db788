"""Real clients through the scripted model: openai and Agno, whole and streamed."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from agno.agent import Agent
from agno.models.base import Model
from agno.models.openai import OpenAIChat, OpenAIResponses
from agno.run.agent import RunOutput
from agno.run.base import RunStatus
from openai.types.chat import ChatCompletionToolUnionParam
from pydantic import BaseModel

from tests.support.sandbox import Sandbox, start_sandbox

ADD: ChatCompletionToolUnionParam = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@pytest.fixture(scope="module")
def running_sandbox() -> Iterator[Sandbox]:
    with start_sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running_sandbox: Sandbox) -> Sandbox:
    running_sandbox.client.delete("/_sandbox/usage")
    return running_sandbox


@pytest.fixture
def client(sandbox: Sandbox) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{sandbox.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def rate(currency: str) -> float:
    """What one euro costs in a currency."""
    return 1.25


def convert(amount: float, rate: float) -> float:
    """An amount in the other currency."""
    return amount * rate


def test_the_openai_client_reads_a_whole_and_a_streamed_chat(sandbox: Sandbox, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="gpt-4.1", messages=[{"role": "user", "content": "Add 2"}], tools=[ADD]
    )
    with client.chat.completions.stream(
        model="gpt-4.1",
        messages=[{"role": "user", "content": "Add 2"}],
        tools=[ADD],
        stream_options={"include_usage": True},
    ) as stream:
        streamed = stream.get_final_completion()
    assert whole.usage is not None
    assert streamed.usage is not None
    assert streamed.usage.model_dump() == whole.usage.model_dump()
    for completion in (whole, streamed):
        [call] = completion.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.arguments == '{"a": 2}'
    assert sandbox.served_usage()["total"]["prompt_tokens"] == whole.usage.prompt_tokens * 2


def test_the_openai_client_reads_a_whole_and_a_streamed_response(sandbox: Sandbox, client: openai.OpenAI) -> None:
    whole = client.responses.create(model="gpt-4.1", input="Hello")
    with client.responses.stream(model="gpt-4.1", input="Hello") as stream:
        streamed = stream.get_final_response()
    assert whole.usage is not None
    assert streamed.usage == whole.usage
    assert streamed.output_text == whole.output_text
    assert sandbox.served_usage()["total"]["prompt_tokens"] == whole.usage.input_tokens * 2


def test_the_openai_client_sees_ordered_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="gpt-4.1", messages=[{"role": "user", "content": "[error 429]"}])
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="gpt-4.1", messages=[{"role": "user", "content": "[error 500]"}])


@pytest.mark.parametrize("model_class", [OpenAIChat, OpenAIResponses])
@pytest.mark.parametrize("stream", [False, True])
def test_an_agno_agent_uses_its_tools_and_counts_what_was_served(
    sandbox: Sandbox, model_class: type[Model], stream: bool
) -> None:
    agent = Agent(model=_model(sandbox, model_class), tools=[rate, convert], telemetry=False)
    question = "What are 12 euros in dollars?"
    run: Any = [*agent.run(question, stream=True, yield_run_output=True)][-1] if stream else agent.run(question)
    assert isinstance(run, RunOutput)
    assert run.status == RunStatus.completed
    assert {tool.tool_name for tool in run.tools or ()} == {"rate", "convert"}
    assert run.metrics is not None
    total = sandbox.served_usage()["total"]
    assert run.metrics.input_tokens == total["prompt_tokens"] > 0
    assert run.metrics.output_tokens == total["completion_tokens"] > 0
    assert run.metrics.cache_read_tokens == total["cache_read_tokens"] > 0


def test_an_agno_agent_gets_a_structured_answer(sandbox: Sandbox) -> None:
    class Invoice(BaseModel):
        title: str
        amount: int

    agent = Agent(model=_model(sandbox, OpenAIChat), output_schema=Invoice, telemetry=False)
    assert agent.run("Bill 40").content == Invoice(title="Bill 40", amount=40)


def test_an_agno_agent_runs_into_an_ordered_error(sandbox: Sandbox) -> None:
    agent = Agent(model=_model(sandbox, OpenAIChat), telemetry=False)
    assert agent.run("Hello [error 500]").status == RunStatus.error


def _model(sandbox: Sandbox, model_class: type[Any]) -> Model:
    model: Model = model_class(id="gpt-4.1", base_url=f"{sandbox.url}/v1", api_key="any", max_retries=0)
    return model
