"""Blocks: whatever fails in recording one, the block runs and its own exception passes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from xpander_celery.recording import blocks, current_job
from xpander_celery.recording.blocks import JobBlock
from xpander_celery.recording.job import NO_JOB
from xpander_celery.recording.recording import Recorder, Recording

Begin = Callable[[str], Recording | None]


def recorded(events: list[dict[str, Any]]) -> Begin:
    recorder = Recorder(emit=events.append)

    def begin(job_id: str) -> Recording:
        return Recording(recorder, job_id=job_id, attempt_id="a", child="p", owner="p", facts={"task": "digest"})

    return begin


def refused(job_id: str) -> Recording | None:
    raise FileNotFoundError("the working directory is gone")


def test_a_block_that_cannot_be_recorded_runs_all_the_same() -> None:
    with JobBlock(refused, None) as job:
        job.result = "done"
    assert job is NO_JOB
    assert current_job() is NO_JOB


def test_the_exception_of_a_block_that_is_not_recorded_passes_through() -> None:
    with pytest.raises(KeyError, match="mine"), JobBlock(refused, None):
        raise KeyError("mine")


def test_a_block_whose_end_cannot_be_recorded_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(Recording, "finish", fail)
    with JobBlock(recorded([]), "job"):
        pass
    with pytest.raises(KeyError, match="mine"), JobBlock(recorded([]), "job"):
        raise KeyError("mine")
    assert current_job() is NO_JOB


def test_an_exception_that_cannot_be_shown_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise LookupError("notes")

    events: list[dict[str, Any]] = []
    monkeypatch.setattr(blocks, "tracebacks", SimpleNamespace(format_exception=fail))
    with pytest.raises(ValueError, match="no"), JobBlock(recorded(events), "job"):
        raise ValueError("no")
    assert [(event["kind"], event.get("result")) for event in events][1:] == [("finished", "ValueError: no")]


@pytest.mark.parametrize(("given", "job_id"), [(77, "77"), (0, "0"), ("job", "job")])
def test_any_id_is_text(given: Any, job_id: str) -> None:
    with JobBlock(recorded([]), given) as job:
        assert job.id == job_id


@pytest.mark.parametrize("given", [None, ""])
def test_without_an_id_a_block_has_a_new_one(given: Any) -> None:
    with JobBlock(recorded([]), given) as one, JobBlock(recorded([]), given) as other:
        assert one.id
        assert one.id != other.id
