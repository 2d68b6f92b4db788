"""How the pages word a record's values: numbers, times, outcomes. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from xpander_celery.sandbox.store import Record

_TONES = {
    "completed": "good",
    "error": "bad",
    "failed": "bad",
    "stopped": "odd",
    "paused": "odd",
    "pending": "busy",
    "executing": "busy",
}
_EXCERPT = 160


def celery_facts(record: Record) -> dict[str, Any]:
    """What the reporter told of the Celery job, empty for a record of another origin."""
    response = record.llm_response
    facts = response.get("celery") if isinstance(response, dict) else None
    return facts if isinstance(facts, dict) else {}


def fact(name: str) -> str:
    """The name of such a fact for people."""
    return f"{name[:-2].replace('_', ' ')} (seconds)" if name.endswith("_s") else name.replace("_", " ")


def outcome(record: Record) -> str:
    """The outcome of the job where it is known, else the status of the task."""
    told = celery_facts(record).get("outcome")
    return (told if isinstance(told, str) else record.status).replace("_", " ")


def tone(record: Record) -> str:
    """The colour group of a record's status."""
    return _TONES.get(record.status, "odd")


def name(record: Record) -> str:
    """What to call a record: its task, or the first words of what was asked."""
    return record.title or excerpt(record.input) or record.id


def excerpt(text: str | None) -> str:
    """The beginning of a text on one line."""
    line = " ".join((text or "")[: _EXCERPT * 4].split())
    return line if len(line) <= _EXCERPT else f"{line[:_EXCERPT]}…"


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return "—"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def count(number: int) -> str:
    """A number with its thousands apart."""
    return f"{number:,}"


def tokens(counts: dict[str, int] | None) -> str:
    """The total of a record's tokens."""
    return count(counts["total_tokens"]) if counts and any(counts.values()) else "—"


def instant(seconds: float) -> str:
    """A time as text that a browser and a person can read."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
