"""Events survive their encoding; what is no event, or too new, is refused with what it is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpander_celery.events import (
    VERSION,
    CarriedAttempt,
    Ended,
    Finished,
    Progress,
    Started,
    UnreadableEventError,
    attempt_id_of,
    carry,
    decode,
    encode,
    request_id_of,
)
from xpander_celery.report import Outcome, Tokens

COMMON = {"v": VERSION, "job_id": "j", "attempt_id": "a", "at": 1.5}
FACTS = {"task": "t", "agent_id": "agent", "input": "grüße\nzwei"}


@pytest.mark.parametrize(
    ("written", "model"),
    [
        ({"kind": "started", "child": "c", "owner": "o", "facts": FACTS}, Started),
        ({"kind": "progress", "tokens": {"prompt_tokens": 3}, "used_tools": ["x"]}, Progress),
        ({"kind": "finished", "outcome": "succeeded", "duration_s": 0.5, "llm_response": {"a": [1]}}, Finished),
        ({"kind": "ended", "owner": "o", "outcome": "lost", "facts": FACTS}, Ended),
    ],
)
def test_an_event_is_read_as_it_was_written(written: dict[str, Any], model: type) -> None:
    event = decode(encode({**COMMON, **written}))
    assert type(event) is model
    assert event.model_dump(mode="json", exclude_unset=True) == {**COMMON, **written}


def test_one_event_is_one_line() -> None:
    assert b"\n" not in encode({**COMMON, "kind": "started", "child": "c", "owner": "o", "facts": FACTS})


def test_unknown_fields_of_a_later_release_are_passed_over() -> None:
    event = decode(encode({**COMMON, "kind": "finished", "outcome": "failed", "duration_s": 1, "mood": "good"}))
    assert isinstance(event, Finished)
    assert event.outcome is Outcome.FAILED
    assert event.tokens == Tokens()


def test_a_newer_version_is_refused_by_its_number() -> None:
    with pytest.raises(UnreadableEventError) as caught:
        decode(encode({**COMMON, "v": VERSION + 1, "kind": "progress"}))
    assert caught.value.version == VERSION + 1


@given(st.binary())
def test_anything_else_is_refused_and_never_crashes(text: bytes) -> None:
    with pytest.raises(UnreadableEventError):
        decode(text)


def carried(number: int, **more: Any) -> CarriedAttempt:
    tokens = Tokens(prompt_tokens=number)
    return CarriedAttempt(job_id="j", attempt_id=f"a{number}", tokens=tokens, duration_s=1.0, used_tools=("t",), **more)


def test_a_retry_carries_what_it_was_given_and_its_own_attempt() -> None:
    assert carry((carried(1),), carried(2)) == (carried(1), carried(2))


def test_a_retry_drops_what_another_job_carried() -> None:
    foreign = CarriedAttempt(job_id="other", attempt_id="x")
    assert carry((foreign,), carried(1)) == (carried(1),)


def test_a_message_of_any_history_stays_small_enough_for_every_broker() -> None:
    tools = tuple(f"fetch https://shop.example/items/{number}" for number in range(1000))
    history: tuple[CarriedAttempt, ...] = ()
    for number in range(40):
        own = carried(number).model_copy(update={"used_tools": tools})
        history = carry(history, own)
        assert sum(len(tool) for entry in history for tool in entry.used_tools) <= 16 * 1024
    assert history[0].used_tools[:2] == tools[:2]
    assert sum(entry.tokens.prompt_tokens for entry in history) == sum(range(40))


def test_a_long_history_is_merged_from_its_oldest_end() -> None:
    history: tuple[CarriedAttempt, ...] = ()
    for number in range(1, 8):
        history = carry(history, carried(number), limit=3)
    merged = CarriedAttempt(
        job_id="j",
        attempt_id="a5",
        attempts=5,
        tokens=Tokens(prompt_tokens=15),
        duration_s=5.0,
        used_tools=("t",),
    )
    assert history == (merged, carried(6), carried(7))


def test_the_attempts_at_one_request_differ_by_the_child_that_made_them() -> None:
    first, second = attempt_id_of("parent-1f", "child-1"), attempt_id_of("parent-1f", "child-2")
    assert first != second
    assert request_id_of(first) == request_id_of(second) == request_id_of("parent-1f") == "parent-1f"


@pytest.mark.parametrize("at", ["NaN", "Infinity", "-Infinity", '"NaN"'])
def test_an_event_without_a_time_is_refused(at: str) -> None:
    text = f'{{"kind":"progress","v":1,"job_id":"a","attempt_id":"1","at":{at}}}'
    with pytest.raises(UnreadableEventError):
        decode(text.encode())


@pytest.mark.parametrize("process_id", ["", "a\0b", "../a", "a b", "a" * 101])
def test_an_event_of_a_process_that_can_have_no_file_is_refused(process_id: str) -> None:
    event = {"kind": "started", "v": 1, "job_id": "a", "attempt_id": "1", "at": 1.0, "facts": {"task": "t"}}
    assert decode(encode({**event, "child": "0123456789abcdef", "owner": "worker-1"}))
    with pytest.raises(UnreadableEventError):
        decode(encode({**event, "child": process_id, "owner": process_id}))
