"""The error tree, drawn in one place. Layer 0: imports nothing of ours.

XpanderCeleryError
├── ConfigurationError          a setting is missing or malformed (also a ValueError)
├── JournalError                a journal cannot be opened or read
└── BackendError                a call to the platform failed
    ├── InvalidValueError       refused before sending: an argument the platform cannot take (also a ValueError)
    ├── RequestRefusedError     the platform refused this one request (400, 409, 413, 422)
    ├── AuthenticationError     the API key was refused (401, 403)
    ├── NotFoundError           no such agent or task (404, 410)
    ├── RateLimitedError        too many requests (429)
    ├── ServerError             the platform failed (408, 425, 5xx)
    ├── NetworkError            no answer: refused, timed out, DNS, TLS
    ├── ProtocolError           an answer that is not the platform's (3xx, a body of another form)
    └── TaskNotEndedError       a task was waited for and had not ended by the deadline (also a TimeoutError)
"""

from __future__ import annotations


class XpanderCeleryError(Exception):
    """Root of every error that this package raises."""


class ConfigurationError(XpanderCeleryError, ValueError):
    """A setting is missing or malformed; the message names the setting and the remedy."""

    def __init__(self, setting: str, problem: str, remedy: str) -> None:
        super().__init__(f"{setting}: {problem}. {remedy}")
        self.setting = setting
        self.problem = problem
        self.remedy = remedy


class JournalError(XpanderCeleryError):
    """A journal cannot be opened or read; the message names its place."""


class BackendError(XpanderCeleryError):
    """A call to the platform failed.

    `status_code` is the HTTP status, None where there was no answer. The cause is chained (`__cause__`).
    """

    def __init__(self, message: str, *, status_code: int | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code


class InvalidValueError(BackendError, ValueError):
    """An argument was refused before anything was sent; the message names the field."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class RequestRefusedError(BackendError):
    """The platform refused this one request (400, 409, 413, 422): sending it again will not help."""


class AuthenticationError(BackendError):
    """The API key was refused (401, 403)."""


class NotFoundError(BackendError):
    """The platform knows no such agent or task (404, 410)."""


class RateLimitedError(BackendError):
    """Too many requests (429). `retry_after` is the raw Retry-After header, None where absent."""

    def __init__(self, message: str, *, status_code: int | None = 429, retry_after: str | None = None) -> None:
        super().__init__(message, status_code=status_code)
        self.retry_after = retry_after


class ServerError(BackendError):
    """The platform failed (408, 425, 5xx); the same request may succeed later. `retry_after` as in RateLimitedError."""

    def __init__(self, message: str, *, status_code: int | None = None, retry_after: str | None = None) -> None:
        super().__init__(message, status_code=status_code)
        self.retry_after = retry_after


class NetworkError(BackendError):
    """No answer came: connection refused or reset, a timeout, DNS or TLS. The cause says which."""


class ProtocolError(BackendError):
    """The answer was not the platform's: a redirect, or a body of another form."""


class TaskNotEndedError(BackendError, TimeoutError):
    """A task was waited for and had not ended by the deadline; the last failed look at it, if any, is chained."""

    def __init__(self, task_id: str, timeout_s: float) -> None:
        super().__init__(f"task {task_id!r} had not ended after {timeout_s:g} s")
        self.task_id = task_id
