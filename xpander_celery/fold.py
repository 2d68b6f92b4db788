"""Merges what child and parent said of a job, and says what to report of it. Layer 1: pure.

`fold` is a join: each piece of a `JobState` is the greatest of what was said, by an order that arrival has no part in,
so that late, doubled and shuffled events give the same state. `verdict` reads a state: whether the job is final, and
with which report. Neither knows a journal or a platform; the time and which processes are gone are arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from xpander_celery.events import CarriedAttempt, Ended, Event, Finished, JobFacts, Progress, Started, request_id_of
from xpander_celery.job_state import Attempt, JobState, Merged
from xpander_celery.report import Outcome, TaskReport

__all__ = ["Final", "JobState", "Open", "fold", "verdict"]

# Of several words of a child the strongest holds: its result may fail to be stored, a published retry will run.
_CHILD_RANK = {Outcome.INTERRUPTED: 0, Outcome.SUCCEEDED: 1, Outcome.IGNORED: 2, Outcome.REJECTED: 2}
_CHILD_FAILED, _CHILD_CONTINUES = 3, 4
# A parent may give one attempt several ends, since its sources of them race.
_PARENT_RANK = {
    Outcome.LOST: 1,
    Outcome.TIMED_OUT: 2,
    Outcome.FAILED: 3,
    Outcome.REJECTED: 4,
    Outcome.EXPIRED: 5,
    Outcome.REVOKED: 6,
    Outcome.RETRIED: 7,
    Outcome.REQUEUED: 7,
}

_PARENT_WORD_S = 60.0  # a parent hears of its child's death up to 5 s later, and may be busy
_OWN_WORD_S = 10.0  # where both are one process
_CHILD_WORD_S = 2.0  # a child that is being killed may still say how far it came
_EARLIER_WORD_S = 2.0  # an attempt that published the next one may end after that did

_WORDS = {  # what happened, where whoever saw it left no text
    Outcome.FAILED: "failed",
    Outcome.IGNORED: "ignored",
    Outcome.REJECTED: "rejected",
    Outcome.TIMED_OUT: "TimeLimitExceeded",
    Outcome.LOST: "WorkerLostError",
    Outcome.REVOKED: "revoked",
    Outcome.EXPIRED: "expired",
}


@dataclass(frozen=True, slots=True)
class Final:
    """A job that is over.

    `report` is None where no agent is known to report to. `inferred` means that nobody saw the end: the platform's
    record is to be read first, and one that already ended is left as it is.
    """

    report: TaskReport | None
    outcome: Outcome
    inferred: bool


@dataclass(frozen=True, slots=True)
class Open:
    """A job that is not over: look again at `until` (None: no time is known), or when one of `watch` dies."""

    until: float | None
    watch: frozenset[str]


class _Ending(NamedTuple):
    outcome: Outcome
    text: str | None
    inferred: bool = False


def fold(events: Iterable[Event], state: JobState | None = None) -> JobState:
    """`state` with further events of its job; the same whatever their order, batches and repetitions.

    Holds for all events of a job of up to `job_state.FULL` attempts. Raises ValueError for events of several jobs, and
    for no event without a state.
    """
    job_id = state.job_id if state is not None else None
    attempts = dict(state.attempts) if state is not None else {}
    merged = state.merged if state is not None else None
    earlier = state.earlier if state is not None else None
    for event in events:
        attempt_id = event.attempt_id
        if event.job_id != job_id:
            if job_id is not None:
                raise ValueError("events of several jobs do not fold into one state")
            job_id = event.job_id
        if merged is not None and not _is_known(attempts, attempt_id) and merged.contains(attempt_id, event.at):
            continue
        if isinstance(event, (Started, Ended)) and event.carried:
            earlier = _note_carried(attempts, event, earlier, merged)
            event = event.model_copy(update={"carried": ()})
        attempts[attempt_id] = _joined(attempts.get(attempt_id, _UNKNOWN), event)
    if job_id is None:
        raise ValueError("no state comes from no event")
    if len(attempts) > 1:
        attempts = dict(sorted(attempts.items()))
    return JobState.model_construct(job_id=job_id, attempts=attempts, earlier=earlier, merged=merged).bounded()


_UNKNOWN = Attempt()


def _is_known(attempts: Mapping[str, Attempt], attempt_id: str) -> bool:
    """Whether it is one of these, or the request that one of these was made at."""
    return attempt_id in attempts or any(request_id_of(known) == attempt_id for known in attempts)


def _joined(attempt: Attempt, event: Event) -> Attempt:
    """`attempt` with one event more."""
    if isinstance(event, Started):
        known = attempt.started
        return attempt.model_copy(update={"started": min(known, event, key=_moment) if known else event})
    if isinstance(event, Ended):
        word = attempt.ended
        return attempt.model_copy(update={"ended": min(word, event, key=_parent_order) if word else event})
    finished = attempt.finished
    if isinstance(event, Finished):
        finished = max(finished, event, key=_child_order) if finished else event
    usage = max([word for word in (event, attempt.progress, attempt.finished) if word], key=_usage_order)
    progress = None
    if finished is None or _usage_order(usage) != _usage_order(finished):
        progress = usage if isinstance(usage, Progress) else _usage_alone(usage)
    return attempt.model_copy(update={"finished": finished, "progress": progress})


def _moment(event: Event) -> tuple[float, str]:
    """Equal times fall to the text, never to arrival."""
    return event.at, event.model_dump_json()


def _parent_order(event: Ended) -> tuple[int, float, str]:
    return -_PARENT_RANK.get(event.outcome, 0), *_moment(event)


def _child_order(event: Finished) -> tuple[int, float, str]:
    continues = event.continues or event.outcome in (Outcome.RETRIED, Outcome.REQUEUED)
    rank = _CHILD_CONTINUES if continues else _CHILD_RANK.get(event.outcome, _CHILD_FAILED)
    return rank, *_moment(event)


def _usage_order(event: Progress | Finished) -> tuple[Any, ...]:
    """Usage is cumulative, so the last word holds."""
    tokens = event.tokens
    return (
        event.at,
        event.duration_s,
        tokens.total_tokens,
        tokens.prompt_tokens,
        tokens.cache_read_tokens,
        tokens.cache_write_tokens,
        event.used_tools,
    )


def _usage_alone(event: Finished) -> Progress:
    return Progress(
        job_id=event.job_id,
        attempt_id=event.attempt_id,
        at=event.at,
        duration_s=event.duration_s,
        tokens=event.tokens,
        used_tools=event.used_tools,
    )


def _note_carried(
    attempts: dict[str, Attempt], event: Started | Ended, earlier: CarriedAttempt | None, merged: Merged | None
) -> CarriedAttempt | None:
    """Notes in `attempts` the history that a message carried; returns the greatest of its merged entries."""

    def note(attempt_id: str, place: int, entry: CarriedAttempt | None = None) -> None:
        known = attempts.get(attempt_id, _UNKNOWN)
        if entry is None or entry == known.carried:
            entry = None
            if place <= (known.carried_place or 0):
                return  # the next message of a long history repeats almost all of it
        elif known.carried is not None:
            entry = max(known.carried, entry, key=_carried_order)
        update = {"carried_place": max(known.carried_place or 0, place), "carried": entry or known.carried}
        attempts[attempt_id] = known.model_copy(update=update)

    place = 0
    for entry in event.carried:
        place += entry.attempts
        if entry.job_id != event.job_id:
            continue
        if entry.attempts > 1:
            earlier = entry if earlier is None else max(earlier, entry, key=_carried_order)
        elif merged is None or entry.attempt_id in attempts or not merged.contains(entry.attempt_id):
            note(entry.attempt_id, place, entry)
    note(event.attempt_id, place + 1)
    return earlier


def _carried_order(entry: CarriedAttempt) -> tuple[int, int, str]:
    return entry.attempts, entry.tokens.total_tokens, entry.model_dump_json()


def verdict(
    state: JobState, *, now: float, gone: Mapping[str, float], redelivery_wait_s: float, is_read: bool = True
) -> Final | Open:
    """Whether the job is over at `now`, and how.

    `gone` has, by liveness id, when a process was seen to be dead; `is_read` says that all that was written before
    `now` is in `state`. The newest attempt decides, but one whose end was seen is not overruled by one of which no end
    ever comes.
    """
    attempts = state.in_order()
    order = [item for item in attempts if not item[1].is_carried_only]
    over = max((i for i, (_, a) in enumerate(order) if a.end is not None and not a.continues), default=-1)
    silent = [attempt for _, attempt in order[over + 1 :] if attempt.end is None]
    waits = [wait for attempt in silent if (wait := _wait_for_word(attempt, now, gone, redelivery_wait_s))]
    if over >= 0 and not waits:
        decisive = order[over][1]
        earlier = [attempt for _, attempt in attempts[: over - len(order)]]
        wait = (
            _wait_for_child(decisive, now, gone)
            or _wait_for_next(order[-1][1], now, redelivery_wait_s)
            or _wait_for_earlier(earlier, decisive, now, gone, is_read=is_read)
        )
        waits = [wait] if wait else []
    if waits:
        until = min((wait.until for wait in waits if wait.until is not None), default=None)
        return Open(until, frozenset().union(*(wait.watch for wait in waits)))
    attempt_id, decisive = order[over]  # the newest one that is over, or else the newest
    return _wait_for_next(decisive, now, redelivery_wait_s) or _final(state, attempt_id, _ending(decisive, gone))


def _wait_for_word(attempt: Attempt, now: float, gone: Mapping[str, float], redelivery_wait_s: float) -> Open | None:
    """How long an end of `attempt` may still be heard of; None: no longer."""
    started = attempt.started
    if started is None:  # its processes are unknown
        until: float | None = attempt.last_at + redelivery_wait_s
        watch = frozenset[str]()
    elif started.owner in gone:
        until = gone[started.owner] + _patience_s(started.facts, redelivery_wait_s)
        watch = frozenset()
    elif attempt.finished is not None:
        until = attempt.finished.at + (_OWN_WORD_S if started.child == started.owner else _PARENT_WORD_S)
        watch = frozenset((started.owner,))
    elif started.child in gone:
        until = gone[started.child] + _PARENT_WORD_S
        watch = frozenset((started.owner,))
    else:
        until = None
        watch = frozenset((started.child, started.owner))
    return Open(until, watch) if until is None or now < until else None


def _wait_for_child(attempt: Attempt, now: float, gone: Mapping[str, float]) -> Open | None:
    """How long the child may still speak of an attempt that its parent gave up; None: no longer."""
    started, ended = attempt.started, attempt.ended
    if ended is None or ended.before_start or attempt.finished is not None:
        return None
    if started is not None and started.child in gone:
        return None
    until = ended.at + _CHILD_WORD_S
    watch = frozenset((started.child,)) if started is not None else frozenset[str]()
    return Open(until, watch) if now < until else None


def _wait_for_next(newest: Attempt, now: float, redelivery_wait_s: float) -> Open | None:
    """How long the attempt may still come that `newest` said would follow, from when it is due; None: no longer, or it
    said no such thing.

    A job that was given up, since it was killed when it had published its retry, goes on all the same.
    """
    goes_on_at = newest.goes_on_at
    until = goes_on_at + redelivery_wait_s if goes_on_at is not None else now
    return Open(until, frozenset()) if now < until else None


def _wait_for_earlier(
    earlier: Iterable[Attempt], decisive: Attempt, now: float, gone: Mapping[str, float], *, is_read: bool
) -> Open | None:
    """How long the ends of attempts before the deciding one may still be heard of; None: no longer, or all were.

    A retry or a replacement is published before the attempt that asks for it ends, so that it may be over sooner, and
    be read sooner. What began here was written before the next one began, so an attempt that only a message knows spoke
    to another journal, once everything up to the end of the deciding one is read.
    """
    silent = [attempt for attempt in earlier if attempt.finished is None and attempt.ended is None]
    silent = [attempt for attempt in silent if attempt.started is None or attempt.started.owner not in gone]
    if not silent or decisive.end is None:
        return None
    until = decisive.end.at + (0.0 if all(attempt.is_carried_only for attempt in silent) else _EARLIER_WORD_S)
    if is_read and until <= now:
        return None
    return Open(max(until, now), frozenset(attempt.started.owner for attempt in silent if attempt.started is not None))


def _patience_s(facts: JobFacts, redelivery_wait_s: float) -> float:
    """How long after its worker's death a job is held for lost: one that its broker delivers again is not."""
    if not facts.acks_late:
        return _OWN_WORD_S
    if facts.visibility_timeout_s is None:  # at once, but to the next worker that starts
        return max(_OWN_WORD_S, redelivery_wait_s)
    return max(_OWN_WORD_S, 2 * facts.visibility_timeout_s)


