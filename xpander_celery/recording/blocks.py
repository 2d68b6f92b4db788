"""`job()`: any block of code as a job, outside Celery too."""

from __future__ import annotations

import logging
import traceback as tracebacks
import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, ClassVar

from xpander_celery.recording.contained import Failures, pass_limit
from xpander_celery.recording.current import running_recording
from xpander_celery.recording.job import NO_JOB, Job
from xpander_celery.recording.recording import Recording
from xpander_celery.report import Outcome

logger = logging.getLogger(__name__)


class JobBlock(AbstractContextManager[Job], AbstractAsyncContextManager[Job]):
    """A block that is recorded as one job, with `with` or `async with`. What it raises passes through, and nothing
    else: where recording fails, the block runs unrecorded.

    `begin(job_id)` gives the recording, or None where nothing is recorded. Used once.
    """

    failures: ClassVar[Failures] = Failures(logger)

    def __init__(self, begin: Callable[[str], Recording | None], job_id: Any) -> None:
        self._begin = begin
        self._job_id = ("" if job_id is None else str(job_id)) or str(uuid.uuid4())
        self._recording: Recording | None = None

    def __enter__(self) -> Job:
        recording = None
        try:
            recording = self._begin(self._job_id)
            if recording is None:
                return NO_JOB
            recording.begin()
        except Exception as failure:  # noqa: BLE001 - ours; the block is the user's
            pass_limit(failure)
            self._note("block_not_begun", "job() could not begin to record; the block goes on without it")
            if recording is None or running_recording() is not recording:
                return NO_JOB
        self._recording = recording
        return recording

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._recording is None:
            return
        try:
            self._end(self._recording, error)
        except Exception as failure:  # noqa: BLE001 - ours; the block is the user's
            pass_limit(failure)
            self._note("block_not_ended", "job() could not record its end")

    async def __aenter__(self) -> Job:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def _end(self, recording: Recording, error: BaseException | None) -> None:
        recording.leave()
        if error is None:
            recording.finish(Outcome.SUCCEEDED)
        else:
            recording.finish(Outcome.FAILED, error=error, traceback=_traceback_of(error))

    def _note(self, event: str, message: str) -> None:
        self.failures.note(event, message, job_id=self._job_id)


def _traceback_of(error: BaseException) -> str | None:
    try:
        return "".join(tracebacks.format_exception(error))
    except Exception as failure:  # noqa: BLE001 - it reads the user's exception
        pass_limit(failure)
        return None
