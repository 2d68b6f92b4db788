"""The jobs' own books, in Redis: which of them began, and which ended. Reporting has no part in them, so that whoever
wants to know whether a record is missing can compare."""

from __future__ import annotations

import functools
import os
import time
from typing import Any

from celery import Task
from redis import Redis

BEGUN = "ledger:begun"  # "name id" by time, as a sorted set
ENDED = "ledger:ended"  # "id state" by time
_KEPT_S = 86400.0


class LedgerTask(Task):
    """The base class of the stack's jobs: writes each one down before its body begins, and after it has ended."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        """Celery calls this in the pool process, before the body."""
        if _is_ours(self):
            _write(BEGUN, f"{self.name} {task_id}")

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Celery calls this in the pool process, after the body."""
        if _is_ours(self):
            _write(ENDED, f"{task_id} {status}")


def turn(name: str) -> int:
    """How many runs of a job there were, with this one."""
    return int(_redis().incr(f"ledger:turns:{name}"))


def _is_ours(task: Task) -> bool:
    return str(task.name).startswith("stack.")


def _write(key: str, entry: str) -> None:
    now = time.time()
    with _redis().pipeline(transaction=False) as pipeline:
        pipeline.zadd(key, {entry: now}, nx=True)
        pipeline.zremrangebyscore(key, 0, now - _KEPT_S)
        pipeline.execute()


@functools.cache
def _redis() -> Redis:
    return Redis.from_url(os.environ.get("LEDGER_URL", "redis://127.0.0.1:6379/2"))
