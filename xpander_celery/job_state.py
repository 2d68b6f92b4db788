"""What is known of one job: the best of what was said of each of its attempts. Layer 1: pure.

`fold` builds these states and `verdict` reads them. Nothing here looks at a clock or at which processes live.

The number of a job's attempts has no bound (a message that kills its worker may come back for ever), its state has:
`JobState.bounded` drops the texts of all but the newest `FULL` attempts, and merges those older than the newest `KEPT`
into sums.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from xpander_celery.events import CarriedAttempt, Ended, Finished, Progress, Started, request_id_of
from xpander_celery.report import Outcome, Tokens

_Opening = TypeVar("_Opening", Started, Ended)

FULL = 8
KEPT = 40  # more than a message carries one by one
FINGERPRINTS = 256
MERGED_TOOLS = 256


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Usage(_Model):
    """What some attempts spent together."""

    attempts: int = 0
    tokens: Tokens = Tokens()
    used_tools: tuple[str, ...] = ()
    duration_s: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        """The sum; tools stay distinct, in order of first use."""
        return Usage.model_construct(
            attempts=self.attempts + other.attempts,
            tokens=self.tokens + other.tokens,
            used_tools=tuple(dict.fromkeys(self.used_tools + other.used_tools)),
            duration_s=self.duration_s + other.duration_s,
        )


class Attempt(_Model):
    """The best of what was said of one attempt."""

    started: Started | None = None
    progress: Progress | None = None  # only where its usage is newer than that of `finished`
    finished: Finished | None = None
    ended: Ended | None = None
    carried: CarriedAttempt | None = None
    carried_place: int | None = None  # where in the history that messages carried, where they carried one

    @property
    def end(self) -> Finished | Ended | None:
        """The word that decides: the child's if it named an outcome, else the parent's, else none."""
        child, parent = self.finished, self.ended
        if child is None or child.outcome is Outcome.INTERRUPTED:
            return parent
        if parent is not None and parent.outcome is Outcome.FAILED and child.outcome is Outcome.SUCCEEDED:
            return parent  # the result could not be stored
        return child

    @property
    def continues(self) -> bool:
        """Whether its end says that another attempt of the job follows."""
        end = self.end
        return end is not None and (end.continues or end.outcome in (Outcome.RETRIED, Outcome.REQUEUED))

    @property
    def goes_on_at(self) -> float | None:
        """When the attempt that its end says will follow can begin; None where none follows."""
        end = self.end
        if end is None or not self.continues:
            return None
        due = end.goes_on_at if isinstance(end, Finished) else None
        return max(end.at, due) if due is not None else end.at

    @property
    def is_replaced(self) -> bool:
        """Whether it ended by putting another task into its place."""
        return self.continues and self.end is not None and self.end.outcome is Outcome.IGNORED

    @property
    def is_carried_only(self) -> bool:
        """Whether all that is known of it came in the message of a later attempt."""
        return self.started is None and self.finished is None and self.ended is None and self.progress is None

    @property
    def place(self) -> int | None:
        """Its place, from 1, in the history that messages carry; one whose message carried nothing is the first."""
        return self.carried_place or (1 if self.started is not None or self.ended is not None else None)

    @property
    def began_at(self) -> float:
        """When it began, as closely as is known."""
        if self.started is not None:
            return self.started.at
        own = self.finished or self.progress
        if own is not None:
            return own.at - own.duration_s
        return self.ended.at if self.ended is not None else 0.0

    @property
    def last_at(self) -> float:
        """When it was last heard of."""
        words = (self.started, self.progress, self.finished, self.ended)
        return max((word.at for word in words if word is not None), default=0.0)

    @property
    def retries(self) -> int:
        """How many retries came before it."""
        source = self.started or self.ended
        return source.facts.retries if source is not None else 0

    @property
    def usage(self) -> Usage:
        """What it spent, as the journal has it; where that is silent, as a later message carried it."""
        spent = self.progress or self.finished or self.carried
        return Usage.model_construct(
            attempts=1,
            tokens=spent.tokens if spent is not None else Tokens(),
            used_tools=tuple(dict.fromkeys(spent.used_tools)) if spent is not None else (),
            duration_s=self._duration_s(),
        )

    def _duration_s(self) -> float:
        if self.finished is not None:
            return self.finished.duration_s
        seen = self.progress.duration_s if self.progress is not None else 0.0
        if self.ended is not None:  # killed: the parent's word is the only mark of its end
            return max(seen, self.ended.at - self.began_at)
        return max(seen, self.carried.duration_s if self.carried is not None else 0.0)

    def without_texts(self) -> Attempt:
        """All that counts, but not what only the report of a deciding attempt needs."""
        changes: dict[str, Any] = {}
        if self.started is not None and self.started.facts.input is not None:
            changes["started"] = _without_input(self.started)
        done = self.finished
        if done is not None and (done.input is not None or done.result is not None or done.llm_response is not None):
            changes["finished"] = done.model_copy(update={"input": None, "result": None, "llm_response": None})
        if self.ended is not None and (self.ended.result is not None or self.ended.facts.input is not None):
            changes["ended"] = _without_input(self.ended).model_copy(update={"result": None})
        return self.model_copy(update=changes) if changes else self


class Merged(_Model):
    """The oldest attempts of a long history, as sums.

    `placed` had a place in the carried history, `others` had none. Which attempts are in here is known by
    fingerprint; when there are too many of those, everything before `forgotten_until` is taken to be in here.
    """

    placed: Usage = Usage()
    others: Usage = Usage()
    fingerprints: tuple[str, ...] = ()
    forgotten_until: float | None = None

    def contains(self, attempt_id: str, at: float | None = None) -> bool:
        """Whether the attempt is one of these; `at` is the time of an event of it."""
        if _fingerprint(attempt_id) in self.fingerprints:
            return True
        return at is not None and self.forgotten_until is not None and at <= self.forgotten_until

    def with_attempt(self, attempt_id: str, attempt: Attempt) -> Merged:
        """These and one more."""
        kind = "placed" if attempt.place else "others"
        total: Usage = getattr(self, kind) + attempt.usage
        ids = dict.fromkeys((attempt_id, request_id_of(attempt_id)))
        known = dict.fromkeys((*self.fingerprints, *map(_fingerprint, ids)))
        update: dict[str, Any] = {
            kind: total.model_copy(update={"used_tools": total.used_tools[:MERGED_TOOLS]}),
            "fingerprints": tuple(known)[-FINGERPRINTS:],
        }
        if len(known) > FINGERPRINTS:
            # The dropped attempt was merged before this one, so it was last heard of before this one, or about then.
            update["forgotten_until"] = max(self.forgotten_until or 0.0, attempt.began_at)
        return self.model_copy(update=update)


class JobState(_Model):
    """All that is known of one job, stored as JSON."""

    job_id: str
    attempts: dict[str, Attempt] = {}  # and, by the id of the request, what a parent said that is no child
    earlier: CarriedAttempt | None = None  # the oldest attempts, as the message that carried them merged them
    merged: Merged | None = None

    def model_dump_json(self, **options: Any) -> str:
        """As pydantic's, but compact: what has its default is left out."""
        return super().model_dump_json(**{"exclude_defaults": True, **options})

    def joined(self) -> dict[str, Attempt]:
        """The attempts by id, with what a parent said of a request at the newest attempt that was made at it.

        Which one that is may be known later than what the parent said, so the state itself keeps the two apart.
        """
        newest: dict[str, str] = {}
        for attempt_id, attempt in self.attempts.items() if len(self.attempts) > 1 else ():
            request_id = request_id_of(attempt_id)
            if request_id == attempt_id or not self._is_of_parent(request_id):
                continue
            known = newest.get(request_id)
            if known is None or (attempt.began_at, attempt_id) > (self.attempts[known].began_at, known):
                newest[request_id] = attempt_id
        if not newest:
            return self.attempts
        joined = {attempt_id: attempt for attempt_id, attempt in self.attempts.items() if attempt_id not in newest}
        for request_id, attempt_id in newest.items():
            said, attempt = self.attempts[request_id], joined[attempt_id]
            place = max(said.carried_place or 0, attempt.carried_place or 0) or None
            joined[attempt_id] = attempt.model_copy(update={"ended": said.ended, "carried_place": place})
        return joined

    def _is_of_parent(self, request_id: str) -> bool:
        """Whether all that is known under that id is what a parent said."""
        said = self.attempts.get(request_id)
        if said is None or said.ended is None:
            return False
        return not (said.started or said.finished or said.progress or said.carried)

    def in_order(self) -> list[tuple[str, Attempt]]:
        """The attempts by id, oldest first.

        Clocks of hosts differ, so the count of retries is asked before the time. A job that replaced itself counts
        its retries from 0 again, so what began after that comes after it. Attempts that a message carried come first,
        in its order: whoever carried them came later.
        """
        attempts = self.joined()
        if len(attempts) < 2:
            return list(attempts.items())
        replaced = [attempt.began_at for attempt in attempts.values() if attempt.is_replaced]

        def order(item: tuple[str, Attempt]) -> tuple[int, int, float, str]:
            attempt_id, attempt = item
            if attempt.is_carried_only:
                return -1, attempt.carried_place or 0, 0.0, attempt_id
            began_at = attempt.began_at
            return sum(began < began_at for began in replaced), attempt.retries, began_at, attempt_id

        return sorted(attempts.items(), key=order)

    def usage(self) -> Usage:
        """The union of what all attempts spent, by attempt id.

        What a message merged counts only where some of those attempts are not known one by one; then it stands for
        all of them.
        """
        merged, earlier, covered = self.merged, self.earlier, 0
        attempts = self.in_order()
        total = merged.others + merged.placed if merged is not None else Usage()
        if earlier is not None:
            known = {place for _, a in attempts if (place := a.place) and place <= earlier.attempts}
            if len(known) + (merged.placed.attempts if merged is not None else 0) < earlier.attempts:
                covered = earlier.attempts
                total = _usage_of(earlier) + merged.others if merged is not None else _usage_of(earlier)
        for _, attempt in attempts:
            if covered == 0 or not attempt.place or attempt.place > covered:
                total = total + attempt.usage if total.attempts else attempt.usage
        return total

    def bounded(self) -> JobState:
        """The same within bounds: itself, as long as there are at most `FULL` attempts.

        The newest attempt that is over and the newest that continues stay whole, since they may still decide, and so
        does the first, which says what was asked for.
        """
        if len(self.attempts) <= FULL:
            return self
        ordered = self.in_order()
        whole = {attempt_id for attempt_id, _ in ordered[-FULL:]}
        whole.update([i for i, a in ordered if not a.is_carried_only][:1])
        for continues in (False, True):
            whole.update([i for i, a in ordered if a.end is not None and a.continues is continues][-1:])
        old = [item for item in ordered if item[0] not in whole]
        surplus = max(0, len(ordered) - KEPT)
        attempts, merged = dict(self.attempts), self.merged
        for attempt_id, attempt in old[:surplus]:
            merged = (merged or Merged()).with_attempt(attempt_id, attempt)
            for known in self._parts(attempt_id, attempt):
                del attempts[known]
        for attempt_id, attempt in old[surplus:]:
            for known in self._parts(attempt_id, attempt):
                attempts[known] = attempts[known].without_texts()
        return self.model_copy(update={"attempts": attempts, "merged": merged})

    def _parts(self, attempt_id: str, attempt: Attempt) -> set[str]:
        """The ids under which a joined attempt is kept."""
        is_joined = attempt.ended is not None and self.attempts[attempt_id].ended is not attempt.ended
        return {attempt_id, request_id_of(attempt_id)} if is_joined else {attempt_id}


def _fingerprint(attempt_id: str) -> str:
    return blake2b(attempt_id.encode(errors="replace"), digest_size=6).hexdigest()


def _usage_of(entry: CarriedAttempt) -> Usage:
    return Usage(attempts=entry.attempts, tokens=entry.tokens, used_tools=entry.used_tools, duration_s=entry.duration_s)


def _without_input(event: _Opening) -> _Opening:
    return event.model_copy(update={"facts": event.facts.model_copy(update={"input": None})})
