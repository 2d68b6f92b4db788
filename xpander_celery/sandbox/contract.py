"""What the platform accepts as bodies, and how it words a refusal. Knows no HTTP and no storage.

Strict on purpose: a body that the official client would never send is refused, so that a mistake shows here and not
in production.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, ValidationError, model_validator

Body = TypeVar("Body", bound=BaseModel)


class BodyError(ValueError):
    """The body is not the contract's; `detail` is the list of problems, as the platform words them."""

    def __init__(self, detail: list[dict[str, Any]]) -> None:
        super().__init__(f"{len(detail)} problems")
        self.detail = detail

    @classmethod
    def of(cls, error: ValidationError) -> BodyError:
        """The same problems as `error`'s, in the platform's words."""
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        return cls([{"loc": ["body", *each["loc"]], "msg": each["msg"], "type": each["type"]} for each in problems])


class ReportedTokens(BaseModel):
    """The five token counts of a report; the total is always prompt + completion."""

    model_config = ConfigDict(strict=True, extra="forbid")

    completion_tokens: NonNegativeInt
    prompt_tokens: NonNegativeInt
    cache_read_tokens: NonNegativeInt
    cache_write_tokens: NonNegativeInt
    total_tokens: NonNegativeInt

    @model_validator(mode="after")
    def _total_adds_up(self) -> ReportedTokens:
        if self.total_tokens != self.prompt_tokens + self.completion_tokens:
            raise ValueError("total_tokens is not prompt_tokens + completion_tokens")
        return self


class ReportBody(BaseModel):
    """The body of `report_task`: eight keys, all of them always present."""

    model_config = ConfigDict(strict=True, extra="forbid")

    id: str | None
    input: str | None
    llm_response: Any
    tokens: ReportedTokens | None
    is_success: bool
    result: str | None
    duration: FiniteFloat = Field(ge=0)
    used_tools: list[str]


class InvocationInput(BaseModel):
    """What an invoked agent is asked."""

    model_config = ConfigDict(extra="allow")

    text: str | None = None
    files: list[Any] | None = None
    user: dict[str, Any] | None = None


class InvocationBody(BaseModel):
    """The part of the create-task body that the sandbox acts on; the rest is kept as it came."""

    model_config = ConfigDict(extra="allow")

    id: str | None = None
    input: InvocationInput = InvocationInput()
    title: str | None = None
    source: str | None = None
    run_locally: bool | None = None


class UpdateBody(BaseModel):
    """The part of a task update that has columns of its own; the rest is kept as it came."""

    model_config = ConfigDict(extra="allow")

    status: str | None = None
    result: str | None = None
    title: str | None = None
    input: InvocationInput | None = None
    configuration: Any = Field(default=None, exclude=True, description="The official client echoes it, with its key.")


def read_body(model: type[Body], text: bytes) -> Body:
    """The body in `text`; raises `BodyError` for anything that is not the contract's."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise BodyError.of(error) from None