def _ending(attempt: Attempt, gone: Mapping[str, float]) -> _Ending:
    """How the deciding attempt ended, now that nothing more is waited for."""
    end, started = attempt.end, attempt.started
    if end is not None and not attempt.continues:
        return _Ending(end.outcome, end.result if end.result is not None else _WORDS.get(end.outcome))
    if end is not None and attempt.is_replaced:  # by a chain or group of which a part failed: no signal tells of that
        outcome, why = Outcome.FAILED, "replaced, and no further attempt came"
    elif end is not None:
        outcome, why = end.outcome, f"{end.outcome}, and no further attempt came"
    elif attempt.finished is not None and (started is None or started.owner not in gone):
        outcome, why = Outcome.INTERRUPTED, "interrupted: it ended without an outcome"
    else:
        outcome, why = Outcome.LOST, "WorkerLostError: the worker went away without a word"
    word = end or attempt.finished
    text = f"{why}\n\n{word.result}" if word is not None and word.result else why
    return _Ending(outcome, text, inferred=True)


def _final(state: JobState, attempt_id: str, ending: _Ending) -> Final:
    sources = _sources(state, attempt_id)
    agent_id = _asked("agent_id", sources)
    if agent_id is None:
        return Final(None, ending.outcome, ending.inferred)
    usage = state.usage()
    report = TaskReport(
        agent_id=agent_id,
        id=state.job_id,
        input=_asked("input", sources),
        llm_response=_llm_response(state, attempt_id, ending.outcome, sources),
        tokens=usage.tokens or None,
        is_success=ending.outcome.is_success,
        result=ending.text,
        duration=round(max(0.0, usage.duration_s), 6),
        used_tools=usage.used_tools,
    )
    return Final(report, ending.outcome, ending.inferred)


