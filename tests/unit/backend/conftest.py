"""A platform inside the test: it answers what the test says and keeps what it was asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from xpander_celery.backend import Backend, Configuration

TASK = {
    "id": "job-1",
    "agent_id": "agent-1",
    "organization_id": "org-1",
    "input": {"text": "hello"},
    "created_at": "2026-01-02T03:04:05Z",
    "status": "completed",
}


class Platform:
    """Answers in the order given, the last answer for ever; without any, a task."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answers: list[httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]) if self.answers else task()
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)
        return answer(request)

    @property
    def paths(self) -> list[str]:
        return [f"{request.method} {request.url.raw_path.decode()}" for request in self.requests]

    @property
    def body(self) -> dict[str, Any]:
        [request] = self.requests
        read: dict[str, Any] = json.loads(request.content)
        return read


def task(**fields: Any) -> httpx.Response:
    return httpx.Response(200, json={**TASK, **fields})


@pytest.fixture
def platform() -> Platform:
    return Platform()


@pytest.fixture
def backend(platform: Platform) -> Backend:
    transport = httpx.MockTransport(platform)
    configuration = Configuration("key-1", "org-1", "https://platform.example", "agent-1")
    return Backend(configuration, transport=transport, async_transport=transport)
