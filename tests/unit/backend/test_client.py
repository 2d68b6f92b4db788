"""Reports and reads through `Backend`, as the platform sees them."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from xpander_celery import errors
from xpander_celery.backend import Backend, Configuration
from xpander_celery.report import TaskReport, Tokens

from .conftest import Platform, task

LEAST = (
    b'{"id":null,"input":null,"llm_response":null,"tokens":null,"is_success":true,"result":null,'
    b'"duration":0.0,"used_tools":[]}'
)


def test_a_report_without_values_has_all_eight_keys_in_order(backend: Backend, platform: Platform) -> None:
    backend.report_external_task()
    [request] = platform.requests
    assert request.content == LEAST
    assert request.headers["content-type"] == "application/json"
    assert request.headers["x-api-key"] == "key-1"
    assert platform.paths == ["POST /agent-execution/agent-1/report_task"]


async def test_a_report_is_compact_and_not_escaped(backend: Backend, platform: Platform) -> None:
    await backend.areport_external_task(
        id="job-1",
        input="Grüße",
        llm_response={"a": 1},
        tokens=Tokens(completion_tokens=380, prompt_tokens=2140),
        is_success=False,
        result="x",
        duration=1.5,
        used_tools=["search"],
    )
    assert platform.requests[0].content.decode() == (
        '{"id":"job-1","input":"Grüße","llm_response":{"a":1},"tokens":{"completion_tokens":380,"prompt_tokens":2140,'
        '"cache_read_tokens":0,"cache_write_tokens":0,"total_tokens":2520},"is_success":false,"result":"x",'
        '"duration":1.5,"used_tools":["search"]}'
    )


async def test_both_twins_send_the_same_and_return_the_task(backend: Backend, platform: Platform) -> None:
    platform.answers = [task(result="done")]
    one = await backend.areport_external_task(id="job-1", result="done")
    other = backend.report_external_task(id="job-1", result="done")
    assert (one.id, one.result, one.status, one.input.text) == ("job-1", "done", "completed", "hello")
    assert one == other
    first, second = platform.requests
    assert (first.method, first.url, first.content) == (second.method, second.url, second.content)


@pytest.mark.parametrize("name", ["report_external_task", "invoke_agent", "load_task"])
def test_twins_take_the_same_arguments(name: str) -> None:
    twin = getattr(Backend, name)
    original = getattr(Backend, f"a{name}")
    assert inspect.signature(twin) == inspect.signature(original)


async def test_the_agent_is_escaped_in_the_path(backend: Backend, platform: Platform) -> None:
    await backend.areport_external_task(agent_id="a/b?c#d ü")
    assert platform.paths == ["POST /agent-execution/a%2Fb%3Fc%23d%20%C3%BC/report_task"]


def test_an_agent_object_wins_over_an_id(backend: Backend, platform: Platform) -> None:
    backend.report_external_task(agent_id="other", agent=SimpleNamespace(id="object"))
    assert platform.paths == ["POST /agent-execution/object/report_task"]


def test_without_an_agent_nothing_is_sent(platform: Platform) -> None:
    backend = Backend(Configuration("k"), transport=httpx.MockTransport(platform))
    with pytest.raises(errors.InvalidValueError, match="XPANDER_AGENT_ID"):
        backend.report_external_task(result="x")
    assert platform.requests == []


def test_without_a_key_nothing_is_sent(platform: Platform) -> None:
    backend = Backend(transport=httpx.MockTransport(platform))
    with pytest.raises(errors.ConfigurationError, match="XPANDER_API_KEY"):
        backend.report_external_task("agent-1")
    assert platform.requests == []


def test_a_bad_value_is_refused_before_sending(backend: Backend, platform: Platform) -> None:
    with pytest.raises(errors.InvalidValueError, match="duration"):
        backend.report_external_task(duration=float("nan"))
    assert platform.requests == []


async def test_a_configuration_for_one_call_brings_its_own_agent(backend: Backend, platform: Platform) -> None:
    official = SimpleNamespace(api_key="k2", base_url="http://h2:9016", organization_id="o2", agent_id="a2")
    await backend.areport_external_task(configuration=official)
    backend.report_external_task()
    first, second = platform.requests
    assert str(first.url) == "http://h2:9016/o2/agent-execution/a2/report_task"
    assert first.headers["x-api-key"] == "k2"
    assert str(second.url) == "https://platform.example/agent-execution/agent-1/report_task"
    assert second.headers["x-api-key"] == "key-1"


async def test_the_relays_report_is_sent_as_it_is(backend: Backend, platform: Platform) -> None:
    report = TaskReport(agent_id="agent-7", id="job-7", result="x", used_tools=("t",))
    await backend.asend_report(report)
    assert platform.requests[0].content == report.to_wire()
    assert platform.paths == ["POST /agent-execution/agent-7/report_task"]


async def test_a_report_that_json_cannot_hold_is_rendered(backend: Backend, platform: Platform) -> None:
    report = TaskReport(agent_id="agent-7", id="job-7", llm_response={"model": object, "text": "\ud800"})
    await backend.asend_report(report.model_copy(update={"tokens": {"prompt_tokens": 3}, "duration": 2}))
    assert platform.body["llm_response"]["text"] == "?"
    assert platform.body["tokens"]["total_tokens"] == 3


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.RequestRefusedError),
        (401, errors.AuthenticationError),
        (403, errors.AuthenticationError),
        (404, errors.NotFoundError),
        (410, errors.NotFoundError),
        (408, errors.ServerError),
        (409, errors.RequestRefusedError),
        (413, errors.RequestRefusedError),
        (422, errors.RequestRefusedError),
        (425, errors.ServerError),
        (429, errors.RateLimitedError),
        (500, errors.ServerError),
        (503, errors.ServerError),
        (599, errors.ServerError),
        (302, errors.ProtocolError),
        (304, errors.ProtocolError),
    ],
)
async def test_each_status_has_its_error(
    backend: Backend, platform: Platform, status: int, kind: type[errors.BackendError]
) -> None:
    platform.answers = [httpx.Response(status, text="because", headers={"location": "https://elsewhere.example/"})]
    for call in (backend.areport_external_task(), backend.asend_report(TaskReport(agent_id="a"))):
        with pytest.raises(kind) as caught:
            await call
        assert type(caught.value) is kind
        assert caught.value.status_code == status
        assert str(status) in str(caught.value)
        assert "key-1" not in str(caught.value)
    with pytest.raises(kind):
        backend.report_external_task()
    assert len(platform.requests) == 3, "nothing is followed or repeated"


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_kept_as_it_came(backend: Backend, platform: Platform, status: int) -> None:
    for value in ("120", "Wed, 21 Oct 2026 07:28:00 GMT", "garbage"):
        platform.answers = [httpx.Response(status, headers={"Retry-After": value})]
        with pytest.raises((errors.RateLimitedError, errors.ServerError)) as caught:
            await backend.areport_external_task()
        assert caught.value.retry_after == value


@pytest.mark.parametrize("body", [b"", b"<html>signed out</html>", b"[]", b"null", b"{}", b'{"ok":true}', b"\xff"])
async def test_a_success_of_another_form_is_no_success(backend: Backend, platform: Platform, body: bytes) -> None:
    platform.answers = [httpx.Response(200, content=body)]
    for call in (backend.areport_external_task(), backend.asend_report(TaskReport(agent_id="a"))):
        with pytest.raises(errors.ProtocolError) as caught:
            await call
        assert caught.value.status_code == 200


@pytest.mark.parametrize(
    "raised",
    [
        httpx.ConnectError("refused"),
        httpx.ConnectTimeout("slow"),
        httpx.ReadTimeout("slow"),
        httpx.ReadError(""),
        httpx.RemoteProtocolError("gone"),
        httpx.ProxyError("no"),
        ConnectionResetError("reset"),
        TimeoutError(),
    ],
)
async def test_no_answer_is_a_network_error_with_its_cause(
    backend: Backend, platform: Platform, raised: Exception
) -> None:
    platform.answers = [raised]
    with pytest.raises(errors.NetworkError) as caught:
        await backend.areport_external_task()
    assert caught.value.__cause__ is raised
    assert caught.value.status_code is None
    with pytest.raises(errors.NetworkError) as caught:
        backend.report_external_task()
    assert caught.value.__cause__ is raised
    assert type(raised).__name__ in str(caught.value)


async def test_an_answer_that_is_no_task_says_which_field(backend: Backend, platform: Platform) -> None:
    platform.answers = [task(created_at="yesterday")]
    with pytest.raises(errors.ProtocolError, match="created_at") as caught:
        await backend.areport_external_task()
    assert caught.value.__cause__ is not None


async def test_a_task_is_loaded_by_its_id(backend: Backend, platform: Platform) -> None:
    assert (await backend.aload_task("job/1")).has_ended
    assert backend.load_task("job/1").id == "job-1"
    assert platform.paths == ["GET /agent-execution/job%2F1/status"] * 2
    assert platform.requests[0].content == b""
    with pytest.raises(errors.InvalidValueError, match="task_id"):
        await backend.aload_task("")


async def test_it_is_a_context_manager_of_both_kinds(backend: Backend) -> None:
    async with backend as opened:
        assert opened is backend
        await opened.areport_external_task()
    with backend as opened:
        opened.report_external_task()


def test_the_synchronous_call_works_inside_a_running_loop(backend: Backend) -> None:
    async def job() -> Any:
        return backend.report_external_task()

    assert asyncio.run(job()).id == "job-1"


def test_neither_printing_nor_an_error_shows_the_key(backend: Backend, platform: Platform) -> None:
    reported = backend.report_external_task()
    assert "key-1" not in repr(backend) + repr(reported) + str(reported) + str(reported.model_dump())
    assert "agent-1" in repr(backend)


@pytest.mark.parametrize("name", ["connect_timeout_s", "read_timeout_s", "total_timeout_s"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "5", None])
def test_a_timeout_that_is_none_is_refused_naming_it(name: str, value: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match=name):
        Backend(**{name: value})
