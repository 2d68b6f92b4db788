"""Compares what the platform has of a group's jobs with what is due, and with the ledgers that the jobs kept. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.matrix.cases import Record
from tests.matrix.ledger import Attempt

CLOCK_S = 0.1
SLACK_S = 9.0  # a parent hears of a death up to 5 s later


def outcome_in(record: Mapping[str, Any] | None) -> str:
    return "none" if record is None else str(((record["llm_response"] or {}).get("celery") or {}).get("outcome"))


def fewest_faults_of(
    due: Sequence[Record], record: Mapping[str, Any] | None, posts: int, attempts: Sequence[Attempt]
) -> list[str]:
    """Those of the record that fits best, where one of several is due."""
    return min((faults_of(each, record, posts, attempts) for each in due), key=len)


def faults_of(due: Record, record: Mapping[str, Any] | None, posts: int, attempts: Sequence[Attempt]) -> list[str]:
    """Everything about one job that is not as it is due, in words; nothing for a good one."""
    faults = []
    if posts not in due.posts:
        faults.append(f"was sent {posts} times")
    if len(attempts) != due.attempts:
        faults.append(f"ran {len(attempts)} times, not {due.attempts}")
    if due.is_absent or record is None:
        return faults if due.is_absent and record is None else [*faults, f"record is {outcome_in(record)}, not {due}"]
    if outcome_in(record) != due.outcome:
        faults.append(f"outcome is {outcome_in(record)}, not {due}")
    if record["is_success"] is not (due.outcome in ("succeeded", "ignored")):
        faults.append(f"is_success is {record['is_success']}")
    if due.text not in (record["result"] or ""):
        faults.append(f"result is {record['result']!r}, without {due.text!r}")
    return [*faults, *_faults_of_usage(record, attempts), *_faults_of_metadata(record, ran=bool(attempts))]


def _faults_of_usage(record: Mapping[str, Any], attempts: Sequence[Attempt]) -> list[str]:
    faults = []
    tokens = record["tokens"] or {}
    spent = sum(attempt.tokens for attempt in attempts), sum(attempt.spendings for attempt in attempts)
    found = tokens.get("prompt_tokens", 0), tokens.get("completion_tokens", 0)
    if found != spent:
        faults.append(f"tokens are {found}, the ledger has {spent}")
    if record["used_tools"] != (["search"] if spent[1] else []):
        faults.append(f"tools are {record['used_tools']}")
    lasted = sum(attempt.last_at - attempt.began_at for attempt in attempts)
    if not lasted - CLOCK_S <= record["duration"] <= lasted + SLACK_S:
        faults.append(f"duration is {record['duration']:.3f} s, the ledger has {lasted:.3f} s")
    return faults


def _faults_of_metadata(record: Mapping[str, Any], *, ran: bool) -> list[str]:
    celery = record["llm_response"]["celery"]
    wanted = ["task", "queue", "worker", "root_id", *(("trace_id", "queue_wait_s") if ran else ())]
    faults = [f"no {key} in {celery}" for key in wanted if celery.get(key) is None]
    if "[" not in (record["input"]["text"] or ""):  # all that a parent knows of an unknown task's may be abridged
        faults.append(f"input is {record['input']['text']!r}")
    return faults
