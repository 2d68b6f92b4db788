"""From what a backend returned or raised to what it means. Pure; knows our own errors and, by shape, anybody's.

A status decides where there is one, whoever raised the error. Reasons name what has to be mended, and never hold
what was sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import StrEnum

from xpander_celery import errors

MAX_RETRY_AFTER_S = 3600.0
_MAX_REASON = 300


class Answer(StrEnum):
    """What an answer means for the report and for the destination."""

    DELIVERED = "delivered"
    FAILED = "failed"  # may succeed later
    THROTTLED = "throttled"  # too many requests
    BARRED = "barred"  # the key or the address is wrong: no report gets through
    AGENT_UNKNOWN = "agent_unknown"
    TOO_LARGE = "too_large"
    REFUSED = "refused"  # this report never will succeed


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, read. `retry_after_s` is how long the platform asked to wait, already clamped."""

    answer: Answer
    reason: str = ""
    retry_after_s: float | None = None


DELIVERED = Reply(Answer.DELIVERED)

_BY_STATUS = {
    400: Answer.REFUSED,
    401: Answer.BARRED,
    403: Answer.BARRED,
    404: Answer.AGENT_UNKNOWN,
    409: Answer.REFUSED,
    410: Answer.AGENT_UNKNOWN,
    413: Answer.TOO_LARGE,
    422: Answer.REFUSED,
    429: Answer.THROTTLED,
}

_BY_ERROR: tuple[tuple[type[Exception], Answer], ...] = (  # where there was no status; the first that fits
    (errors.ConfigurationError, Answer.BARRED),
    (errors.AuthenticationError, Answer.BARRED),
    (errors.InvalidValueError, Answer.REFUSED),
    (errors.RequestRefusedError, Answer.REFUSED),
    (errors.NotFoundError, Answer.AGENT_UNKNOWN),
    (errors.RateLimitedError, Answer.THROTTLED),
)


def read_error(error: Exception, *, now: float) -> Reply:
    """What `error` means. An error of an unknown kind may be a network failure, so it is tried again.

    `now` is the time of day (seconds since the epoch), for a Retry-After that names a date.
    """
    status = status_of(error)
    if status is None:
        answer = next((answer for kind, answer in _BY_ERROR if isinstance(error, kind)), Answer.FAILED)
    elif 300 <= status < 400:
        answer = Answer.BARRED
    else:
        answer = _BY_STATUS.get(status, Answer.FAILED)
    return Reply(answer, _reason(error, status, answer), retry_after_s(_retry_after_of(error), now=now))


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error of ours, of the official client or of httpx carries."""
    for holder, name in ((error, "status_code"), (error, "status"), (getattr(error, "response", None), "status_code")):
        status = getattr(holder, name, None)
        if isinstance(status, int) and 100 <= status < 600:
            return int(status)
    return None


def retry_after_s(value: object, *, now: float) -> float | None:
    """The seconds that a Retry-After asks for, at most an hour. None where it is absent or garbage."""
    if value is None:
        return None
    text = str(value).strip()
    try:
        seconds = float(text) if text.replace(".", "", 1).isdecimal() else _time_of(text) - now
    except (ValueError, TypeError, OverflowError):
        return None
    if not math.isfinite(seconds):
        return MAX_RETRY_AFTER_S
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)


def _time_of(date: str) -> float:
    """In seconds since the epoch; one without a zone is in UTC (RFC 9110, 5.6.7)."""
    time = parsedate_to_datetime(date)
    return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()


def _retry_after_of(error: Exception) -> object:
    if hasattr(error, "retry_after"):
        return error.retry_after
    headers = getattr(getattr(error, "response", None), "headers", None)
    return headers.get("retry-after") if isinstance(headers, Mapping) else None


def _reason(error: Exception, status: int | None, answer: Answer) -> str:
    """One line: the status or the kind of the error, what it says, and what to mend where somebody has to."""
    what = f"HTTP {status}" if status is not None else type(error).__name__
    told = " ".join(str(error).split())[:_MAX_REASON]
    text = f"{what}: {told}" if told and told != what else what
    if answer is Answer.AGENT_UNKNOWN:
        return f"{text}. The platform does not know this agent: check its id, and XPANDER_ORGANIZATION_ID."
    if answer is not Answer.BARRED or isinstance(error, errors.ConfigurationError):
        return text
    if status is not None and 300 <= status < 400:
        return f"{text}. The address redirects, which is not followed: check XPANDER_BASE_URL."
    return f"{text}. The API key is refused: check XPANDER_API_KEY and XPANDER_ORGANIZATION_ID."
