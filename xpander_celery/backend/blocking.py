"""Run a coroutine to its end for a caller that cannot await, wherever that caller is: thread, loop or greenlet."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from typing import Any, TypeVar

_T = TypeVar("_T")

# Under eventlet, whose greenlets all share one system thread and thereby one running loop
_one_at_a_time = threading.Lock()


def run_blocking(begin: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """The result of the coroutine that `begin` makes.

    A thread can have one running loop. Where this one has it already, the coroutine runs in a new thread. Where threads
    are really greenlets it runs in a system thread of gevent's pool, so that other greenlets go on; eventlet's own
    thread pool breaks the locks that its threads share, so there one coroutine runs at a time. Context variables are
    those of the caller.
    """
    context = copy_context()

    def run() -> _T:
        return context.run(lambda: asyncio.run(begin()))

    if _patched_by("gevent", "gevent.monkey", "is_module_patched", "threading"):
        return sys.modules["gevent"].get_hub().threadpool.apply(run)  # type: ignore[no-any-return]
    if _patched_by("eventlet", "eventlet.patcher", "is_monkey_patched", "thread"):
        with _one_at_a_time:
            return run()
    if asyncio._get_running_loop() is None:
        return run()
    return _in_a_thread(run)


def _patched_by(library: str, module: str, question: str, answer: str) -> bool:
    """Whether a greenlet library that is already loaded has replaced threads."""
    return library in sys.modules and module in sys.modules and bool(getattr(sys.modules[module], question)(answer))


def _in_a_thread(run: Callable[[], _T]) -> _T:
    results: list[_T] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            results.append(run())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failures.append(error)

    thread = threading.Thread(target=body, name="xpander-celery-get-args", daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]
