"""The wire forms of the scripted model, as raw JSON and server-sent events."""

import json
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from xpander_celery.sandbox.app import build_app
from xpander_celery.sandbox.store import Store

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
QUESTION = "What is 2 plus 5?"
CHAT: dict[str, Any] = {
    "model": "gpt-4.1",
    "messages": [{"role": "user", "content": QUESTION}],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}],
}
MESSAGES: dict[str, Any] = {
    "model": "claude-sandbox",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": QUESTION}],
    "tools": [{"name": "add", "input_schema": PARAMETERS}],
}


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    with closing(Store(":memory:")) as store:
        transport = httpx.ASGITransport(build_app(store))
        async with httpx.AsyncClient(transport=transport, base_url="http://sandbox") as client:
            yield client


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def events(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await client.post(path, json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


async def served(client: httpx.AsyncClient) -> dict[str, Any]:
    usage: dict[str, Any] = (await client.get("/_sandbox/usage")).json()
    return usage


async def test_a_chat_calls_the_tool_and_then_answers(client: httpx.AsyncClient) -> None:
    first = await post(client, "/v1/chat/completions", CHAT)
    message = first["choices"][0]["message"]
    assert first["choices"][0]["finish_reason"] == "tool_calls"
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 2}'}
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "7"}
    second = await post(client, "/v1/chat/completions", {**CHAT, "messages": [*CHAT["messages"], message, result]})
    assert second["choices"][0]["finish_reason"] == "stop"
    assert second["choices"][0]["message"]["content"] == f"My tools said add: 7. You asked: {QUESTION}"


async def test_tools_of_an_earlier_question_are_called_again_for_the_next(client: httpx.AsyncClient) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    past = [*CHAT["messages"], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "7"}]
    answer = await post(client, "/v1/chat/completions", {**CHAT, "messages": [*past, *CHAT["messages"]]})
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_streamed_chat_says_the_same_as_a_whole_one(client: httpx.AsyncClient) -> None:
    body = {**CHAT, "stream_options": {"include_usage": True}}
    whole = await post(client, "/v1/chat/completions", CHAT)
    *chunks, last = await events(client, "/v1/chat/completions", body)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    arguments = "".join(call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", ()))
    assert arguments == whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    text = [
        delta["content"]
        for chunk in await events(client, "/v1/chat/completions", {**body, "tools": []})
        for delta in [choice["delta"] for choice in chunk["choices"]]
        if delta.get("content")
    ]
    assert len(text) > 2
    assert "".join(text).endswith(QUESTION)


async def test_a_stream_without_the_option_has_no_usage(client: httpx.AsyncClient) -> None:
    assert all("usage" not in chunk for chunk in await events(client, "/v1/chat/completions", CHAT))


async def test_what_was_served_is_counted_call_by_call_and_summed(client: httpx.AsyncClient) -> None:
    whole = await post(client, "/v1/chat/completions", CHAT)
    *_, last = await events(client, "/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}})
    usage = await served(client)
    assert [(call["id"], call["stream"], call["tools"]) for call in usage["calls"]] == [
        (whole["id"], False, ["add"]),
        (last["id"], True, ["add"]),
    ]
    assert usage["total"] == {
        "prompt_tokens": whole["usage"]["prompt_tokens"] * 2,
        "completion_tokens": whole["usage"]["completion_tokens"] * 2,
        "cache_read_tokens": whole["usage"]["prompt_tokens_details"]["cached_tokens"] * 2,
        "cache_write_tokens": 0,
    }
    await client.delete("/_sandbox/usage")
    assert (await served(client))["calls"] == []


async def test_a_seed_in_the_request_varies_the_counts(client: httpx.AsyncClient) -> None:
    answers = [await post(client, "/v1/chat/completions", {**CHAT, "seed": seed}) for seed in (1, 2, 3)]
    assert len({json.dumps(answer["usage"]) for answer in answers}) > 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_an_ordered_error_is_answered_and_costs_nothing(client: httpx.AsyncClient, path: str) -> None:
    body = {**MESSAGES, "messages": [{"role": "user", "content": [{"type": "text", "text": "Go [error 429]"}]}]}
    response = await client.post(path, json=body)
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert "message" in response.json()["error"]
    usage = await served(client)
    assert ([call["status"] for call in usage["calls"]], sum(usage["total"].values())) == ([429], 0)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("body", ["", "[]", '"text"', '{"messages": 7, "input": 7}'])
async def test_a_body_that_is_no_request_is_refused(client: httpx.AsyncClient, path: str, body: str) -> None:
    assert (await client.post(path, content=body)).status_code == 400


async def test_a_message_calls_the_tool_and_then_answers(client: httpx.AsyncClient) -> None:
    first = await post(client, "/v1/messages", MESSAGES)
    [block] = first["content"]
    assert (first["stop_reason"], block["name"], block["input"]) == ("tool_use", "add", {"a": 2})
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "7"}]}
    turns = [{"role": "assistant", "content": first["content"]}, {"role": "user", "content": [result]}]
    second = await post(client, "/v1/messages", {**MESSAGES, "messages": [*MESSAGES["messages"], *turns]})
    assert second["stop_reason"] == "end_turn"
    assert second["content"] == [{"type": "text", "text": f"My tools said add: 7. You asked: {QUESTION}"}]


async def test_a_streamed_message_says_the_same_as_a_whole_one(client: httpx.AsyncClient) -> None:
    whole = await post(client, "/v1/messages", MESSAGES)
    stream = await events(client, "/v1/messages", MESSAGES)
    started, ended = stream[0], stream[-2]
    assert started["message"]["usage"] == {**whole["usage"], "output_tokens": 1}
    assert ended["usage"] == {"output_tokens": whole["usage"]["output_tokens"]}
    written = "".join(event["delta"]["partial_json"] for event in stream if event["type"] == "content_block_delta")
    assert json.loads(written) == whole["content"][0]["input"]


async def test_a_message_counts_its_cache_beside_the_input(client: httpx.AsyncClient) -> None:
    usage = (await post(client, "/v1/messages", {**MESSAGES, "system": "Be brief. " * 300}))["usage"]
    assert usage["cache_creation_input_tokens"] > 0
    [call] = (await served(client))["calls"]
    assert usage == {
        "input_tokens": call["prompt_tokens"],
        "cache_creation_input_tokens": call["cache_write_tokens"],
        "cache_read_input_tokens": call["cache_read_tokens"],
        "output_tokens": call["completion_tokens"],
    }


async def test_the_models_are_listed(client: httpx.AsyncClient) -> None:
    names = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
    assert "gpt-4.1" in names
    assert (await client.get("/v1/models/any/name")).json()["id"] == "any/name"
