"""A stored agent's arguments fit Agno at the SDK's pin, here and in a real worker."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import xpander_sdk
from agno.agent import Agent
from celery import Celery

from tests.support.broker import start_redis
from tests.support.sandbox import Sandbox
from tests.support.waiting import until
from tests.support.worker import start_worker
from xpander_celery.backend import Backend, Configuration
from xpander_celery.errors import AuthenticationError, NetworkError

from .capture import Capture

AGENT = "agent-stored"
QUESTION = "How many red chairs are in stock?"


def stock_of(item: str) -> int:
    """How many of an item are in stock."""
    return len(item) * 7


@pytest.fixture
def backend(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{sandbox.url}/v1")
    return Backend(Configuration(sandbox.api_key, "org-1", sandbox.url, AGENT))


async def test_the_documented_pattern_works(backend: Backend) -> None:
    agent = Agent(**await backend.aget_args(tools=[stock_of], override={"name": "Mine"}))
    run = await agent.arun(QUESTION)
    assert agent.name == "Mine"
    assert str(stock_of(QUESTION)) in run.content
    assert run.metrics.total_tokens > 0
    assert "stock_of" in [tool.tool_name for tool in run.tools]


def test_the_synchronous_twin_works_too(backend: Backend) -> None:
    run = Agent(**backend.get_args(tools=[stock_of])).run(QUESTION)
    assert str(stock_of(QUESTION)) in run.content


async def test_the_synchronous_twin_works_inside_a_running_loop(backend: Backend) -> None:
    assert Agent(**backend.get_args()).id == AGENT


async def test_no_events_are_pushed_for_a_task_that_is_not_there(backend: Backend, sandbox: Sandbox) -> None:
    sandbox.clear_requests()
    await Agent(**await backend.aget_args(tools=[stock_of])).arun(QUESTION)
    asked = {(request["method"], request["path"]) for request in sandbox.requests()}
    assert ("GET", f"/agents/{AGENT}") in asked
    assert not [path for _, path in asked if path.startswith(("/agent-execution", "/activity"))]


async def test_a_task_and_a_version_pass_through(backend: Backend, sandbox: Sandbox) -> None:
    task = await backend.ainvoke_agent(prompt="hello")
    sandbox.clear_requests()
    keywords = await backend.aget_args(agent_version=3, task=task)
    assert keywords["id"] == AGENT
    looked_up = [request for request in sandbox.requests() if request["path"] == f"/agents/{AGENT}"]
    assert [request["headers"]["x-agent-version"] for request in looked_up] == ["3"]


async def test_with_a_task_both_ask_the_platform_the_same(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    official = xpander_sdk.Configuration(api_key="key-1", base_url=capture.url, organization_id="org-1")
    task = await xpander_sdk.Tasks(configuration=official).aget("task-1")

    async def asked(call: Callable[..., Any]) -> tuple[list[str], set[str]]:
        from xpander_sdk.utils.cache import agent_payload_cache, backend_config_cache

        agent_payload_cache.invalidate()
        backend_config_cache.invalidate()
        capture.take()
        keywords = await call(agent_id=AGENT, task=task)
        return sorted(f"{request.method} {request.path}" for request in capture.take()), set(keywords)

    theirs, their_keywords = await asked(xpander_sdk.Backend(configuration=official).aget_args)
    ours, our_keywords = await asked(Backend(official).aget_args)
    assert ours == theirs
    assert their_keywords - our_keywords == {"_xpander_hidden_mcp_toolkits"}
    assert our_keywords <= their_keywords


async def test_the_defects_that_are_worked_around_are_still_there(backend: Backend) -> None:
    """When this fails the SDK has been mended: the workarounds in `backend/agno.py` have nothing left to do."""
    official = xpander_sdk.Backend(
        configuration=xpander_sdk.Configuration(
            api_key=backend.configuration.api_key, base_url=backend.configuration.base_url, organization_id="org-1"
        )
    )
    with pytest.raises(AttributeError, match="instructions_override"):
        await official.aget_args(agent_id=AGENT)
    task = await official.areport_external_task(agent_id=AGENT, id=uuid.uuid4().hex)
    with pytest.raises(TypeError, match="_xpander_hidden_mcp_toolkits"):
        Agent(**await official.aget_args(agent_id=AGENT, task=task))


async def test_what_the_sdk_hides_is_told_apart(sandbox: Sandbox) -> None:
    stranger = Backend(Configuration("wrong", base_url=sandbox.url, agent_id=AGENT))
    with pytest.raises(AuthenticationError) as caught:
        await stranger.aget_args()
    assert caught.value.status_code == 403
    nowhere = Backend(Configuration("k", base_url="http://127.0.0.1:1", agent_id=AGENT))
    with pytest.raises(NetworkError, match="ConnectError"):
        await asyncio.to_thread(nowhere.get_args)


@pytest.fixture(scope="module")
def worker_client(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Celery]:
    """A client of a worker that runs the example, for an agent of its own."""
    with (
        start_redis() as broker,
        start_worker(
            broker,
            tmp_path_factory.mktemp("worker"),
            "--concurrency=1",
            app="examples.stored_agent",
            XPANDER_API_KEY=sandbox.api_key,
            XPANDER_BASE_URL=sandbox.url,
            XPANDER_AGENT_ID=AGENT,
            OPENAI_API_KEY="any",
            OPENAI_BASE_URL=f"{sandbox.url}/v1",
        ),
        Celery("client", broker=broker.url, backend=broker.backend) as client,
    ):
        yield client


def test_a_stored_agent_runs_in_a_real_worker_and_its_run_is_in_history(
    sandbox: Sandbox, worker_client: Celery
) -> None:
    before = sandbox.served_usage()["total"]
    sent = worker_client.send_task("stored_agent.answer", [QUESTION])
    answer = sent.get(timeout=90)
    record = until(lambda: sandbox.record(sent.id), what="the job's record")
    assert str(stock_of(QUESTION)) in answer
    after = sandbox.served_usage()["total"]
    assert (record["agent_id"], record["status"], record["result"]) == (AGENT, "completed", answer)
    assert record["input"]["text"] == QUESTION
    assert record["tokens"]["prompt_tokens"] == after["prompt_tokens"] - before["prompt_tokens"] > 0
    assert record["tokens"]["completion_tokens"] == after["completion_tokens"] - before["completion_tokens"] > 0
    assert "stock_of" in record["used_tools"]


def test_a_job_asks_another_agent_and_waits_for_its_answer(sandbox: Sandbox, worker_client: Celery) -> None:
    colleague = f"colleague-{uuid.uuid4().hex[:8]}"
    sent = worker_client.send_task("stored_agent.ask_colleague", [colleague, "Are you there?"])
    [asked] = until(lambda: sandbox.records(colleague), what="the task of the other agent")
    assert asked["status"] == "pending"
    change = {**asked, "status": "completed", "result": "Yes."}
    sandbox.client.patch(f"/agent-execution/{asked['id']}/update", json=change).raise_for_status()
    assert sent.get(timeout=60) == "completed: Yes."
