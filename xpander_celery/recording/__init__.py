"""What is gathered of a job while it runs: spans, usage, and what the job itself says. Layer 2; knows no Celery."""

from __future__ import annotations

from xpander_celery.recording.current import current_job
from xpander_celery.recording.job import Job
from xpander_celery.recording.tools import tool_call

__all__ = ["Job", "current_job", "tool_call"]
