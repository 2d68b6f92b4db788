"""The platform's requests and answers as plain data: what is asked, what came back, and what a refusal means.

Nothing here does I/O, so that the asynchronous client and its synchronous twin share every rule: an operation is a
generator of `Steps`, which yields what to send and is given the answer.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeAlias, TypeVar

from pydantic_core import from_json

from xpander_celery.errors import (
    AuthenticationError,
    BackendError,
    NotFoundError,
    ProtocolError,
    RateLimitedError,
    RequestRefusedError,
    ServerError,
)

_T = TypeVar("_T")
_EXCERPT = 300


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `path` is already escaped and begins with a slash; `body` is JSON. `within_s` bounds the exchange
    where that is less than the transport's own timeouts.
    """

    method: str
    path: str
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    within_s: float | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True, slots=True)
class Pause:
    """A wait between two requests."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for a call. Header names are lower case."""

    status_code: int
    body: bytes
    headers: Mapping[str, str]


Steps: TypeAlias = Generator[Call | Pause, Answer | None, _T]


def ask(call: Call) -> Steps[dict[str, Any]]:
    """Send one call and return the JSON object that answers it; raises the error that its status means."""
    answer = yield call
    assert answer is not None, "a call is always given its answer"
    return accepted(call, answer)


def accepted(call: Call, answer: Answer) -> dict[str, Any]:
    """The JSON object of a 2xx answer; raises the error that any other answer means."""
    if not 200 <= answer.status_code < 300:
        raise refusal(call, answer)
    try:
        read = from_json(answer.body)
    except ValueError as error:
        raise ProtocolError(
            f"{call}: {answer.status_code} with a body that is not JSON: {_excerpt(answer)}",
            status_code=answer.status_code,
        ) from error
    if not isinstance(read, dict) or "id" not in read:
        raise ProtocolError(
            f"{call}: {answer.status_code} with a body of another form: {_excerpt(answer)}",
            status_code=answer.status_code,
        )
    return read


def refusal(call: Call, answer: Answer) -> BackendError:
    """The error that a status other than 2xx means."""
    status = answer.status_code
    message = f"{call}: {status}{_phrase(status)}: {_excerpt(answer)}"
    retry_after = answer.headers.get("retry-after")
    if status in (401, 403):
        return AuthenticationError(message, status_code=status)
    if status in (404, 410):
        return NotFoundError(message, status_code=status)
    if status == 429:
        return RateLimitedError(message, retry_after=retry_after)
    if status in (408, 425) or status >= 500:
        return ServerError(message, status_code=status, retry_after=retry_after)
    if status >= 400:
        return RequestRefusedError(message, status_code=status)
    if location := answer.headers.get("location"):
        message = f"{call}: {status}, a redirect to {location[:_EXCERPT]}, is not followed: check XPANDER_BASE_URL"
    return ProtocolError(message, status_code=status)


def _phrase(status: int) -> str:
    try:
        return f" {HTTPStatus(status).phrase}"
    except ValueError:
        return ""


def _excerpt(answer: Answer) -> str:
    text = answer.body[: _EXCERPT * 4].decode(errors="replace").strip()
    return f"{text[:_EXCERPT]}…" if len(text) > _EXCERPT else text or "(no body)"
