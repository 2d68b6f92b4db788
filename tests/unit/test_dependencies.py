"""The lower bounds that pyproject.toml promises are those that `make lowest` tests."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
UNTESTED = {
    "sdk": "the official client has an environment of its own: make contract",
    "embedded": "a server, which is no library",
    "bench": "for benchmarks alone",
    "dev": "tools that only developers meet",
}


def bounds_in(lines: list[str], sign: str) -> dict[str, str]:
    found = (re.fullmatch(rf"([\w.-]+)(?:\[[\w,-]+\])?{sign}([\d.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def test_every_lower_bound_is_one_that_is_tested() -> None:
    promised = bounds_in(PROJECT["dependencies"], ">=")
    for extra, requirements in EXTRAS.items():
        if extra not in UNTESTED:
            promised |= bounds_in(requirements, ">=")
    assert promised == bounds_in((ROOT / "tests/lowest/constraints.txt").read_text().splitlines(), "==")


def test_every_requirement_has_a_lower_bound() -> None:
    for requirements in (PROJECT["dependencies"], *EXTRAS.values()):
        for requirement in requirements:
            assert ">=" in requirement or requirement.startswith("xpander-celery["), requirement
