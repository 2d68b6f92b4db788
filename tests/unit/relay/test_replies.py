from __future__ import annotations

import http
import time
from email.utils import formatdate
from types import SimpleNamespace

import httpx
import pytest

from xpander_celery import errors
from xpander_celery.relay.replies import Answer, read_error, retry_after_s, status_of

NOW = 1_700_000_000.0


class ForeignError(Exception):
    """What another client raises: a status under any of the usual names."""

    def __init__(self, **attributes: object) -> None:
        super().__init__("told by a stranger")
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (300, Answer.BARRED),
        (301, Answer.BARRED),
        (308, Answer.BARRED),
        (400, Answer.REFUSED),
        (401, Answer.BARRED),
        (402, Answer.FAILED),
        (403, Answer.BARRED),
        (404, Answer.AGENT_UNKNOWN),
        (405, Answer.FAILED),
        (408, Answer.FAILED),
        (409, Answer.REFUSED),
        (410, Answer.AGENT_UNKNOWN),
        (413, Answer.TOO_LARGE),
        (422, Answer.REFUSED),
        (425, Answer.FAILED),
        (429, Answer.THROTTLED),
        (500, Answer.FAILED),
        (503, Answer.FAILED),
        (599, Answer.FAILED),
        (200, Answer.FAILED),
    ],
)
def test_a_status_decides_whoever_raised_the_error(status: int, answer: Answer) -> None:
    request = httpx.Request("POST", "http://platform/")
    foreign = httpx.HTTPStatusError("x", request=request, response=httpx.Response(status, request=request))
    for error in (
        errors.BackendError("x", status_code=status),
        ForeignError(status_code=status),
        ForeignError(status=status),
        foreign,
    ):
        assert read_error(error, now=NOW).answer is answer


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (errors.ConfigurationError("XPANDER_API_KEY", "is not set", "Set it."), Answer.BARRED),
        (errors.AuthenticationError("no"), Answer.BARRED),
        (errors.InvalidValueError("result", "is no text"), Answer.REFUSED),
        (errors.RequestRefusedError("no"), Answer.REFUSED),
        (errors.NotFoundError("no"), Answer.AGENT_UNKNOWN),
        (errors.RateLimitedError("slow", status_code=None), Answer.THROTTLED),
        (errors.ServerError("down"), Answer.FAILED),
        (errors.NetworkError("refused"), Answer.FAILED),
        (errors.ProtocolError("html"), Answer.FAILED),
        (ConnectionResetError("reset"), Answer.FAILED),
        (RuntimeError("anything"), Answer.FAILED),
    ],
)
def test_without_a_status_the_kind_of_the_error_decides(error: Exception, answer: Answer) -> None:
    assert read_error(error, now=NOW).answer is answer


@pytest.mark.parametrize("status", [True, "503", 0, 99, 600, None, 2.5])
def test_what_is_no_status_is_not_taken_for_one(status: object) -> None:
    assert status_of(ForeignError(status=status)) is None


def test_a_status_of_the_standard_library_counts() -> None:
    assert status_of(ForeignError(status_code=http.HTTPStatus.TOO_MANY_REQUESTS)) == 429


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 120 ", 120.0),
        ("1.5", 1.5),
        (7, 7.0),
        ("0", 0.0),
        ("1000000000", 3600.0),
        ("9" * 400, 3600.0),
        (formatdate(NOW + 120, usegmt=True), 120.0),
        (formatdate(NOW - 120, usegmt=True), 0.0),
        (formatdate(NOW + 10**8, usegmt=True), 3600.0),
        ("soon", None),
        ("-5", None),
        ("", None),
        ("nan", None),
        ("inf", None),
        ("Wed, 99 Foo 2026", None),
        (None, None),
        (object(), None),
    ],
)
def test_retry_after_is_read_clamped_or_ignored(value: object, seconds: float | None) -> None:
    assert retry_after_s(value, now=NOW) == seconds


def test_retry_after_is_found_on_our_errors_and_in_the_headers_of_others() -> None:
    assert read_error(errors.RateLimitedError("slow", retry_after="120"), now=NOW).retry_after_s == 120
    assert read_error(errors.ServerError("down", status_code=503, retry_after="9"), now=NOW).retry_after_s == 9
    response = SimpleNamespace(status_code=429, headers=httpx.Headers({"Retry-After": "30"}))
    assert read_error(ForeignError(response=response), now=NOW).retry_after_s == 30


def test_reasons_say_what_to_mend() -> None:
    assert "XPANDER_API_KEY" in read_error(errors.AuthenticationError("no", status_code=403), now=NOW).reason
    assert "XPANDER_BASE_URL" in read_error(errors.ProtocolError("moved", status_code=302), now=NOW).reason
    assert "agent" in read_error(errors.NotFoundError("no", status_code=404), now=NOW).reason


def test_a_reason_is_one_line_of_bounded_length() -> None:
    reason = read_error(RuntimeError("line\n" * 1000), now=NOW).reason
    assert "\n" not in reason
    assert len(reason) < 400


def test_a_date_without_a_zone_is_in_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        now = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT
        assert retry_after_s("Sun Nov  6 08:59:37 1994", now=now) == 600
        assert retry_after_s("Sun, 06 Nov 1994 08:59:37 GMT", now=now) == 600
    finally:
        monkeypatch.undo()
        time.tzset()
