"""The task history, read back from the platform's API, and what of it the demo shows."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

_MANY = 1000


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the task history. `tokens` are the platform's five counts, None where there were none."""

    id: str
    task: str
    status: str
    is_success: bool
    duration: float
    tokens: dict[str, int] | None
    used_tools: list[str]
    input: str | None
    result: str | None
    outcome: str

    @classmethod
    def of(cls, task: dict[str, Any]) -> Self:
        """From a Task of the platform's API."""
        celery = (task.get("llm_response") or {}).get("celery") or {}
        return cls(
            id=task["id"],
            task=celery.get("task", ""),
            status=task["status"],
            is_success=task["is_success"],
            duration=task["duration"],
            tokens=task["tokens"],
            used_tools=task["used_tools"],
            input=task["input"]["text"],
            result=task["result"],
            outcome=celery.get("outcome", task["status"]),
        )

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "outcome"}


class History:
    """The history of one agent at a sandbox."""

    def __init__(self, url: str, api_key: str, agent_id: str) -> None:
        self._agent_id = agent_id
        self._client = httpx.Client(base_url=url, headers={"x-api-key": api_key}, trust_env=False, timeout=10)

    def records(self) -> dict[str, Record]:
        """Every record by its id."""
        path = f"/agent-execution/executions/history/{self._agent_id}"
        answer = self._client.get(path, params={"limit": _MANY}).raise_for_status()
        return {task["id"]: Record.of(task) for task in answer.json()}

    def served_tokens(self) -> dict[str, int]:
        """What the sandbox's model counted."""
        served: dict[str, int] = self._client.get("/_sandbox/usage").raise_for_status().json()["total"]
        return served

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._client.close()
