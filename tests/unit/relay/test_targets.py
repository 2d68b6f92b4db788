from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from xpander_celery.backend import Backend, Configuration
from xpander_celery.errors import ConfigurationError, ServerError
from xpander_celery.relay import targets
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.targets import OwnBackend, Platform, make_hook, make_targets
from xpander_celery.report import TaskReport, Tokens

REPORT = TaskReport(agent_id="agent", id="a", result="done", tokens=Tokens(prompt_tokens=3), used_tools=("search",))


class StrangeError(Exception):
    def __init__(self, status_code: int) -> None:
        super().__init__("strange")
        self.status_code = status_code


class Official:
    """An object of the shape of the official client."""

    def __init__(self, status: str | int = "pending") -> None:
        self.status = status
        self.reports: list[dict[str, Any]] = []
        self.is_closed = False

    async def areport_external_task(self, **values: Any) -> None:
        self.reports.append(values)

    async def aload_task(self, task_id: str) -> SimpleNamespace:
        if isinstance(self.status, int):
            raise StrangeError(self.status)
        return SimpleNamespace(status=self.status)

    async def aclose(self) -> None:
        self.is_closed = True


class Least:
    def __init__(self) -> None:
        self.ids: list[str] = []

    def areport_external_task(self, **values: Any) -> None:
        self.ids.append(values["id"])


@pytest.fixture
def user_module(tmp_path: Path) -> Path:
    """A module of the user's, beside the worker and not beside the relay."""
    (tmp_path / "shop_hooks.py").write_text(
        "import time\n"
        "from types import SimpleNamespace\n"
        "async def report(**values): pass\n"
        "backend = SimpleNamespace(areport_external_task=report)\n"
        "def factory(): return SimpleNamespace(areport_external_task=report, made=True)\n"
        "def nothing(): return 1\n"
        "def rename(report): return report.model_copy(update={'result': 'renamed'})\n"
        "def other_id(report): return report.model_copy(update={'id': 'other'})\n"
        "def text(report): return 'text'\n"
        "def drop(report): return None\n"
        "def broken(report): raise KeyError('x')\n"
        "def hang(report):\n"
        "    while True: time.sleep(0.01)\n"
    )
    return tmp_path


def config(user_module: Path, **settings: Any) -> RelayConfig:
    return RelayConfig(user_module, search_path=(str(user_module),), **settings)


async def test_an_own_backend_gets_the_official_keywords() -> None:
    official = Official()
    await OwnBackend(official, 5).send(REPORT)
    (values,) = official.reports
    assert values["agent_id"] == "agent"
    assert values["id"] == "a"
    assert values["tokens"]["prompt_tokens"] == 3
    assert values["used_tools"] == ["search"]
    assert set(values) == set(TaskReport.model_fields)


async def test_an_own_backend_may_be_as_small_as_one_method() -> None:
    least = Least()
    target = OwnBackend(least, 5)
    await target.send(REPORT)
    assert not await target.has_ended(REPORT)
    await target.aclose()
    assert least.ids == ["a"]


async def test_an_own_backend_that_never_answers_times_out() -> None:
    async def forever(**values: Any) -> None:
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await OwnBackend(SimpleNamespace(areport_external_task=forever), 0.01).send(REPORT)


@pytest.mark.parametrize(
    ("status", "ended"),
    [("completed", True), ("failed", True), ("error", True), ("stopped", True), ("executing", False), (404, False)],
)
async def test_a_record_that_ended_is_told_from_one_that_did_not(status: str | int, ended: bool) -> None:
    assert await OwnBackend(Official(status), 5).has_ended(REPORT) is ended


async def test_a_platform_that_cannot_be_asked_raises() -> None:
    with pytest.raises(StrangeError):
        await OwnBackend(Official(503), 5).has_ended(REPORT)


async def test_our_own_client_sends_reads_and_closes() -> None:
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        if request.method == "GET":
            if len(requests) == 2:
                return httpx.Response(404)
            return httpx.Response(200, json={"id": "a", "status": "failed"})
        return httpx.Response(200, json={"id": "a"})

    configuration = Configuration(api_key="key", base_url="http://platform")
    platform = Platform(Backend(configuration, async_transport=httpx.MockTransport(answer)))
    await platform.send(REPORT)
    assert requests[0].url.path == "/agent-execution/agent/report_task"
    assert not await platform.has_ended(REPORT)
    assert await platform.has_ended(REPORT)
    await platform.aclose()


