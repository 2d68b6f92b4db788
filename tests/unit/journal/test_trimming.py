"""Oversized and unencodable events: what is cut, in which order."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

from xpander_celery.events import decode
from xpander_celery.journal.segments import MAX_RECORD_BYTES
from xpander_celery.journal.trimming import fitted

MUCH = "é" * MAX_RECORD_BYTES


def finished(**more: Any) -> dict[str, Any]:
    return {
        "v": 1,
        "kind": "finished",
        "job_id": "j",
        "attempt_id": "a",
        "at": 1.0,
        "outcome": "succeeded",
        "duration_s": 1.0,
    } | more


def trimmed(event: dict[str, Any]) -> dict[str, Any]:
    text = fitted(event)
    assert text is not None
    assert len(text) <= MAX_RECORD_BYTES
    decode(text)
    found: dict[str, Any] = from_json(text)
    return found


def test_the_response_goes_first() -> None:
    found = trimmed(finished(llm_response={"text": MUCH}, result="r", input="i"))
    assert (found["result"], found["input"]) == ("r", "i")
    assert found["llm_response"].startswith('{"text":"é')
    assert len(found["llm_response"].encode()) <= 4096


def test_the_result_goes_next_and_says_that_it_was_cut() -> None:
    found = trimmed(finished(llm_response=MUCH, result=MUCH, input="i"))
    assert found["input"] == "i"
    assert str(2 * MAX_RECORD_BYTES) in found["result"].replace(",", "").replace(" ", "")


def test_the_inputs_tools_and_history_go_last() -> None:
    carried = {"job_id": "j", "attempt_id": "b", "used_tools": ["t" * 1000]}
    event = {"v": 1, "kind": "started", "job_id": "j", "attempt_id": "a", "at": 1.0, "child": "c", "owner": "o"}
    found = trimmed(event | {"facts": {"task": "t", "input": MUCH, "agent_id": "g"}, "carried": [carried] * 500})
    assert found["facts"]["agent_id"] == "g"
    assert len(found["facts"]["input"].encode()) <= 4096
    assert len(found["carried"]) == 100
    assert len(trimmed(finished(used_tools=[MUCH[:1000]] * 300))["used_tools"]) == 100


def test_what_decides_survives_even_absurd_events() -> None:
    found = trimmed(finished(used_tools=[MUCH], tokens={"prompt_tokens": 3}))
    assert (found["outcome"], found["tokens"]) == ("succeeded", {"prompt_tokens": 3})
    event = {"v": 1, "kind": "ended", "job_id": "j", "attempt_id": "a", "at": 1.0, "owner": "o", "outcome": "lost"}
    found = trimmed(event | {"facts": {"task": MUCH, "worker": MUCH, "agent_id": "g"}})
    assert found["facts"]["agent_id"] == "g"


def test_a_value_that_cannot_be_encoded_is_replaced_by_what_it_looks_like() -> None:
    assert "object" in trimmed(finished(result=object()))["result"]
    assert trimmed(finished(llm_response={"deep": object()}))["outcome"] == "succeeded"
    assert trimmed(finished(result="\ud800"))["outcome"] == "succeeded"


def test_the_event_of_the_caller_is_left_as_it_was() -> None:
    event = finished(result=MUCH)
    trimmed(event)
    assert event["result"] is MUCH
    assert fitted({"job_id": object()}) is None
