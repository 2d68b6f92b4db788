from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from xpander_celery.relay.inflight import FILE, InFlight


def test_nobody_is_suspected_at_first_nor_after_a_clear(tmp_path: Path) -> None:
    marks = InFlight(tmp_path, 2)
    assert marks.suspects == []
    marks.mark(1, 42)
    marks.clear(1)
    marks.close()
    assert InFlight(tmp_path, 2).suspects == []


def test_marks_survive_a_kill_and_accuse_once(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib, signal; from xpander_celery.relay.inflight import InFlight;"
        "marks = InFlight(pathlib.Path(sys.argv[1]), 3); marks.mark(0, 7); marks.mark(2, 2**40); marks.mark(1, 5);"
        "marks.clear(1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert InFlight(tmp_path, 3).suspects == [7, 2**40]
    assert InFlight(tmp_path, 3).suspects == []


def test_the_number_of_workers_may_change(tmp_path: Path) -> None:
    marks = InFlight(tmp_path, 4)
    marks.mark(3, 9)
    marks.close()
    fewer = InFlight(tmp_path, 1)
    assert fewer.suspects == [9]
    fewer.mark(0, 1)
    fewer.close()
    assert InFlight(tmp_path, 8).suspects == [1]


def test_garbage_accuses_nobody(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\xff" * 11)
    assert InFlight(tmp_path, 2).suspects == []


def marks_of(marks: InFlight) -> tuple[int, ...]:
    return tuple(int.from_bytes(marks._map[at : at + 8], sys.byteorder, signed=True) for at in (0, 8))


async def test_a_mark_says_whether_code_runs_or_waits(tmp_path: Path) -> None:
    marks = InFlight(tmp_path, 2)
    seen: list[tuple[int, ...]] = []
    answered = asyncio.get_running_loop().create_future()

    async def work() -> str:
        seen.append(marks_of(marks))
        text = await answered
        seen.append(marks_of(marks))
        await asyncio.sleep(0)
        return str(text)

    task = asyncio.create_task(_awaited(marks, work()))
    await asyncio.sleep(0)
    assert marks_of(marks) == (0, -9)
    answered.set_result("done")
    assert await task == "done"
    assert seen == [(0, 9), (0, 9)]


async def test_what_waits_when_the_process_dies_is_unanswered_and_not_suspected(tmp_path: Path) -> None:
    marks = InFlight(tmp_path, 2)
    task = asyncio.create_task(_awaited(marks, asyncio.sleep(60)))
    await asyncio.sleep(0)
    left = (tmp_path / FILE).read_bytes()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (tmp_path / FILE).write_bytes(left)
    after = InFlight(tmp_path, 2)
    assert (after.suspects, after.unanswered) == ([], [9])


async def test_errors_and_cancellations_pass_both_ways(tmp_path: Path) -> None:
    marks = InFlight(tmp_path, 2)
    told: list[str] = []

    async def stubborn() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            told.append("cancelled")
        raise KeyError("x")

    task = asyncio.create_task(_awaited(marks, stubborn()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(KeyError):
        await task
    assert told == ["cancelled"]

    async def in_time() -> None:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        await _awaited(marks, in_time())


async def _awaited(marks: InFlight, work: Coroutine[Any, Any, Any]) -> Any:
    return await marks.watching(1, 9, work)
