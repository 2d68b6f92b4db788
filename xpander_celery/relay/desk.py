"""What can be asked of the index by people: list, show, requeue, purge. Plain data in, JSON-safe data out.

The owner of the index answers: the relay (asked through its mailbox), or a command that holds the lock where none runs.
Long work is done in steps, so that the relay goes on meanwhile; whoever asks comes again until nothing is left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from xpander_celery.fold import Final, JobState, verdict
from xpander_celery.relay.index import Index
from xpander_celery.relay.rows import Job, Phase
from xpander_celery.relay.schema import IndexFullError

_STEP = 1000
_PAGE = 500

VERBS = ("list", "show", "requeue", "purge")


class Desk:
    """Answers requests about one index."""

    def __init__(self, index: Index, *, now: Callable[[], float], redelivery_wait_s: float) -> None:
        self._index = index
        self._now = now
        self._redelivery_wait_s = redelivery_wait_s

    def answer(self, verb: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request; an `error` in it says what is wrong with the request."""
        handlers: dict[str, Callable[..., dict[str, Any]]]
        handlers = {"list": self._list, "show": self._show, "requeue": self._requeue, "purge": self._purge}
        handler = handlers.get(verb) if isinstance(verb, str) else None
        if handler is None:
            return {"error": f"no such request: {verb}"}
        try:
            return handler(**arguments)
        except (TypeError, KeyError, ValueError, IndexFullError) as error:
            return {"error": f"{verb}: {error}"}

    def _list(self, phase: str, limit: int = _PAGE, after: list[Any] | None = None) -> dict[str, Any]:
        """One page of jobs, and what to ask for the next one with."""
        jobs, after = self._index.listing(Phase[phase.upper()], limit=min(limit, _PAGE), after=after or ())
        return {"jobs": [_summary(job) for job in jobs], "after": after}

    def _show(self, job_id: str) -> dict[str, Any]:
        """Everything known of one job, with the report as it would be sent."""
        job = self._index.find([job_id]).get(job_id)
        if job is None:
            return {"job": None}
        state = JobState.model_validate_json(job.state)
        judged = verdict(state, now=self._now(), gone=self._index.gone, redelivery_wait_s=self._redelivery_wait_s)
        report = judged.report if isinstance(judged, Final) else None
        shown = None if report is None else {"agent_id": report.agent_id} | json.loads(report.to_wire())
        return {"job": _summary(job) | {"report": shown, "state": json.loads(job.state)}}

    def _requeue(self, **which: Any) -> dict[str, Any]:
        """Let a step of the chosen dead reports be tried again."""
        jobs, answer = self._dead(**which)
        self._index.requeue(jobs, self._now())
        return answer

    def _purge(self, **which: Any) -> dict[str, Any]:
        """Forget a step of the chosen dead reports."""
        jobs, answer = self._dead(**which)
        self._index.delete(jobs)
        return answer

    def _dead(
        self,
        job_id: str | None = None,
        reason: str | None = None,
        after: list[Any] | None = None,
        until: float | None = None,
    ) -> tuple[list[Job], dict[str, Any]]:
        """The dead reports in the next step that are chosen: one by its id, those whose reason holds a text, or all.

        What died after `until` is not chosen, or a report that dies again at once would be chosen for ever. At first
        that is whatever is dead by now, also by a clock that was ahead of this one.
        """
        until = max(self._now(), self._index.newest(Phase.DEAD)) if until is None else until
        if job_id is not None:
            page, after = list(self._index.find([job_id]).values()), []
        else:
            page, after = self._index.listing(Phase.DEAD, limit=_STEP, after=after or ())
        died = [job for job in page if job.phase is Phase.DEAD and job.at <= until]
        jobs = [job for job in died if reason is None or reason in (job.reason or "")]
        answer = {"done": len(jobs), "seen": len(page), "after": after if died else [], "until": until}
        return jobs, answer


def _summary(job: Job) -> dict[str, Any]:
    return {
        "id": job.job_id,
        "phase": job.phase.name.lower(),
        "agent_id": job.agent_id,
        "since": job.since,
        "at": job.at if job.at != float("inf") else None,
        "revision": job.revision,
        "tries": job.tries,
        "attempts": job.attempts,
        "reason": job.reason,
        "bytes": job.size,
        "delivered_before": job.digest is not None,
    }