async def test_a_failing_client_raises_ours() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(503))
    platform = Platform(Backend(Configuration(api_key="key", base_url="http://platform"), async_transport=transport))
    with pytest.raises(ServerError):
        await platform.send(REPORT)


@pytest.mark.parametrize("name", ["backend", "factory"])
async def test_a_backend_is_found_where_the_worker_would_find_it(user_module: Path, name: str) -> None:
    target = make_targets(config(user_module, backend=f"shop_hooks:{name}"))()
    await target.send(REPORT)


@pytest.mark.parametrize("path", ["shop_hooks:nothing", "shop_hooks:missing", "no_such_module:backend"])
def test_a_backend_that_is_none_is_refused_by_name(user_module: Path, path: str) -> None:
    with pytest.raises(ConfigurationError, match="backend"):
        make_targets(config(user_module, backend=path))


def test_each_sending_worker_has_a_connection_of_its_own(user_module: Path) -> None:
    make = make_targets(config(user_module, api_key="key", base_url="https://platform"))
    first, second = make(), make()
    assert isinstance(first, Platform)
    assert isinstance(second, Platform)
    assert first._backend is not second._backend
    assert first._backend._ssl_context is second._backend._ssl_context is not None


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
async def test_a_proxy_of_the_environment_is_left_to_httpx(
    user_module: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n"))
        writer.write(b'HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 10\r\n\r\n{"id":"a"}')
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.sockets[0].getsockname()[1]}")
        target = make_targets(config(user_module, api_key="key", base_url="http://platform.invalid"))()
        await target.send(REPORT)
        await target.aclose()
    assert seen == [b"POST http://platform.invalid/agent-execution/agent/report_task HTTP/1.1\r\n"]


async def test_a_proxy_that_cannot_be_used_is_told_by_the_first_request(
    user_module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "ftp://proxy")
    target = make_targets(config(user_module, api_key="key", base_url="http://platform.invalid"))()
    with pytest.raises(ConfigurationError, match="HTTP_PROXY"):
        await target.send(REPORT)


def test_without_a_hook_there_is_none(user_module: Path) -> None:
    assert make_hook(config(user_module)) is None


def test_the_hook_has_its_say(user_module: Path) -> None:
    rename = make_hook(config(user_module, before_send="shop_hooks.rename"))
    drop = make_hook(config(user_module, before_send="shop_hooks:drop"))
    assert rename is not None
    assert drop is not None
    assert getattr(rename(REPORT), "result", None) == "renamed"
    assert drop(REPORT) is None


@pytest.mark.parametrize(
    ("name", "error"), [("text", TypeError), ("other_id", ValueError), ("broken", KeyError), ("hang", TimeoutError)]
)
def test_a_hook_that_misbehaves_fails(
    user_module: Path, name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "_HOOK_MAY_TAKE_S", 0.2)
    hook = make_hook(config(user_module, before_send=f"shop_hooks:{name}"))
    assert hook is not None
    began = time.monotonic()
    with pytest.raises(error):
        hook(REPORT)
    assert time.monotonic() - began < 5


def test_a_hook_that_cannot_be_imported_is_refused_by_name(user_module: Path) -> None:
    with pytest.raises(ConfigurationError, match="before_send"):
        make_hook(config(user_module, before_send="shop_hooks:missing"))


def test_the_http_client_comes_without_its_passengers_and_bars_nobody_else_from_loading_them() -> None:
    program = """
import asyncio, pathlib, sys
from xpander_celery.errors import NetworkError
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.targets import make_targets
from xpander_celery.report import TaskReport

async def send():
    target = make_targets(RelayConfig(pathlib.Path("/"), api_key="k", base_url="http://127.0.0.1:9"))()
    try:
        await target.send(TaskReport(agent_id="a"))
    except NetworkError:
        await target.aclose()

asyncio.run(send())
passengers = ["rich", "pygments", "click", "h2", "hpack"]
if not sys.modules["httpx"].__version__.startswith("0.27"):  # which loads them with itself
    passengers += ["httpcore", "anyio"]
print([name for name in passengers if name in sys.modules])
import rich
print(rich.__name__, "httpx._main" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["[]", "rich False"]
