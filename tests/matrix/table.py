"""Outcomes as one Markdown table: cases x pools, versions named only where they differ. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.matrix.cases import CASES, POOLS, Case
from tests.matrix.environments import VERSIONS

INTRODUCTION = """\
# How each end of a job is recorded

`make matrix` provokes each of these ends on real workers, and passes when every job gave exactly one record with this
outcome (or none, where that is due), sent once, with the tokens, tools and duration that its own ledger has. A dash:
that pool has no such end.
"""


def documented() -> str:
    """What is due of every pool and version, as `docs/ends.md` has it."""
    outcomes = {
        (version, pool, case.name): due_of(case, version, pool)
        for case in CASES
        for version in VERSIONS
        for pool in POOLS
        if case.runs_on(version, pool)
    }
    notes = [f"{number}. {note}" for number, note in enumerate(_notes(), 1)]
    return "\n".join([INTRODUCTION, rendered(outcomes, VERSIONS, POOLS), *notes, ""])


def due_of(case: Case, version: str, pool: str) -> str:
    """The outcome that is due; several where Celery leaves it to chance."""
    return " or ".join(str(record) for record in case.due(version, pool))


def rendered(outcomes: Mapping[tuple[str, str, str], str], versions: Sequence[str], pools: Sequence[str]) -> str:
    """`outcomes` by (version, pool, case name)."""
    rows = [["end of the job", *pools]]
    notes = _notes()
    for case in CASES:
        cells = [_cell(outcomes, case, versions, pool) for pool in pools]
        if any(cell != "-" for cell in cells):
            since = f" (since {case.since})" if case.since > VERSIONS[0] else ""
            number = f" [{notes.index(case.note) + 1}]" if case.note else ""
            rows.append([f"{case.name}{since}{number}", *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([f"Celery {', '.join(versions)}.\n", *lines, ""])


def _notes() -> list[str]:
    return list(dict.fromkeys(case.note for case in CASES if case.note))


def _cell(outcomes: Mapping[tuple[str, str, str], str], case: Case, versions: Sequence[str], pool: str) -> str:
    seen: dict[str, list[str]] = {}
    for version in versions:
        outcome = outcomes.get((version, pool, case.name))
        if outcome is not None:
            seen.setdefault(outcome, []).append(version)
    if len(seen) < 2:
        return next(iter(seen), "-")
    return "; ".join(f"{', '.join(by)}: {outcome}" for outcome, by in seen.items())
