"""The kinds of jobs of the soak, and which records their ledgers allow. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.matrix.cases import SPEND, Script
from tests.matrix.judge import outcome_in
from tests.matrix.ledger import Attempt

LOST = "lost"
_SPENT_AT_ONCE = 10  # of SPEND: what an attempt may have told that its ledger does not have yet


@dataclass(frozen=True)
class Kind:
    """`runs`: how often the body must come to its end for `outcome`; 0 where it ends in none or does not begin.

    `lives`: the killed attempt that is the last one, where a job comes back after that.
    """

    name: str
    script: Script
    outcome: str
    weight: int
    runs: int = 1
    task: str = "plain"
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    lives: int = 1
    is_terminated: bool = False

    @property
    def begins(self) -> bool:
        """Whether its body is ever entered."""
        return "." not in self.task and "expires" not in self.options


_FOR_EVER = 1_000_000

KINDS = (
    Kind("success", [[SPEND, ["sleep", 0.03]]], "succeeded", 32),
    Kind("long success", [[SPEND, ["sleep", 1], SPEND]], "succeeded", 6),
    Kind("failure", [[SPEND, ["fail", "no such thing"]]], "failed", 8),
    Kind("unencodable result", [[SPEND, ["return", "an object"]]], "failed", 2),
    Kind("Ignore", [[SPEND, ["ignore"]]], "ignored", 4),
    Kind("Reject", [[SPEND, ["reject", False]]], "rejected", 3, task="late"),
    Kind("retry, then success", [[SPEND, ["retry", 0]], [SPEND]], "succeeded", 8, runs=2),
    Kind("autoretry, then failure", [[SPEND, ["outage"]]], "failed", 4, runs=3, task="autoretry"),
    Kind("replaced by a task", [[SPEND, ["replace", "task"]], [SPEND]], "succeeded", 4, runs=2),
    Kind("late", [[SPEND, ["sleep", 0.1]]], "succeeded", 6, task="late"),
    Kind("late, requeued", [[SPEND, ["sleep", 0.2]]], "succeeded", 8, task="late_requeued", lives=_FOR_EVER),
    Kind("retried when lost", [[SPEND, ["sleep", 0.2]]], "succeeded", 4, task="retried_when_lost", lives=3),
    Kind("calls another eagerly", [[SPEND, ["eager"], ["sleep", 0.05]]], "succeeded", 4),
    Kind("soft limit", [[SPEND, ["sleep", 10]]], "failed", 1, options={"soft_time_limit": 1}),
    Kind("hard limit", [[SPEND, ["sleep", 10]]], "timed_out", 2, runs=0, options={"time_limit": 1}),
    Kind("kills its process", [[SPEND, ["leave", "SIGKILL"]]], LOST, 1, runs=0),
    Kind("leaves its process", [[SPEND, ["leave", "os._exit"]]], LOST, 1, runs=0),
    Kind("terminated", [[SPEND, ["sleep", 60]]], "revoked", 1, runs=0, is_terminated=True),
    Kind("expired", [[SPEND]], "expired", 2, runs=0, options={"expires": -60}),
    Kind("unknown task", [[SPEND]], "failed", 1, runs=0, task="no.such.task"),
)
INNER = Kind("called eagerly", [], "succeeded", 0)


def struck_by(ledgers: Mapping[str, Sequence[Attempt]], killed: Collection[int]) -> dict[str, set[int]]:
    """Which attempts of each job a kill may have hit: those that did not come to their end in a process that was
    killed, and what ran there last, which may not have told of its end.
    """
    last: dict[int, float] = {}
    for attempts in ledgers.values():
        for attempt in attempts:
            last[attempt.process] = max(last.get(attempt.process, 0.0), attempt.began_at)
    # what called another job within itself was still there when that one began
    return {
        job_id: {
            number
            for number, attempt in enumerate(attempts)
            if attempt.process in killed and not (attempt.is_over and attempt.last_at < last[attempt.process])
        }
        for job_id, attempts in ledgers.items()
    }


def allowed(kind: Kind, attempts: Sequence[Attempt], struck: Collection[int]) -> set[str]:
    """The outcomes that a record may have."""
    if not kind.begins:
        return {kind.outcome}
    is_struck = not attempts or len(attempts) - 1 in struck
    if not kind.runs:
        return {kind.outcome, LOST} if is_struck else {kind.outcome}
    # what was killed may have published its next attempt before, so the last one decides
    is_through = len(attempts) >= kind.runs and attempts[-1].is_over
    outcomes = {kind.outcome} if is_through else set()
    # an attempt may be killed before its ledger has it: then the job did not come as far as it should
    if (is_struck or not outcomes) and len(attempts) + 1 >= kind.lives:
        outcomes.add(LOST)
    return outcomes


def faults_of(
    kind: Kind, attempts: Sequence[Attempt], struck: Collection[int], record: Mapping[str, Any] | None, posts: int
) -> list[str]:
    """Everything about one job that its ledger does not allow, in words."""
    if record is None:
        return ["no record"]
    faults = []
    outcome, outcomes = outcome_in(record), allowed(kind, attempts, struck)
    if outcome not in outcomes:
        faults.append(f"outcome is {outcome}, not {' or '.join(sorted(outcomes)) or 'final'}")
    if record["is_success"] is not (outcome in ("succeeded", "ignored")):
        faults.append(f"{outcome}, and is_success is {record['is_success']}")
    is_cut = kind.begins and sum(attempt.is_over for attempt in attempts) < max(kind.runs, not attempts)
    unseen = len(struck) + is_cut + kind.is_terminated
    spent = sum(attempt.tokens for attempt in attempts)
    tokens = (record["tokens"] or {}).get("prompt_tokens", 0)
    if not spent <= tokens <= spent + _SPENT_AT_ONCE * unseen:
        faults.append(f"tokens are {tokens}, the ledger has {spent}, {unseen} attempts were struck")
    if spent and record["used_tools"] != ["search"]:
        faults.append(f"tools are {record['used_tools']}")
    if not 1 <= posts <= 1 + unseen:
        faults.append(f"was sent {posts} times, {unseen} of {len(attempts)} attempts were struck")
    return faults
