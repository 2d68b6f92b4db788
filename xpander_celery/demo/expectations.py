"""How the demo's jobs are to end, and whether the history says so. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xpander_celery.demo.history import Record

_AGENT = "demo.ask_agent"
_TOOLS = ["convert", "exchange_rate"]


class DemoError(RuntimeError):
    """The demo did not show what it is to show; the message says what is amiss."""


@dataclass(frozen=True, slots=True)
class Expected:
    """A published job, and how it is to end: the outcome, and a word that its result holds."""

    id: str
    task: str
    outcome: str
    word: str


def check(expected: Sequence[Expected], records: Sequence[Record], served: dict[str, int] | None) -> None:
    """Raise `DemoError` with all that the history does not say as it was.

    `served` is what the scripted model counted; None where a real one answered, which may do without tools.
    """
    problems = [
        f"{job.task} ended {record.outcome} with {record.result!r}, not {job.outcome} with {job.word!r}"
        for job, record in zip(expected, records, strict=True)
        if record.outcome != job.outcome or job.word not in (record.result or "")
    ]
    if served is not None:
        for agent in (record for record in records if record.task == _AGENT):
            counted = {name: count for name, count in (agent.tokens or {}).items() if name != "total_tokens"}
            if counted != served:
                problems.append(f"{_AGENT} is recorded with {counted}, but the model served {served}")
            if sorted(agent.used_tools) != _TOOLS:
                problems.append(f"{_AGENT} is recorded with the tools {agent.used_tools}, but used {_TOOLS}")
    if problems:
        raise DemoError("\n  ".join(["The history does not say what happened:", *problems]))
