"""What is sent for a job: `TaskReport`, its `Tokens` and the `Outcome` behind it. Layer 1: pure.

The wire form is the body of `POST /agent-execution/{agent_id}/report_task`: eight keys, always present, in the order
that the platform's own client uses, compact, UTF-8 not escaped.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt
from pydantic_core import to_json


class Outcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRIED = "retried"
    IGNORED = "ignored"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"
    LOST = "lost"
    REVOKED = "revoked"
    EXPIRED = "expired"
    REQUEUED = "requeued"
    INTERRUPTED = "interrupted"

    @property
    def is_success(self) -> bool:
        """True for `succeeded` and `ignored`, as the platform's `is_success`."""
        return self in (Outcome.SUCCEEDED, Outcome.IGNORED)


class Tokens(BaseModel):
    """Tokens spent, as the platform counts them: each provider's own semantics.

    OpenAI counts cached tokens inside `prompt_tokens`; Anthropic and Bedrock report them beside it.
    """

    model_config = ConfigDict(frozen=True)

    completion_tokens: NonNegativeInt = 0
    prompt_tokens: NonNegativeInt = 0
    cache_read_tokens: NonNegativeInt = 0
    cache_write_tokens: NonNegativeInt = 0

    @property
    def total_tokens(self) -> int:
        """Always prompt + completion, as the platform computes it."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            completion_tokens=self.completion_tokens + other.completion_tokens,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cache_read_tokens=self.cache_read_tokens + other.cache_read_tokens,
            cache_write_tokens=self.cache_write_tokens + other.cache_write_tokens,
        )

    def __bool__(self) -> bool:
        return bool(self.prompt_tokens or self.completion_tokens or self.cache_read_tokens or self.cache_write_tokens)

    def to_wire(self) -> dict[str, int]:
        """The five keys of the platform, in its order."""
        return {
            "completion_tokens": self.completion_tokens,
            "prompt_tokens": self.prompt_tokens,
            "cache_read_tokens": self.cache_read_tokens,
            "cache_write_tokens": self.cache_write_tokens,
            "total_tokens": self.total_tokens,
        }


class TaskReport(BaseModel):
    """What is sent for one job: the arguments of `areport_external_task`.

    `duration` is in seconds. `input` and `result` are text that is already redacted and capped. `llm_response` is any
    JSON-safe value. The same `id` sent again updates the same record of the task history.
    """

    model_config = ConfigDict(frozen=True)

    agent_id: str
    id: str | None = None
    input: str | None = None
    llm_response: Any = None
    tokens: Tokens | None = None
    is_success: bool = True
    result: str | None = None
    duration: float = 0.0
    used_tools: tuple[str, ...] = ()

    def to_wire(self) -> bytes:
        """The request body, byte-compatible with the official client's (`agent_id` goes into the path)."""
        return to_json(
            {
                "id": self.id,
                "input": self.input,
                "llm_response": self.llm_response,
                "tokens": None if self.tokens is None else self.tokens.to_wire(),
                "is_success": self.is_success,
                "result": self.result,
                "duration": self.duration,
                "used_tools": self.used_tools,
            },
            inf_nan_mode="null",
        )
