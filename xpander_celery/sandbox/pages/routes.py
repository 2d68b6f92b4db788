"""The routes of the pages over a `Store`. They need no key: the sandbox listens on this machine."""

from __future__ import annotations

import base64
import hashlib

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from xpander_celery.sandbox.pages import history
from xpander_celery.sandbox.store import Filter, Store

_PAGE_SIZE = 50


def page_routes(store: Store) -> list[BaseRoute]:
    """The list at `/`, one record at `/tasks/{id}`."""

    async def show_list(request: Request) -> Response:
        if _is_known(request, store):
            return Response(status_code=304)
        return _page(history.list_page(_listing(request, store)), store)

    async def show_task(request: Request) -> Response:
        record = store.get(request.path_params["task_id"])
        if record is None:
            return _page(history.missing_page(request.path_params["task_id"]), store, status=404)
        if _is_known(request, store):
            return Response(status_code=304)
        return _page(history.task_page(record), store)

    return [
        Route("/", show_list, methods=["GET"]),
        Route("/tasks/{task_id:path}", show_task, methods=["GET"]),
    ]


def _listing(request: Request, store: Store) -> history.Listing:
    """What the query asks for: `before` and `after` are sequence numbers, so new records do not shift a page."""
    query = request.query_params
    status = query.get("status")
    wanted = Filter(
        agent_id=query.get("agent") or None, statuses=(status,) if status else (), text=query.get("q") or None
    )
    before, after = _sequence_number(query.get("before")), _sequence_number(query.get("after"))
    if after is not None:
        records = store.just_newer(wanted, limit=_PAGE_SIZE, after=after)
    else:
        records = store.newest(wanted, limit=_PAGE_SIZE, before=before)
    newer = older = None
    if records and store.just_newer(wanted, limit=1, after=records[0].seq):
        newer = history.query_of(wanted, after=records[0].seq)
    if records and store.newest(wanted, limit=1, before=records[-1].seq):
        older = history.query_of(wanted, before=records[-1].seq)
    return history.Listing(records, store.summary(wanted), wanted, store.agents(), newer, older)


def _sequence_number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 18 else None


def _tag(store: Store) -> str:
    return f'"{store.version:x}"'


def _is_known(request: Request, store: Store) -> bool:
    """Whether the reader has what there is; asked every other second by every open page."""
    return request.headers.get("if-none-match") == _tag(store)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_POLICY = (
    f"default-src 'none'; style-src {_hash(history.STYLE)}; script-src {_hash(history.SCRIPT)}; connect-src 'self';"
    " img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def _page(text: str, store: Store, *, status: int = 200) -> Response:
    headers = {
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
        "etag": _tag(store),
    }
    return HTMLResponse(text, status, headers)
