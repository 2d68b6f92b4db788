# ruff: noqa: A002 - the keywords are the official ones
"""`Backend`: the platform's calls with the official names and keywords, each asynchronous and truly synchronous.

It drives the `Steps` of `operations` over a `Transport`, and knows neither their order nor their meaning.
"""

from __future__ import annotations

import asyncio
import copy
import ssl
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Self, TypeVar

from xpander_celery.backend import operations
from xpander_celery.backend.arguments import agent_of, report_of
from xpander_celery.backend.calls import Pause, Steps, accepted
from xpander_celery.backend.configuration import Configuration
from xpander_celery.backend.task import Task
from xpander_celery.backend.timeouts import Timeouts
from xpander_celery.errors import BackendError
from xpander_celery.report import TaskReport

if TYPE_CHECKING:
    import httpx

    from xpander_celery.backend.transport import Transport

_T = TypeVar("_T")


class Backend:
    """The platform, for the caller that `configuration` names (ours or the official client's; None: the environment).

    Cheap to construct: httpx is loaded, and a connection opened, by the first call. One object may be shared between
    threads, greenlets and event loops, and survives a fork. A synchronous call uses no event loop, and works inside a
    running one.

    Every call raises from one tree (`xpander_celery.errors`): `ConfigurationError` and `InvalidValueError` before
    anything is sent, the other kinds of `BackendError` after.
    """

    def __init__(
        self,
        configuration: Any = None,
        *,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 15.0,
        total_timeout_s: float = 30.0,
        max_connections: int = 10,
        ssl_context: ssl.SSLContext | None = None,
        transport: httpx.BaseTransport | None = None,
        async_transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.configuration = Configuration.of(configuration)
        self._timeouts = Timeouts(connect_timeout_s, read_timeout_s, total_timeout_s)
        self._max_connections = max_connections
        self._ssl_context = ssl_context
        self._given_transports = (transport, async_transport)
        self._transport: Transport | None = None

    def __deepcopy__(self, memo: object) -> Self:
        """Itself: a copy of a task shares its connections, as other tasks do."""
        return self

    async def areport_external_task(
        self,
        agent_id: str | None = None,
        agent: Any = None,
        id: str | None = None,
        input: Any = None,
        llm_response: Any = None,
        tokens: Any = None,
        is_success: bool = True,
        result: Any = None,
        duration: float = 0,
        used_tools: Any = None,
        configuration: Any = None,
    ) -> Task:
        """Report a run that happened elsewhere; returns the task as the platform recorded it.

        Reporting the same `id` again updates the same record. `duration` is in seconds. `agent` is any object with an
        `id` and wins over `agent_id`; without either it is the configuration's. An `input` or `result` that is no text
        is sent as JSON text, `llm_response` as JSON; what JSON cannot hold is rendered.
        """
        backend, steps = self._reporting(**_arguments(locals()))
        return await backend._adrive(steps)

    def report_external_task(
        self,
        agent_id: str | None = None,
        agent: Any = None,
        id: str | None = None,
        input: Any = None,
        llm_response: Any = None,
        tokens: Any = None,
        is_success: bool = True,
        result: Any = None,
        duration: float = 0,
        used_tools: Any = None,
        configuration: Any = None,
    ) -> Task:
        """As `areport_external_task`, synchronously."""
        backend, steps = self._reporting(**_arguments(locals()))
        return backend._drive(steps)

    async def asend_report(self, report: TaskReport) -> None:
        """Deliver a report as it is, without reading the task that answers it: the relay's way."""
        call = operations.report_call(report)
        accepted(call, await self._sender().asend(self.configuration, call))

    async def aload_task(self, task_id: str) -> Task:
        """The task as the platform has it now; raises `NotFoundError` where it has none of that id."""
        return await self._adrive(operations.load_task(task_id, self))

    def load_task(self, task_id: str) -> Task:
        """As `aload_task`, synchronously."""
        return self._drive(operations.load_task(task_id, self))

    async def await_task(self, task_id: str, timeout_s: float = 300.0) -> Task:
        """The task once it has ended, polled until then; raises `TaskNotEndedError` at the deadline."""
        return await self._adrive(operations.wait_for_task(task_id, timeout_s, self))

    def wait_for_task(self, task_id: str, timeout_s: float = 300.0) -> Task:
        """As `await_task`, synchronously."""
        return self._drive(operations.wait_for_task(task_id, timeout_s, self))

    async def ainvoke_agent(
        self,
        agent_id: str | None = None,
        prompt: str | None = "",
        existing_task_id: str | None = None,
        file_urls: list[str] | None = None,
        user_details: Any = None,
        agent_version: str | None = None,
        tool_call_payload_extension: dict[str, Any] | None = None,
        source: str | None = "sdk",
        worker_id: str | None = None,
        run_locally: bool | None = False,
        output_format: Any = None,
        output_schema: dict[str, Any] | None = None,
        events_streaming: bool | None = False,
        additional_context: str | None = None,
        expected_output: str | None = None,
        attachments: Any = None,
    ) -> Task:
        """Start a task of a platform agent; `await task.await_result()` waits for its end.

        A prompt that is a JSON object with `xpander_task_id` loads that task instead. `user_details`, `attachments` and
        `output_format` may be mappings and names, or the official client's objects.
        """
        return await self._adrive(self._invocation(**_arguments(locals())))

    def invoke_agent(
        self,
        agent_id: str | None = None,
        prompt: str | None = "",
        existing_task_id: str | None = None,
        file_urls: list[str] | None = None,
        user_details: Any = None,
        agent_version: str | None = None,
        tool_call_payload_extension: dict[str, Any] | None = None,
        source: str | None = "sdk",
        worker_id: str | None = None,
        run_locally: bool | None = False,
        output_format: Any = None,
        output_schema: dict[str, Any] | None = None,
        events_streaming: bool | None = False,
        additional_context: str | None = None,
        expected_output: str | None = None,
        attachments: Any = None,
    ) -> Task:
        """As `ainvoke_agent`, synchronously; `task.wait()` waits for its end."""
        return self._drive(self._invocation(**_arguments(locals())))

    async def aget_args(
        self,
        agent_id: str | None = None,
        agent: Any = None,
        agent_version: int | None = None,
        task: Any = None,
        override: dict[str, Any] | None = None,
        tools: list[Callable[..., Any]] | None = None,
        is_async: bool = True,
        auth_events_callback: Callable[..., Any] | None = None,
    ) -> dict[str, Any]:
        """The keywords of Agno's `Agent` (or `Team`) for a stored agent: `Agent(**await backend.aget_args())`.

        Resolved by the official SDK: `pip install 'xpander-celery[sdk]'`. `agent` and `task` are its objects (`task`
        may be ours); `override` replaces keywords, `tools` are added to the agent's own.
        """
        return await _agno().resolve(self.configuration, **_arguments(locals()))  # type: ignore[no-any-return]

    def get_args(
        self,
        agent_id: str | None = None,
        agent: Any = None,
        agent_version: int | None = None,
        task: Any = None,
        override: dict[str, Any] | None = None,
        tools: list[Callable[..., Any]] | None = None,
        auth_events_callback: Callable[..., Any] | None = None,
    ) -> dict[str, Any]:
        """As `aget_args`, synchronously. The SDK runs on a loop of its own, in another thread where one is running."""
        return _agno().resolve_blocking(self.configuration, **_arguments(locals()))  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        """Close the connections of the running loop, and the synchronous ones. The object can still be used."""
        if self._transport is not None:
            await self._transport.aclose()

    def close(self) -> None:
        """Close the synchronous connections. The object can still be used."""
        if self._transport is not None:
            self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Backend({self.configuration!r})"

    def _acting_for(self, configuration: Any) -> Backend:
        """This backend, or one that shares its connections but acts for another configuration."""
        if configuration is None:
            return self
        self._sender()
        other = copy.copy(self)
        other.configuration = Configuration.of(configuration)
        return other

    def _reporting(
        self, configuration: Any, agent_id: Any, agent: Any, **arguments: Any
    ) -> tuple[Backend, Steps[Task]]:
        backend = self._acting_for(configuration)
        chosen = agent_of(agent_id, agent, backend.configuration.agent_id)
        return backend, operations.report_task(report_of(agent_id=chosen, **arguments), backend)

    def _invocation(self, agent_id: Any, prompt: Any, agent_version: Any, **arguments: Any) -> Steps[Task]:
        default = self.configuration.agent_id
        return operations.invoke_agent(agent_id, default, prompt, agent_version, self, **arguments)

    def _sender(self) -> Transport:
        if self._transport is None:
            from xpander_celery.backend.transport import Transport

            given, given_async = self._given_transports
            self._transport = Transport(
                self._timeouts,
                ssl_context=self._ssl_context,
                max_connections=self._max_connections,
                given=given,
                given_async=given_async,
            )
        return self._transport

    def _drive(self, steps: Steps[_T]) -> _T:
        sender = self._sender()
        advance: Any = partial(next, steps)
        while True:
            try:
                step = advance()
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                advance = partial(next, steps)
                continue
            try:
                advance = partial(steps.send, sender.send(self.configuration, step))
            except BackendError as error:
                advance = partial(steps.throw, error)

    async def _adrive(self, steps: Steps[_T]) -> _T:
        sender = self._sender()
        advance: Any = partial(next, steps)
        while True:
            try:
                step = advance()
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                advance = partial(next, steps)
                continue
            try:
                advance = partial(steps.send, await sender.asend(self.configuration, step))
            except BackendError as error:
                advance = partial(steps.throw, error)


def _arguments(names: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a method, from its `locals()` at its beginning."""
    return {name: value for name, value in names.items() if name != "self"}


def _agno() -> Any:
    """The module that needs the official SDK, on first use."""
    return import_module("xpander_celery.backend.agno")
