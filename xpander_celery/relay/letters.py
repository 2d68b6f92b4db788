"""From a row of the index to what goes out: judges once more, compares, trims, and asks the user's hook.

It sends nothing. Whatever is wrong with one job is a reason for that job alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from xpander_celery.fold import JobState, Open, verdict
from xpander_celery.relay.policy import Fate
from xpander_celery.relay.reports import digest_of, trimmed
from xpander_celery.relay.rows import Job
from xpander_celery.report import TaskReport

Hook = Callable[[TaskReport], TaskReport | None]


@dataclass(frozen=True, slots=True)
class Letter:
    """A report that is ready to be sent. `report` is what the hook made of it, `digest` is of what it was before.

    `inferred`: nobody saw the end of the job, so a record that somebody else ended at the platform is left as it is.
    """

    job: Job
    report: TaskReport
    digest: bytes
    inferred: bool


@dataclass(frozen=True, slots=True)
class Unsent:
    """A job of which nothing is sent now. `counter` says in one word why, where that is no failure."""

    fate: Fate
    counter: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Letters:
    """The rules by which letters are made."""

    redelivery_wait_s: float
    max_age_s: float
    hook: Hook | None = None

    def prepare(self, job: Job, now: float, gone: Mapping[str, float]) -> Letter | Unsent | Open:
        """What to do with a report that is due. `Open`: the job turned out not to be over."""
        try:
            state = JobState.model_validate_json(job.state)
            judged = verdict(state, now=now, gone=gone, redelivery_wait_s=self.redelivery_wait_s)
            if isinstance(judged, Open):
                return judged
            report = judged.report
            digest = digest_of(report) if report is not None else b""
        except Exception as error:  # noqa: BLE001 - one job must not stop all others
            return Unsent(Fate.DEAD, reason=f"it cannot be read: {error!r}")
        if report is None:
            return Unsent(Fate.SETTLED, "unreported")
        if digest == job.digest:
            return Unsent(Fate.SETTLED, "unchanged")
        if now - job.since > self.max_age_s:
            return Unsent(Fate.DEAD, reason=f"waited for {self.max_age_s:g} s. Last: {job.reason or 'not tried'}")
        if job.trimmed:
            report = trimmed(report)
        if self.hook is not None:
            try:
                changed = self.hook(report)
            except Exception as error:  # noqa: BLE001 - a user's code may raise anything
                return Unsent(Fate.DEAD, reason=f"before_send failed: {error!r}")
            if changed is None:
                return Unsent(Fate.SETTLED, "withheld")
            report = changed
        return Letter(job, report, digest, judged.inferred)
