"""The outcomes that were seen, as one Markdown table: cases x pools, versions named only where they differ. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.matrix.cases import CASES, Case

INTRODUCTION = """\
# How each end of a job is recorded

Seen on real workers by `make matrix`. Every job of this table gave exactly one record with this outcome (or none, where
that is what is due), with the tokens, tools and duration that its own ledger has. A dash: that pool or release of
Celery has no such end.
"""


def rendered(outcomes: Mapping[tuple[str, str, str], str], versions: Sequence[str], pools: Sequence[str]) -> str:
    """`outcomes` by (version, pool, case name)."""
    rows = [["end of the job", *pools]]
    for case in CASES:
        cells = [_cell(outcomes, case, versions, pool) for pool in pools]
        if any(cell != "-" for cell in cells):
            rows.append([case.name if case.since <= "5.4" else f"{case.name} (since {case.since})", *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([INTRODUCTION, f"Celery {', '.join(versions)}.\n", *lines, ""])


def _cell(outcomes: Mapping[tuple[str, str, str], str], case: Case, versions: Sequence[str], pool: str) -> str:
    seen: dict[str, list[str]] = {}
    for version in versions:
        outcome = outcomes.get((version, pool, case.name))
        if outcome is not None:
            seen.setdefault(outcome, []).append(version)
    if len(seen) < 2:
        return next(iter(seen), "-")
    return "; ".join(f"{', '.join(by)}: {outcome}" for outcome, by in seen.items())
