"""What is read from the messages of jobs, and what goes into them."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from xpander_celery import messages
from xpander_celery.events import CarriedAttempt
from xpander_celery.report import Tokens

EARLIER = CarriedAttempt(job_id="job", attempt_id="a-0", tokens=Tokens(prompt_tokens=3), used_tools=("x",))


def test_carried_usage_comes_back_as_it_was_sent() -> None:
    written = messages.carried_out([EARLIER])
    assert messages.carried_in({"id": "job", messages.CARRIED: written}) == (EARLIER,)


@pytest.mark.parametrize("written", [None, [], "text", [{"no": "attempt"}], 7, [1]])
def test_what_is_no_carried_usage_is_left_aside(written: Any) -> None:
    assert messages.carried_in({"id": "job", messages.CARRIED: written}) == ()


def test_carried_usage_of_another_job_is_left_aside() -> None:
    assert messages.carried_in({"id": "other", messages.CARRIED: messages.carried_out([EARLIER])}) == ()


def test_the_attempt_is_only_that_of_this_very_message() -> None:
    given = ("attempt", "owner")
    assert messages.attempt_in({messages.ATTEMPT: given}) == given
    assert messages.attempt_in({messages.ATTEMPT: given, "is_eager": True}) is None
    assert messages.attempt_in({"headers": {messages.ATTEMPT: given}}) is None


@pytest.mark.parametrize(
    ("delivery_info", "queue"),
    [
        ({"exchange": "", "routing_key": "fast"}, "fast"),
        ({"exchange": "fast", "routing_key": "fast"}, "fast"),
        ({"exchange": "topics", "routing_key": "a.b"}, "topics:a.b"),
        ({"exchange": None, "routing_key": None}, None),
        (None, None),
    ],
)
def test_the_queue_is_the_routing_key_of_the_default_exchange(delivery_info: Any, queue: str | None) -> None:
    assert messages.facts_of({"delivery_info": delivery_info}).get("queue") == queue


def test_a_retry_is_not_its_own_parent() -> None:
    assert "parent_id" not in messages.facts_of({"id": "job", "parent_id": "job"})
    assert messages.facts_of({"id": "job", "parent_id": "other"})["parent_id"] == "other"


def test_the_queue_wait_begins_when_the_job_is_due() -> None:
    due = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC)
    now = due.timestamp() + 3
    message: dict[str, Any] = {messages.PUBLISHED_AT: due.timestamp() - 60}
    assert messages.queue_wait_s(message, now) == 63
    assert messages.queue_wait_s({**message, "eta": due.isoformat()}, now) == 3
    assert messages.queue_wait_s({**message, "eta": due.isoformat()}, now - 10) == 0
    assert messages.queue_wait_s({**message, "eta": "2026-01-31T12:00:00"}, now) is None
    assert messages.queue_wait_s({**message, "eta": "soon"}, now) is None
    assert messages.queue_wait_s({}, now) is None


@pytest.mark.parametrize("eta", [None, "", "soon", 5, "2026-01-31T12:00:00"])
def test_when_a_job_is_due_is_unknown_without_a_time_and_its_zone(eta: Any) -> None:
    assert messages.due_at({"eta": eta}) is None
    assert messages.due_at({}) is None
    assert messages.due_at({"eta": "1970-01-01T01:00:05+01:00"}) == 5


def test_trace_context_is_read_from_the_message_and_not_for_eager_calls() -> None:
    assert messages.carrier_in({"is_eager": True, "traceparent": "x"}) is None
    assert messages.carrier_in({"traceparent": "x"}) == {"traceparent": "x"}
    assert messages.carrier_in({"headers": {"traceparent": "y"}}) == {"traceparent": "y"}
    assert messages.carrier_in({"headers": None}) == {}
