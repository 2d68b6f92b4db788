"""Which recording runs here: that of its thread and tasks, or of its whole process."""

from __future__ import annotations

import os
from contextvars import ContextVar
from typing import TYPE_CHECKING

from xpander_celery.recording.job import NO_JOB, Job

if TYPE_CHECKING:
    from xpander_celery.recording.recording import Recording

of_context: ContextVar[Recording | None] = ContextVar("xpander_celery.recording", default=None)


class OfProcess:
    """The job of this process, where it runs one at a time (a prefork child)."""

    job: Recording | None = None


def current_job() -> Job:
    """The job that runs here; outside a job an object that takes everything and does nothing, never None.

    Known in the job's thread, its tasks of asyncio and `asyncio.to_thread`, and in any other thread of a process that
    runs one job at a time (prefork). A thread of an executor in another pool does not know its job.
    """
    return running_recording() or NO_JOB


def running_recording() -> Recording | None:
    """The recording behind `current_job()`."""
    return of_context.get() or OfProcess.job


def _forget() -> None:
    """A process that a job forks is no part of the job: two of them would tell of one attempt."""
    of_context.set(None)
    OfProcess.job = None


os.register_at_fork(after_in_child=_forget)
