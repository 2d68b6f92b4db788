"""Arguments of a stored agent, by way of an SDK that the test plays."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from agno.agent import Agent

from xpander_celery import errors
from xpander_celery.backend import Backend, Configuration, Task

RESOLVED = {"id": "agent-1", "name": "Stored", "markdown": True, "_xpander_hidden_mcp_toolkits": []}
caller = contextvars.ContextVar("caller", default="nobody")


class SdkError(Exception):
    """As the SDK raises it: the HTTP error is only in its context."""


class Sdk(ModuleType):
    """As much of the official SDK as is used, with or without its defects."""

    def __init__(self) -> None:
        super().__init__("xpander_sdk")
        self.asked: list[dict[str, Any]] = []
        self.configurations: list[dict[str, Any]] = []
        self.loaded: list[str] = []
        self.needs_a_task = True
        self.raises: Callable[[], Exception] | None = None
        self.answer = dict(RESOLVED)
        self.where: tuple[str, str] = ("", "")

    def Configuration(self, **fields: Any) -> SimpleNamespace:  # noqa: N802 - the SDK's name
        self.configurations.append(fields)
        return SimpleNamespace(**fields)

    def Backend(self, configuration: Any) -> SimpleNamespace:  # noqa: N802 - the SDK's name
        async def aget_args(**arguments: Any) -> dict[str, Any]:
            await asyncio.sleep(0)
            self.asked.append(arguments)
            self.where = (threading.current_thread().name, caller.get())
            if self.raises is not None:
                raise SdkError("[500] hidden") from self.raises()
            task = arguments["task"]
            instructions = task.instructions_override if self.needs_a_task or task is not None else None
            return {**self.answer, **({"instructions": instructions} if instructions else {})}

        return SimpleNamespace(aget_args=aget_args)

    def Tasks(self, configuration: Any) -> SimpleNamespace:  # noqa: N802 - the SDK's name
        async def aget(task_id: str) -> SimpleNamespace:
            self.loaded.append(task_id)
            return SimpleNamespace(id=task_id, instructions_override="its own")

        return SimpleNamespace(aget=aget)


@pytest.fixture
def sdk(monkeypatch: pytest.MonkeyPatch) -> Sdk:
    played = Sdk()
    monkeypatch.setitem(sys.modules, "xpander_sdk", played)
    return played


@pytest.fixture
def stored(sdk: Sdk) -> Backend:
    return Backend(Configuration("key-1", "org-1", "https://platform.example/", "agent-1"))


async def test_the_result_fits_agnos_constructor(stored: Backend) -> None:
    assert Agent(**await stored.aget_args()).name == "Stored"


async def test_without_a_task_one_that_is_false_stands_in(stored: Backend, sdk: Sdk) -> None:
    keywords = await stored.aget_args()
    assert keywords == {"id": "agent-1", "name": "Stored", "markdown": True}
    first, second = sdk.asked
    assert first["task"] is None
    assert not second["task"]
    assert second["task"] is not None


async def test_a_mended_sdk_is_asked_once_and_without_a_task(stored: Backend, sdk: Sdk) -> None:
    sdk.needs_a_task = False
    await stored.aget_args()
    assert [arguments["task"] for arguments in sdk.asked] == [None]


async def test_a_key_that_the_constructor_knows_is_kept(stored: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mended:
        def __init__(self, id: str, name: str, markdown: bool, _xpander_hidden_mcp_toolkits: list[Any]) -> None: ...  # noqa: A002

    monkeypatch.setattr("agno.agent.Agent", Mended)
    assert "_xpander_hidden_mcp_toolkits" in await stored.aget_args()


async def test_a_team_is_judged_by_its_own_constructor(stored: Backend, sdk: Sdk) -> None:
    sdk.answer["members"] = []
    assert set(await stored.aget_args()) == {"id", "name", "markdown", "members"}


async def test_everything_passes_through(stored: Backend, sdk: Sdk) -> None:
    task = SimpleNamespace(instructions_override=None)
    override, tools, callback = {"name": "x"}, [print], print
    await stored.aget_args("agent-2", None, 3, task, override, tools, auth_events_callback=callback)
    [asked] = sdk.asked
    assert asked == {
        "agent_id": "agent-2",
        "agent_version": 3,
        "task": task,
        "override": override,
        "tools": tools,
        "is_async": True,
        "auth_events_callback": callback,
    }
    assert sdk.configurations == [
        {"api_key": "key-1", "organization_id": "org-1", "base_url": "https://platform.example", "agent_id": "agent-1"}
    ]


async def test_an_agent_object_needs_no_id(sdk: Sdk) -> None:
    agent = SimpleNamespace(id="agent-9")
    await Backend(Configuration("k")).aget_args(agent=agent)
    assert sdk.asked[-1]["agent"] is agent
    assert "agent_id" not in sdk.asked[-1]


async def test_our_own_task_is_loaded_as_the_sdks(stored: Backend, sdk: Sdk) -> None:
    keywords = await stored.aget_args(task=Task(id="job-1"))
    assert sdk.loaded == ["job-1"]
    assert keywords["instructions"] == "its own"


async def test_what_a_given_task_breaks_is_not_tried_again(stored: Backend, sdk: Sdk) -> None:
    with pytest.raises(errors.BackendError, match="AttributeError") as caught:
        await stored.aget_args(task=SimpleNamespace())
    assert isinstance(caught.value.__cause__, AttributeError)
    assert len(sdk.asked) == 1


def test_the_synchronous_twin_needs_no_loop_and_says_so(stored: Backend, sdk: Sdk) -> None:
    assert stored.get_args()["name"] == "Stored"
    assert sdk.asked[-1]["is_async"] is False
    assert sdk.where[0] == threading.current_thread().name


async def test_the_synchronous_twin_runs_beside_a_running_loop(stored: Backend, sdk: Sdk) -> None:
    caller.set("this test")
    assert stored.get_args()["name"] == "Stored"
    thread, seen = sdk.where
    assert thread != threading.current_thread().name
    assert seen == "this test"


async def test_failures_cross_the_thread(stored: Backend, sdk: Sdk) -> None:
    sdk.raises = lambda: httpx.ConnectError("refused")
    with pytest.raises(errors.NetworkError, match="ConnectError"):
        stored.get_args()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (403, errors.AuthenticationError),
        (404, errors.NotFoundError),
        (429, errors.RateLimitedError),
        (500, errors.ServerError),
    ],
)
async def test_the_status_that_the_sdk_hides_is_found(
    stored: Backend, sdk: Sdk, status: int, kind: type[errors.BackendError]
) -> None:
    request = httpx.Request("GET", "https://platform.example/agents/agent-1")
    answer = httpx.Response(status, headers={"retry-after": "9"}, text="why", request=request)
    sdk.raises = lambda: httpx.HTTPStatusError("bad", request=request, response=answer)
    with pytest.raises(kind, match=r"/agents/agent-1.*why") as caught:
        await stored.aget_args()
    assert caught.value.status_code == status
    assert isinstance(caught.value.__cause__, SdkError)


async def test_any_other_failure_of_the_sdk_is_ours_with_its_cause(stored: Backend, sdk: Sdk) -> None:
    sdk.raises = lambda: ValueError("no model")
    with pytest.raises(errors.BackendError, match="SdkError") as caught:
        await stored.aget_args()
    assert isinstance(caught.value.__cause__, SdkError)


async def test_without_the_sdk_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xpander_sdk", None)
    backend = Backend(Configuration("k", agent_id="agent-1"))
    for call in (backend.get_args, lambda: asyncio.run(backend.aget_args())):
        with pytest.raises(errors.ConfigurationError, match=r"pip install 'xpander-celery\[sdk\]'"):
            await asyncio.to_thread(call)


async def test_nothing_is_asked_without_agent_key_or_organization(sdk: Sdk) -> None:
    with pytest.raises(errors.InvalidValueError, match="XPANDER_AGENT_ID"):
        await Backend(Configuration("k")).aget_args()
    with pytest.raises(errors.ConfigurationError, match="XPANDER_API_KEY"):
        await Backend(Configuration(agent_id="a")).aget_args()
    with pytest.raises(errors.ConfigurationError, match="XPANDER_ORGANIZATION_ID"):
        await Backend(Configuration("k", base_url="http://h:9016", agent_id="a")).aget_args()
    assert sdk.asked == []


async def test_an_agents_id_is_escaped_since_the_sdk_does_not(stored: Backend, sdk: Sdk) -> None:
    await stored.aget_args("a/b")
    assert sdk.asked[-1]["agent_id"] == "a%2Fb"
