"""What a job itself wrote of its attempts (`Ledger` in `app.py`), which this package has no part in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Attempt:
    """One run of the body. `is_over`: it returned or raised, so it was not killed."""

    process: int
    began_at: float
    last_at: float
    tokens: int = 0
    spendings: int = 0
    is_over: bool = False


def attempts_in(ledger: Path) -> list[Attempt]:
    """The attempts of one job, oldest first; none where its body never began."""
    found: list[Attempt] = []
    for line in ledger.read_text().splitlines() if ledger.exists() else ():
        at, verb, *values = line.split()
        if verb == "began":
            found.append(Attempt(int(values[0]), float(at), float(at)))
        elif found and verb == "spent":
            last = found[-1]
            tokens, spendings = last.tokens + int(values[0]), last.spendings + 1
            found[-1] = replace(last, last_at=float(at), tokens=tokens, spendings=spendings)
        elif found and verb == "ended":
            found[-1] = replace(found[-1], last_at=float(at), is_over=True)
    return found
