"""Everything that arrives, kept for tests to read, and the faults that tests order. Outermost: sees raw ASGI only.

Rules of `/_sandbox/faults` are tried in order; the first that fits and is not used up applies. A rule is an object:

    method, path, id    what it fits: exact method, shell pattern of the path, id of the reported job; absent fits any
    skip, count         let the first `skip` pass; apply `count` times (absent: always)
    delay_s             wait before anything else
    drop                "request": close the connection at once; "reply": serve it, then close without an answer;
                        "hang": never answer
    status, headers, body    answer this without serving the request (`body`: text, or any JSON value)
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_OWN_PATHS = ("/_sandbox/", "/tasks/", "/favicon")
_SECRET_HEADERS = {"x-api-key", "authorization"}
_DROPPED = "dropped"


class Fault(BaseModel):
    """One rule; see the module's docstring. `seen` and `applied` are counted by the sandbox."""

    model_config = ConfigDict(extra="forbid")

    method: str | None = None
    path: str | None = None
    id: str | None = None
    skip: int = Field(0, ge=0)
    count: int | None = Field(None, ge=0)
    delay_s: float = Field(0.0, ge=0)
    drop: Literal["request", "reply", "hang"] | None = None
    status: int | None = Field(None, ge=100, le=599)
    headers: dict[str, str] = {}
    body: Any = None
    seen: int = 0
    applied: int = 0

    def takes(self, arrival: Arrival) -> bool:
        """Whether this rule applies to `arrival`; counts it."""
        if self.method is not None and self.method != arrival.method:
            return False
        if self.path is not None and not fnmatchcase(arrival.path, self.path):
            return False
        if self.id is not None and self.id != arrival.reported_id:
            return False
        self.seen += 1
        if self.seen <= self.skip or (self.count is not None and self.applied >= self.count):
            return False
        self.applied += 1
        return True


@dataclass(slots=True)
class Arrival:
    """One request. `status` is the HTTP status of the answer, "dropped" if none was sent, None while it is open."""

    at: float
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: str
    reported_id: str | None
    status: int | str | None = None
    duration_s: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass
class Arrivals:
    """What arrived, newest last, at most `keep` requests; the counts go on."""

    keep: int
    requests: deque[Arrival] = field(init=False)
    posts_by_id: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    total: int = 0

    def __post_init__(self) -> None:
        self.requests = deque(maxlen=self.keep)

    def add(self, arrival: Arrival) -> None:
        self.requests.append(arrival)
        self.total += 1
        if arrival.reported_id is not None:
            self.posts_by_id[arrival.reported_id] += 1

    def clear(self) -> None:
        self.requests.clear()
        self.posts_by_id.clear()
        self.total = 0

    def fault_for(self, arrival: Arrival) -> Fault | None:
        return next((fault for fault in self.faults if fault.takes(arrival)), None)


class Recorder:
    """ASGI middleware: writes down each request but those of pages and tests, and applies the ordered faults."""

    def __init__(self, app: ASGIApp, arrivals: Arrivals) -> None:
        self._app = app
        self._arrivals = arrivals

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/" or scope["path"].startswith(_OWN_PATHS):
            await self._app(scope, receive, send)
            return
        body = await _body(receive)
        arrival = _arrival(scope, body)
        self._arrivals.add(arrival)
        started = time.perf_counter()

        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                arrival.status = message["status"]
            await send(message)

        try:
            fault = self._arrivals.fault_for(arrival)
            if fault is None:
                await self._app(scope, _replay(body, receive), observed_send)
            else:
                await self._apply(fault, arrival, scope, body, receive, observed_send)
                if fault.drop is not None:
                    await _close_connection(send, receive)
        finally:
            arrival.duration_s = time.perf_counter() - started

    async def _apply(
        self, fault: Fault, arrival: Arrival, scope: Scope, body: bytes, receive: Receive, send: Send
    ) -> None:
        """Do what `fault` says; a dropped request is left without an answer, for the caller to close."""
        await asyncio.sleep(fault.delay_s)
        if fault.drop is not None:
            if fault.drop == "reply":
                await self._app(scope, _replay(body, receive), _swallow)
            elif fault.drop == "hang":
                await _disconnected(receive)
            arrival.status = _DROPPED
        elif fault.status is not None:
            await _answer(fault, send)
        else:
            await self._app(scope, _replay(body, receive), send)


def _arrival(scope: Scope, body: bytes) -> Arrival:
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    path: str = scope["path"]
    return Arrival(
        at=time.time(),
        method=scope["method"],
        path=path,
        query=scope["query_string"].decode("latin-1"),
        headers={name: value for name, value in headers.items() if name not in _SECRET_HEADERS},
        body=body.decode("utf-8", "replace"),
        reported_id=_reported_id(body) if path.endswith("/report_task") else None,
    )


def _reported_id(body: bytes) -> str | None:
    try:
        reported = json.loads(body)["id"]
    except (ValueError, KeyError, TypeError):
        return None
    return reported if isinstance(reported, str) else None


async def _body(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(chunks)
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was already read, then whatever comes."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _swallow(message: Message) -> None:
    """A `send` that sends nothing."""


async def _answer(fault: Fault, send: Send) -> None:
    body = fault.body if isinstance(fault.body, str) else json.dumps(fault.body or {"detail": "a fault was ordered"})
    headers = {"content-type": "application/json", "content-length": str(len(body.encode())), **fault.headers}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": fault.status, "headers": raw})
    await send({"type": "http.response.body", "body": body.encode()})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _close_connection(send: Send, receive: Receive) -> None:
    """Close without an answer. ASGI has no word for that: this reaches for uvicorn's transport.

    uvicorn 0.30 to 0.54, protocols/http/*_impl.py: `send` is a method of RequestResponseCycle, which has `transport`.
    """
    transport: asyncio.Transport = send.__self__.transport  # type: ignore[attr-defined]
    transport.close()
    await _disconnected(receive)
