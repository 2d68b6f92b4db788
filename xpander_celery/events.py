"""The four events about an attempt, and their encoding as one JSON text. Layer 1: pure.

A worker writes events as plain dicts (built by the functions here, encoded by `encode`), since that is what a job
waits for; the relay reads them as frozen models (`decode`). Times are seconds since the epoch, durations are seconds.
An event never holds the API key; what it holds of a user's values is already redacted and capped.

`VERSION` is raised when an older reader could misread a newer event. New optional fields do not raise it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from xpander_celery.report import Outcome, Tokens

VERSION = 1
_CARRIED_TOOLS_CHARACTERS = 16 * 1024  # of all attempts: RabbitMQ takes headers of at most 128 KiB
_MERGED_TOOLS = 64  # names of tools that a merged entry keeps: it travels in every later message


def attempt_id_of(request_id: str, child: str) -> str:
    """The id of the attempt that `child` makes at a request of its parent.

    Celery's prefork pool may give one request to several children: what a child said of having accepted it is lost
    when it dies while the pool looks at the death of another one (billiard/pool.py, `_join_exited_workers`;
    celery/concurrency/asynpool.py, `on_partial_read`). Each of them spends.
    """
    return f"{request_id}/{child}"


def request_id_of(attempt_id: str) -> str:
    """The request that an attempt was made at; an attempt of a process that has no parent is its own."""
    return attempt_id.partition("/")[0]


class UnreadableEventError(ValueError):
    """The text is no event that this release reads. `version` is the one it names, None if it names none."""

    def __init__(self, problem: str, version: int | None = None) -> None:
        super().__init__(problem)
        self.version = version


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True, allow_inf_nan=False)


class JobFacts(_Model):
    """What is known of a job from its message: the same whether child or parent says it."""

    task: str
    agent_id: str | None = None
    input: str | None = None
    queue: str | None = None
    worker: str | None = None
    retries: int = 0
    root_id: str | None = None
    parent_id: str | None = None
    group_id: str | None = None
    queue_wait_s: float | None = None
    trace_id: str | None = None
    acks_late: bool = False
    visibility_timeout_s: float | None = None  # of the broker, None where it redelivers at once
    job_metadata: bool = True


class CarriedAttempt(_Model):
    """The usage of an earlier attempt, carried in the message headers of a retry.

    A list of these is the whole history of a job, oldest first. Where it would grow too long, its oldest entries are
    merged into the first (see `carry`), which then stands for that many `attempts` and has the newest one's id.
    """

    job_id: str
    attempt_id: str
    attempts: int = 1
    tokens: Tokens = Tokens()
    used_tools: tuple[str, ...] = ()
    duration_s: float = 0.0


def carry(earlier: Sequence[CarriedAttempt], own: CarriedAttempt, limit: int = 32) -> tuple[CarriedAttempt, ...]:
    """The history that a retry carries: what its own attempt was given, and that attempt; at most `limit` entries."""
    before = tuple(entry for entry in earlier if entry.job_id == own.job_id)
    room = _CARRIED_TOOLS_CHARACTERS - sum(len(tool) for entry in before for tool in entry.used_tools)
    history = (*before, _with_tools_within(own, room))
    surplus = len(history) - limit
    if surplus <= 0:
        return history
    oldest, rest = history[: surplus + 1], history[surplus + 1 :]
    merged = CarriedAttempt(
        job_id=own.job_id,
        attempt_id=oldest[-1].attempt_id,
        attempts=sum(entry.attempts for entry in oldest),
        tokens=sum((entry.tokens for entry in oldest), Tokens()),
        used_tools=tuple(dict.fromkeys(tool for entry in oldest for tool in entry.used_tools))[:_MERGED_TOOLS],
        duration_s=sum(entry.duration_s for entry in oldest),
    )
    return merged, *rest


def _with_tools_within(own: CarriedAttempt, characters: int) -> CarriedAttempt:
    """`own` with as many names of tools as there is room for; the journal has all of them."""
    kept = sum(length <= characters for length in accumulate(map(len, own.used_tools)))
    return own if kept == len(own.used_tools) else own.model_copy(update={"used_tools": own.used_tools[:kept]})


# A name of a file and a word in a list of words: what is neither is no id, and must not come that far.
LivenessId = Annotated[str, Field(pattern=r"^[!-.0-~]{1,100}$")]


class _Event(_Model):
    v: int = VERSION
    job_id: str
    attempt_id: str
    at: float


class Started(_Event):
    """A child began an attempt. `child` and `owner` are liveness ids (equal where both are one process)."""

    kind: Literal["started"] = "started"
    child: LivenessId
    owner: LivenessId
    facts: JobFacts
    carried: tuple[CarriedAttempt, ...] = ()


class Progress(_Event):
    """The usage of an attempt so far, cumulative: the last one wins. It may also correct a finished attempt."""

    kind: Literal["progress"] = "progress"
    duration_s: float = 0.0
    tokens: Tokens = Tokens()
    used_tools: tuple[str, ...] = ()


class Finished(_Event):
    """What the child knows of the end of its attempt.

    `continues` marks an end after which another attempt of the same job is expected (a retry, a rejection with
    requeue, an ignored task that replaced itself), due at `goes_on_at` where its message asks for a later time.
    `input` and `agent_id`, when given, replace those of `started`.
    """

    kind: Literal["finished"] = "finished"
    outcome: Outcome
    duration_s: float
    result: str | None = None
    llm_response: Any = None
    tokens: Tokens = Tokens()
    used_tools: tuple[str, ...] = ()
    input: str | None = None
    agent_id: str | None = None
    continues: bool = False
    goes_on_at: float | None = None


class Ended(_Event):
    """What the parent saw of the end of a request; `facts` make a full record where no child ever spoke.

    `attempt_id` is that of the request: this is said of the newest attempt that was made at it. `before_start`: it was
    given to no child, so none will speak of it.
    """

    kind: Literal["ended"] = "ended"
    owner: LivenessId
    outcome: Outcome
    result: str | None = None
    facts: JobFacts
    carried: tuple[CarriedAttempt, ...] = ()
    continues: bool = False
    before_start: bool = False


Event = Started | Progress | Finished | Ended

_READER: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def encode(event: dict[str, Any]) -> bytes:
    """One JSON text without a newline, from a plain dict as `Started` and the others describe it."""
    return to_json(event, inf_nan_mode="null")


def decode(text: bytes) -> Event:
    """The event in `text`; raises `UnreadableEventError` for anything else, or for an event of a newer version."""
    try:
        event = _READER.validate_json(text)
    except ValidationError as error:
        raise UnreadableEventError(f"not an event: {error.error_count()} problems", _version_in(text)) from error
    if event.v > VERSION:
        raise UnreadableEventError(f"event version {event.v} is newer than {VERSION}", event.v)
    return event


def _version_in(text: bytes) -> int | None:
    try:
        version = from_json(text)["v"]
    except (ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, int) else None
