"""The platform's HTTP routes over a `Store`: reports in; tasks, history and agents out. Knows no page and no model."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from xpander_celery.sandbox.contract import BodyError, InvocationBody, ReportBody, UpdateBody, read_body
from xpander_celery.sandbox.store import Filter, Record, Store

DEFAULT_ORGANIZATION = "sandbox"
_HISTORY_LIMIT = 100
_HISTORY_LIMIT_MOST = 1_000_000
Endpoint = Callable[[Request], Awaitable[Response]]


class JsonText(JSONResponse):
    """JSON as text that needs no escapes beyond JSON's own; keys keep their order."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def platform_routes(store: Store, api_keys: frozenset[str]) -> list[BaseRoute]:
    """The routes, also below `/agent-controller/{organization_id}`, as on the platform's controller hosts.

    An empty `api_keys` lets any key in, but not none.
    """
    platform = _Platform(store)

    def route(path: str, endpoint: Endpoint, method: str) -> Route:
        return Route(path, _guarded(endpoint, api_keys), methods=[method])

    routes = [
        route("/agent-execution/executions/history/user/{user_id:path}", platform.user_history, "GET"),
        route("/agent-execution/executions/history/{agent_id:path}", platform.agent_history, "GET"),
        route("/agent-execution/{agent_id:path}/report_task", platform.report, "POST"),
        route("/agent-execution/{task_id:path}/status", platform.task, "GET"),
        route("/agent-execution/{task_id:path}/update", platform.update, "PATCH"),
        route("/agent-execution/{task_id:path}/events/push", platform.accept, "POST"),
        route("/agent-execution/{task_id:path}", platform.stop, "DELETE"),
        route("/agent-execution/{agent_id:path}", platform.invoke, "POST"),
        route("/activity/{agent_id}/{task_id:path}", platform.activity, "GET"),
        route("/agents-metrics/{agent_id:path}/execution", platform.accept, "POST"),
        route("/agents/{agent_id}/db", platform.database, "GET"),
        route("/agents/{agent_id:path}", platform.agent, "GET"),
        route("/metadata/default_llm_extra_headers", platform.no_headers, "GET"),
        route("/tools/{agent_id:path}/channel-presence", platform.accept, "POST"),
    ]
    return [*routes, Mount("/agent-controller/{organization_id}", routes=list(routes))]


def _guarded(endpoint: Endpoint, api_keys: frozenset[str]) -> Endpoint:
    """`endpoint` behind the key check; a body that is not the contract's is answered with 422."""

    @wraps(endpoint)
    async def guarded(request: Request) -> Response:
        key = request.headers.get("x-api-key", "")
        if not key or (api_keys and key not in api_keys):
            return _refusal(403, "Invalid API key")
        try:
            return await endpoint(request)
        except BodyError as error:
            return _refusal(422, error.detail)

    return guarded


class _Platform:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def report(self, request: Request) -> Response:
        body = read_body(ReportBody, await request.body())
        return _task(self._store.report(request.path_params["agent_id"], _organization(request), body))

    async def invoke(self, request: Request) -> Response:
        body = read_body(InvocationBody, await request.body())
        return _task(self._store.invoke(request.path_params["agent_id"], _organization(request), body))

    async def task(self, request: Request) -> Response:
        return _task(self._store.get(request.path_params["task_id"]))

    async def update(self, request: Request) -> Response:
        body = read_body(UpdateBody, await request.body())
        return _task(self._store.update(request.path_params["task_id"], body))

    async def stop(self, request: Request) -> Response:
        return _task(self._store.stop(request.path_params["task_id"]))

    async def agent_history(self, request: Request) -> Response:
        return self._history(request, agent_id=request.path_params["agent_id"])

    async def user_history(self, request: Request) -> Response:
        return self._history(request, user_id=request.path_params["user_id"])

    def _history(self, request: Request, *, agent_id: str | None = None, user_id: str | None = None) -> Response:
        query = request.query_params
        statuses = tuple(status for status in query.getlist("status") if status)
        wanted = Filter(agent_id=agent_id or query.get("agent_id"), user_id=user_id, statuses=statuses)
        limit = _whole_number(query.get("limit") or query.get("per_page"), _HISTORY_LIMIT, most=_HISTORY_LIMIT_MOST)
        before = _whole_number(query.get("before"), 0, most=2**62)
        return JsonText([record.as_task() for record in self._store.newest(wanted, limit=limit, before=before or None)])

    async def activity(self, request: Request) -> Response:
        record = self._store.get(request.path_params["task_id"])
        if record is None:
            return _refusal(404, "Task not found")
        return JsonText({"id": record.id, "created_at": record.as_task()["created_at"], "messages": []})

    async def agent(self, request: Request) -> Response:
        agent_id = request.path_params["agent_id"]
        return JsonText(
            {
                "id": agent_id,
                "organization_id": _organization(request),
                "name": agent_id,
                "unique_name": agent_id,
                "framework": "agno",
                "model_provider": "openai",
                "model_name": "gpt-4.1",
                "agno_settings": {"session_storage": False},
            }
        )

    async def database(self, request: Request) -> Response:
        return _refusal(404, "The sandbox keeps no sessions")

    async def no_headers(self, request: Request) -> Response:
        return JsonText({})

    async def accept(self, request: Request) -> Response:
        return JsonText({})


def _task(record: Record | None) -> Response:
    return _refusal(404, "Task not found") if record is None else JsonText(record.as_task())


def _refusal(status: int, detail: Any) -> Response:
    return JsonText({"detail": detail}, status_code=status)


def _organization(request: Request) -> str:
    return str(request.path_params.get("organization_id") or DEFAULT_ORGANIZATION)


def _whole_number(text: str | None, default: int, *, most: int) -> int:
    return min(int(text), most) if text and text.isascii() and text.isdigit() else default
