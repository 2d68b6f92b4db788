"""`job()`: any block of code as a job, outside Celery too."""

from __future__ import annotations

import traceback as tracebacks
import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType

from xpander_celery.recording.recording import NO_JOB, Job, Recording
from xpander_celery.report import Outcome


class JobBlock(AbstractContextManager[Job], AbstractAsyncContextManager[Job]):
    """A block that is recorded as one job, with `with` or `async with`. What it raises passes through.

    `begin(job_id)` gives the recording, or None where nothing is recorded. Used once.
    """

    def __init__(self, begin: Callable[[str], Recording | None], job_id: str | None) -> None:
        self._begin = begin
        self._job_id = job_id or str(uuid.uuid4())
        self._recording: Recording | None = None

    def __enter__(self) -> Job:
        self._recording = self._begin(self._job_id)
        if self._recording is None:
            return NO_JOB
        self._recording.begin()
        return self._recording

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        recording = self._recording
        if recording is None:
            return
        recording.leave()
        if error is None:
            recording.finish(Outcome.SUCCEEDED)
        else:
            lines = tracebacks.format_exception(error)
            recording.finish(Outcome.FAILED, error=error, traceback="".join(lines))

    async def __aenter__(self) -> Job:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)