def _sources(state: JobState, attempt_id: str) -> list[Finished | JobFacts]:
    """Who says what the job asks for: itself, the deciding attempt before the newest; else its first message.

    A later message may ask for something else: that of a job which replaced itself is not what its sender sent.
    """
    attempts = dict(state.in_order())
    newest_first = (attempts[attempt_id], *reversed(attempts.values()))
    said = [attempt.finished for attempt in newest_first if attempt.finished]
    first = [source.facts for attempt in attempts.values() for source in (attempt.started, attempt.ended) if source]
    return [*said, *first]


def _asked(field: str, sources: list[Finished | JobFacts]) -> Any:
    for source in sources:
        if (value := source.__dict__.get(field)) is not None:  # getattr of a model fails slowly
            return value
    return None


def _facts(attempt: Attempt) -> JobFacts | None:
    source = attempt.started or attempt.ended
    return source.facts if source is not None else None


def _llm_response(state: JobState, attempt_id: str, outcome: Outcome, sources: list[Finished | JobFacts]) -> Any:
    """The raw model response, beside what leads from the record back to the job."""
    attempts = dict(state.in_order())
    attempt = attempts[attempt_id]
    response = attempt.finished.llm_response if attempt.finished is not None else None
    facts = _facts(attempt)
    if facts is not None and not facts.job_metadata:
        return response
    merged = state.merged
    before = merged.placed.attempts + merged.others.attempts if merged is not None else 0
    position = before + list(attempts).index(attempt_id) + 1
    celery: dict[str, Any] = {"attempt": max(position, attempt.place or 0)}
    if facts is not None:
        celery |= {
            "task": _asked("task", sources),
            "queue": facts.queue,
            "worker": facts.worker,
            "retries": facts.retries,
            "group_id": facts.group_id,
            "root_id": facts.root_id,
            "parent_id": facts.parent_id,
            "queue_wait_s": facts.queue_wait_s,
            "trace_id": facts.trace_id,
        }
    celery["outcome"] = str(outcome)
    return {"celery": {key: value for key, value in celery.items() if value is not None}, "response": response}
