"""`Task`: what the platform says of one run, with the official names. Asks its `Backend` for news of itself."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from xpander_celery.backend.calls import Call
from xpander_celery.errors import ConfigurationError, ProtocolError
from xpander_celery.report import Tokens

ENDED = frozenset({"completed", "failed", "error", "stopped"})


class TaskInput(BaseModel):
    """What a task was given."""

    model_config = ConfigDict(extra="ignore", defer_build=True)

    text: str | None = ""
    files: list[str] | None = Field(default_factory=list)
    attachments: list[dict[str, Any]] | None = Field(default_factory=list)
    user: dict[str, Any] | None = None


class Waiter(Protocol):
    """What a task needs of the backend that it came from."""

    def wait_for_task(self, task_id: str, timeout_s: float) -> Task: ...

    async def await_task(self, task_id: str, timeout_s: float) -> Task: ...


class Task(BaseModel):
    """One run at the platform. Unknown keys of the answer are ignored; printing it shows no credentials."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True, defer_build=True)

    id: str
    agent_id: str | None = None
    organization_id: str | None = None
    input: TaskInput = Field(default_factory=TaskInput)
    status: str = "pending"
    internal_status: str | None = None
    result: str | None = None
    title: str | None = None
    source: str | None = None
    agent_version: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    paused_at: datetime | None = None
    finished_at: datetime | None = None
    tokens: Tokens | None = None
    used_tools: list[str] = Field(default_factory=list)
    duration: float = 0.0
    conversation_id: str | None = None
    parent_execution: str | None = None
    sub_executions: list[str] = Field(default_factory=list)
    last_executed_node_id: str | None = None
    is_manually_stopped: bool = False
    execution_attempts: int = 1
    payload_extension: dict[str, Any] | None = None
    output_format: str | None = None
    output_schema: dict[str, Any] | None = None
    expected_output: str | None = None
    additional_context: str | None = None
    instructions_override: str | None = None
    events_streaming: bool = False
    triggering_agent_id: str | None = None
    think_mode: str | None = None
    tool_call_limit: int | None = None
    llm_model_provider: str | None = None
    llm_model_name: str | None = None
    llm_reasoning_effort: str | None = None

    _backend: Waiter | None = PrivateAttr(default=None)

    @classmethod
    def read(cls, call: Call, answer: dict[str, Any], backend: Waiter | None = None) -> Task:
        """The task in an answer; raises `ProtocolError` where it is none."""
        try:
            task = cls.model_validate(_without_nulls(answer))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ProtocolError(f"{call}: the answer is no task ({where}: {first['msg']})") from error
        task._backend = backend
        return task

    def __getstate__(self) -> dict[Any, Any]:
        """For pickle, as in a result of Celery's: without the backend, which has connections and a key."""
        return {**super().__getstate__(), "__pydantic_private__": {"_backend": None}}

    @property
    def has_ended(self) -> bool:
        """True once the platform will not change it any more: completed, failed, error or stopped."""
        return self.status in ENDED

    def wait(self, timeout_s: float = 300.0) -> Task:
        """Poll until the task has ended, update this object and return it.

        How it ended is in `status`; a failed task is no error here. Raises `TaskNotEndedError` at the deadline.
        """
        return self._update(self._waiter().wait_for_task(self.id, timeout_s))

    async def await_result(self, timeout_s: float = 300.0) -> Task:
        """As `wait`, on the running loop."""
        return self._update(await self._waiter().await_task(self.id, timeout_s))

    def _waiter(self) -> Waiter:
        if self._backend is None:
            raise ConfigurationError("task", "came from no backend", "Load it with Backend.load_task(task.id).")
        return self._backend

    def _update(self, latest: Task) -> Task:
        for name in type(self).model_fields:
            setattr(self, name, getattr(latest, name))
        return self

    def __repr__(self) -> str:
        return f"Task(id={self.id!r}, agent_id={self.agent_id!r}, status={self.status!r})"

    __str__ = __repr__


def _without_nulls(answer: dict[str, Any]) -> dict[str, Any]:
    """Without nulls, also among the tokens: for the platform a null is an absent value, for a field it is a problem."""
    kept = {name: value for name, value in answer.items() if value is not None}
    if isinstance(tokens := kept.get("tokens"), dict):
        kept["tokens"] = {name: count for name, count in tokens.items() if count is not None}
    return kept
