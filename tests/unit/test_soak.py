"""What the soak lets pass and what it does not: its judgement of one record by the ledger of its job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.kinds import KINDS, faults_of, struck_by
from tests.matrix.ledger import Attempt

BY_NAME = {kind.name: kind for kind in KINDS}
OVER = Attempt(7, 100.0, 101.0, tokens=10, spendings=1, is_over=True)
CUT = Attempt(8, 100.0, 100.5, tokens=10, spendings=1)


def record(outcome: str, tokens: int = 10, **more: Any) -> dict[str, Any]:
    return {
        "llm_response": {"celery": {"outcome": outcome}},
        "is_success": outcome in ("succeeded", "ignored"),
        "tokens": {"prompt_tokens": tokens} if tokens else None,
        "used_tools": ["search"] if tokens else [],
        **more,
    }


@pytest.mark.parametrize(
    ("kind", "attempts", "struck", "found", "posts"),
    [
        ("success", [OVER], [], record("succeeded"), 1),
        ("success", [OVER], [0], record("succeeded"), 1),
        ("success", [OVER], [0], record("lost"), 1),  # killed after its body, before it could say so
        ("success", [CUT], [0], record("lost"), 1),
        ("success", [CUT], [0], record("lost", 20), 1),  # it told of more than its ledger has
        ("success", [], [], record("lost", 0), 1),  # killed before its ledger had it
        ("success", [CUT, OVER], [0], record("succeeded", 20), 2),  # the pool put it back
        ("late, requeued", [CUT, OVER], [0], record("succeeded", 20), 1),
        ("retry, then success", [OVER, OVER], [], record("succeeded", 20), 1),
        ("retry, then success", [OVER], [], record("lost"), 1),
        ("retry, then success", [CUT, OVER], [0], record("succeeded", 20), 2),  # killed after its retry was published
        ("terminated", [replace(CUT, tokens=0, spendings=0)], [], record("revoked"), 1),
        ("kills its process", [OVER], [], record("lost"), 1),
        ("expired", [], [], record("expired", 0), 1),
    ],
)
def test_what_the_ledger_allows_passes(kind: str, attempts: Any, struck: Any, found: Any, posts: int) -> None:
    assert faults_of(BY_NAME[kind], attempts, struck, found, posts) == []


@pytest.mark.parametrize(
    ("kind", "attempts", "struck", "found", "posts", "fault"),
    [
        ("success", [OVER], [], None, 0, "no record"),
        ("success", [OVER], [], record("lost"), 1, "outcome is lost, not succeeded"),
        ("success", [CUT], [0], record("succeeded"), 1, "outcome is succeeded, not lost"),
        ("late, requeued", [CUT], [0], record("lost"), 1, "outcome is lost, not final"),
        ("retry, then success", [OVER], [], record("succeeded"), 1, "outcome is succeeded, not lost"),
        ("retried when lost", [CUT], [0], record("lost"), 1, "outcome is lost, not final"),
        ("success", [OVER], [], record("succeeded", is_success=False), 1, "succeeded, and is_success is False"),
        ("success", [OVER], [], record("succeeded", 20), 1, "tokens are 20, the ledger has 10"),
        ("success", [CUT], [0], record("lost", 0), 1, "tokens are 0, the ledger has 10"),
        ("success", [CUT, OVER], [0], record("succeeded", 10), 1, "tokens are 10, the ledger has 20"),
        ("success", [OVER], [], record("succeeded", used_tools=[]), 1, "tools are []"),
        ("success", [OVER], [], record("succeeded"), 2, "was sent 2 times"),
    ],
)
def test_what_it_does_not_allow_is_told(
    kind: str, attempts: Any, struck: Any, found: Any, posts: int, fault: str
) -> None:
    assert any(said.startswith(fault) for said in faults_of(BY_NAME[kind], attempts, struck, found, posts))


def test_a_kill_strikes_what_ran_or_ran_last_in_its_process() -> None:
    earlier = Attempt(7, 90.0, 91.0, is_over=True)
    outer, inner = Attempt(9, 100.0, 102.0, is_over=True), Attempt(9, 101.0, 101.5, is_over=True)
    ledgers = {"a": [earlier], "b": [OVER], "c": [CUT, OVER], "d": [outer], "e": [inner]}
    assert struck_by(ledgers, killed=[7, 8, 9]) == {"a": set(), "b": {0}, "c": {0, 1}, "d": {0}, "e": {0}}
    assert struck_by(ledgers, killed=[]) == {job_id: set() for job_id in ledgers}
