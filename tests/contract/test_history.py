"""Each client reads from the sandbox what the other one wrote."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
import xpander_sdk
from xpander_sdk.models.shared import Tokens as OfficialTokens

from tests.support.sandbox import Sandbox
from xpander_celery.backend import Backend, Configuration
from xpander_celery.errors import AuthenticationError, NotFoundError
from xpander_celery.report import TaskReport, Tokens

RUN: dict[str, Any] = {
    "input": "How many red chairs? Grüße 🎉",
    "llm_response": {"celery": {"task": "shop.ask"}, "response": None},
    "is_success": True,
    "result": "Seven.",
    "duration": 2.5,
    "used_tools": ["stock_of", "price_of"],
}
COUNTS = {"completion_tokens": 38, "prompt_tokens": 214, "cache_read_tokens": 64, "cache_write_tokens": 0}
OF_ONE_RECORD = {"id", "created_at", "started_at", "finished_at", "updated_at"}


@pytest.fixture
def agent_id() -> str:
    return f"agent-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def official(sandbox: Sandbox) -> xpander_sdk.Configuration:
    return xpander_sdk.Configuration(api_key=sandbox.api_key, base_url=sandbox.url, organization_id="org-1")


@pytest.fixture
async def backend(sandbox: Sandbox) -> AsyncIterator[Backend]:
    async with Backend(Configuration(sandbox.api_key, "org-1", sandbox.url)) as opened:
        yield opened


async def test_the_official_client_reads_what_ours_wrote(
    backend: Backend, official: xpander_sdk.Configuration, agent_id: str
) -> None:
    await backend.areport_external_task(agent_id, id=f"{agent_id}-1", tokens=Tokens(**COUNTS), **RUN)
    backend.report_external_task(agent_id, id=f"{agent_id}-2", is_success=False, result="ValueError: no")
    await backend.asend_report(TaskReport(agent_id=agent_id, id=f"{agent_id}-3", result="relayed"))

    listed = await xpander_sdk.Tasks(configuration=official).alist(agent_id)
    assert {task.id for task in listed} == {f"{agent_id}-{number}" for number in (1, 2, 3)}

    read = await xpander_sdk.Tasks(configuration=official).aget(f"{agent_id}-1")
    assert (read.agent_id, read.result, read.duration, read.used_tools) == (
        agent_id, RUN["result"], RUN["duration"], RUN["used_tools"],
    )  # fmt: skip
    assert read.input.text == RUN["input"]
    assert read.status == xpander_sdk.AgentExecutionStatus.Completed
    assert read.tokens is not None
    assert read.tokens.model_dump() == {**COUNTS, "total_tokens": 252}
    failed = await xpander_sdk.Tasks(configuration=official).aget(f"{agent_id}-2")
    assert failed.status in (xpander_sdk.AgentExecutionStatus.Failed, xpander_sdk.AgentExecutionStatus.Error)
    activity = await read.aget_activity_log()
    assert activity.id


async def test_a_run_that_the_official_client_reports_looks_the_same(
    sandbox: Sandbox, backend: Backend, official: xpander_sdk.Configuration, agent_id: str
) -> None:
    await backend.areport_external_task(agent_id, id=f"{agent_id}-ours", tokens=Tokens(**COUNTS), **RUN)
    client = xpander_sdk.Backend(configuration=official)
    await client.areport_external_task(agent_id, id=f"{agent_id}-theirs", tokens=OfficialTokens(**COUNTS), **RUN)

    def lasting(task_id: str) -> dict[str, Any]:
        record = sandbox.record(task_id)
        assert record is not None
        return {name: value for name, value in record.items() if name not in OF_ONE_RECORD}

    assert lasting(f"{agent_id}-ours") == lasting(f"{agent_id}-theirs")
    theirs = await backend.aload_task(f"{agent_id}-theirs")
    assert (theirs.result, theirs.has_ended, theirs.tokens) == ("Seven.", True, Tokens(**COUNTS))


async def test_either_client_may_correct_the_record_of_the_other(
    sandbox: Sandbox, backend: Backend, official: xpander_sdk.Configuration, agent_id: str
) -> None:
    await backend.areport_external_task(agent_id, id=agent_id, result="ours")
    await xpander_sdk.Backend(configuration=official).areport_external_task(agent_id, id=agent_id, result="theirs")
    assert (await backend.aload_task(agent_id)).result == "theirs"
    await backend.areport_external_task(agent_id, id=agent_id, result="ours again")
    assert [record["result"] for record in sandbox.records(agent_id)] == ["ours again"]


async def test_a_task_started_by_ours_is_ended_by_the_official_client(
    backend: Backend, official: xpander_sdk.Configuration, agent_id: str
) -> None:
    started = await backend.ainvoke_agent(agent_id, "Are you there?")
    assert not started.has_ended
    theirs = await xpander_sdk.Tasks(configuration=official).aget(started.id)
    assert theirs.input.text == "Are you there?"
    theirs.status = xpander_sdk.AgentExecutionStatus.Completed
    theirs.result = "Yes."
    await theirs.asave()
    assert (await started.await_result(timeout_s=30)).result == "Yes."
    assert started.status == "completed"


async def test_the_official_objects_are_taken_where_ours_are(
    sandbox: Sandbox, official: xpander_sdk.Configuration, agent_id: str
) -> None:
    agent = await xpander_sdk.Agents(configuration=official).aget(agent_id)
    async with Backend(official) as backend:
        reported = await backend.areport_external_task(agent=agent, id=agent_id, tokens=OfficialTokens(prompt_tokens=3))
    assert reported.agent_id == agent_id
    assert reported.tokens == Tokens(prompt_tokens=3)
    assert sandbox.api_key not in repr(backend) + repr(reported)


async def test_refusals_are_told_apart(sandbox: Sandbox, backend: Backend) -> None:
    stranger = Backend(Configuration("wrong", base_url=sandbox.url))
    with pytest.raises(AuthenticationError):
        await stranger.areport_external_task("agent-1")
    with pytest.raises(NotFoundError):
        await backend.aload_task("no-such-task")
