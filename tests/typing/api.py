"""The public API as a type checker sees it. `make check` reads this file; nothing runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, assert_type

import xpander_celery as xc
from xpander_celery.backend.task import Task
from xpander_celery.recording import Job
from xpander_celery.testing import capture_reports

if TYPE_CHECKING:
    from celery import Celery


def installing(app: Celery) -> None:
    xc.instrument(app, tasks=["reports.*"], agent_id="agent-123")
    xc.uninstrument()
    assert_type(xc.flush(timeout_s=5), bool)


@xc.reported
def bare(question: str, times: int = 1) -> str:
    return question * times


@xc.reported(agent_id="agent-123", input=False, result=str)
def with_options(question: str) -> int:
    return len(question)


@xc.tool_call("search")
def search(query: str) -> list[str]:
    return [query]


@xc.tool_call("search")
async def search_async(query: str) -> list[str]:
    return [query]


@xc.tool_call("search")
async def search_stream(query: str) -> AsyncIterator[str]:
    yield query


def decorated_functions_keep_their_types() -> None:
    assert_type(bare("a", times=2), str)
    assert_type(with_options("a"), int)
    assert_type(search("a"), list[str])
    assert_type(search_stream("a"), AsyncIterator[str])
    bare(1)  # type: ignore[arg-type]
    xc.reported(agent="agent-123")  # type: ignore[call-overload]


async def decorated_coroutines_too() -> None:
    assert_type(await search_async("a"), list[str])
    async with xc.tool_call("search"), xc.job("digest") as job:
        assert_type(job, Job)


def jobs(response: object) -> None:
    with xc.job("nightly-digest", input={"day": 1}, agent_id="agent-123", id="digest-1") as job:
        assert_type(job, Job)
        job.result = {"sent": 3}
    current = xc.current_job()
    assert_type(current.id, str | None)
    current.add_usage(xc.Tokens(prompt_tokens=10, completion_tokens=1))
    current.add_usage(response)
    current.input, current.llm_response, current.agent_id = "text", response, "agent-9"


def options() -> xc.TaskOptions:
    return xc.TaskOptions(agent_id="agent-123", input=lambda question: question)


def reporting(backend: xc.Backend) -> None:
    task = backend.report_external_task(id="ext-1", result="done", tokens=xc.Tokens(), duration=1.5)
    assert_type(task, Task)
    assert_type(task.wait(timeout_s=1), Task)
    assert_type(backend.get_args(), dict[str, Any])


async def reporting_async(backend: xc.Backend) -> None:
    assert_type(await backend.areport_external_task(result="done"), Task)
    assert_type(await (await backend.ainvoke_agent("agent-9", "hello")).await_result(), Task)
    assert_type(await backend.aget_args(), dict[str, Any])


def before_send(report: xc.TaskReport) -> xc.TaskReport | None:
    assert_type(report.tokens, xc.Tokens | None)
    return report if report.is_success else None


def testing(app: Celery) -> None:
    with capture_reports(app) as reports:
        assert_type(reports[0], xc.TaskReport)
        assert_type(reports.of("job-1"), xc.TaskReport | None)
