"""What the messages of jobs say, and what we add to them. Layer 3.

Works on the plain dict of a message, which parent and child both hold: `Request._request_dict` there, the attributes of
`task.request` here. An unknown header becomes an attribute of the request, and Celery sends it on with every retry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from xpander_celery.events import CarriedAttempt
from xpander_celery.recording.contained import text_of

AGENT_ID = "xpander_agent_id"
"""A header that users set: the agent of this one call."""
ATTEMPT = "xpander_attempt"
"""Set by the worker's main process, never sent: the id of the request and the owner."""
CARRIED = "xpander_carried"
"""The usage of the earlier attempts of this job, a list of `CarriedAttempt`."""
EARLIER = "xpander_earlier"
"""The span of the attempt that published this message, as a `traceparent`: to be linked, not nested deeper."""
SHOWN = "xpander_shown"
"""What the author lets be seen of the arguments, `[job id, text]`: Celery drops `argsrepr` when a job is retried."""
PUBLISHED_AT = "xpander_published_at"
"""When the message was published, in seconds since the epoch."""

_CARRIED = TypeAdapter(tuple[CarriedAttempt, ...])


def header(message: Mapping[str, Any], name: str) -> Any:
    """A header of ours or of the user: an attribute of the request, or (eager, old protocol) one of its `headers`."""
    value = message.get(name)
    if value is None:
        headers = message.get("headers")
        return headers.get(name) if headers else None
    return value


def attempt_in(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """The id of the request and its owner, where the worker's main process gave them to this very message."""
    said = message.get(ATTEMPT)
    if said is None or message.get("is_eager"):
        return None
    attempt_id, owner = said
    return attempt_id, owner


def agent_in(message: Mapping[str, Any]) -> str | None:
    """The agent that the caller named for this one job."""
    return text_of(header(message, AGENT_ID)) or None  # serializers keep some values as they are, such as a UUID


def carrier_in(message: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Where the trace context of a job is to be read; None where the job is called in-process."""
    if message.get("is_eager"):
        return None
    return message if "traceparent" in message else message.get("headers") or {}


def carried_in(message: Mapping[str, Any]) -> tuple[CarriedAttempt, ...]:
    """The earlier attempts of this job that its message knows of."""
    written = header(message, CARRIED)
    if not written:
        return ()
    try:
        carried = _CARRIED.validate_python(written)
    except ValidationError:
        return ()  # somebody else's header of that name
    return tuple(entry for entry in carried if entry.job_id == message.get("id"))


def shown_in(message: Mapping[str, Any], job_id: Any) -> str | None:
    """What an earlier message of this very job let be seen of its arguments."""
    written = header(message, SHOWN)
    if isinstance(written, (list, tuple)) and len(written) == 2 and written[0] == job_id:
        return text_of(written[1])
    return None


def carried_out(history: Sequence[CarriedAttempt]) -> list[dict[str, Any]]:
    """`history` as plain values that every serializer and broker takes."""
    return [entry.model_dump(mode="json", exclude_defaults=True) for entry in history]


def facts_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message says of its job, as in `events.JobFacts`; what is unknown is left out."""
    facts: dict[str, Any] = {}
    get = message.get
    if worker := get("hostname"):
        facts["worker"] = worker
    if retries := get("retries"):
        facts["retries"] = retries
    if root_id := get("root_id"):
        facts["root_id"] = root_id
    if (parent_id := get("parent_id")) and parent_id != get("id"):  # a retry is published from within the job
        facts["parent_id"] = parent_id
    if group_id := get("group"):
        facts["group_id"] = group_id
    if queue := _queue_in(get("delivery_info")):
        facts["queue"] = queue
    return facts


def queue_wait_s(message: Mapping[str, Any], now: float) -> float | None:
    """How long the job waited for a worker, beyond the time that it was asked to wait."""
    published_at = header(message, PUBLISHED_AT)
    if not isinstance(published_at, (int, float)):
        return None
    if message.get("eta"):
        due = due_at(message)
        if due is None:
            return None
        published_at = max(published_at, due)
    return max(0.0, now - published_at)


def due_at(message: Mapping[str, Any]) -> float | None:
    """When the job is to run at the earliest, in seconds since the epoch; None where its message does not say it."""
    try:
        due = datetime.fromisoformat(message["eta"])
        # without a zone it is in the app's own one, which the message does not say
        return due.timestamp() if due.tzinfo is not None else None
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _queue_in(delivery_info: Mapping[str, Any] | None) -> str | None:
    """On the default exchange the routing key is the queue; elsewhere the message does not say it."""
    if not delivery_info:
        return None
    exchange, routing_key = delivery_info.get("exchange"), delivery_info.get("routing_key")
    if not routing_key or not exchange or exchange == routing_key:
        return routing_key
    return f"{exchange}:{routing_key}"
