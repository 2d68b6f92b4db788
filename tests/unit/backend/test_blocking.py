"""A coroutine to its end, for a caller that cannot await."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from xpander_celery.backend.blocking import run_blocking

caller = contextvars.ContextVar("caller", default="nobody")


async def where() -> tuple[str, str]:
    await asyncio.sleep(0)
    return threading.current_thread().name, caller.get()


async def fail() -> None:
    raise ValueError("no")


def test_without_a_loop_it_runs_in_the_callers_thread_and_context() -> None:
    context = contextvars.copy_context()
    context.run(caller.set, "a job")
    assert context.run(run_blocking, where) == (threading.current_thread().name, "a job")


async def test_beside_a_running_loop_it_runs_in_another_thread() -> None:
    caller.set("a coroutine")
    thread, seen = run_blocking(where)
    assert thread != threading.current_thread().name
    assert seen == "a coroutine"


async def test_what_it_raises_is_raised_here() -> None:
    with pytest.raises(ValueError, match="no"):
        run_blocking(fail)


def test_under_gevent_it_runs_in_a_system_thread_of_gevents_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[Any] = []

    def apply(run: Any) -> Any:
        applied.append(run)
        return run()

    hub = SimpleNamespace(threadpool=SimpleNamespace(apply=apply))
    monkeypatch.setitem(sys.modules, "gevent", SimpleNamespace(get_hub=lambda: hub))
    patched = SimpleNamespace(is_module_patched=lambda name: name == "threading")
    monkeypatch.setitem(sys.modules, "gevent.monkey", patched)
    assert run_blocking(where)[1] == "nobody"
    assert len(applied) == 1


@pytest.mark.parametrize("patched", [True, False])
def test_a_library_that_is_loaded_but_patched_nothing_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, patched: bool
) -> None:
    monkeypatch.setitem(sys.modules, "eventlet", SimpleNamespace())
    asked = SimpleNamespace(is_monkey_patched=lambda name: patched and name == "thread")
    monkeypatch.setitem(sys.modules, "eventlet.patcher", asked)
    assert run_blocking(where)[0] == threading.current_thread().name
