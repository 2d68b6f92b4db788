import json
from dataclasses import replace

import pytest

from xpander_celery.sandbox.model.script import Conversation, Tool, next_turn, orders

ADD = Tool("add", {"type": "object", "properties": {"a": {"type": "integer"}, "note": {"type": "string"}}})
SEARCH = Tool("search", {})
ASKED = Conversation(model="m", user_text="What is 2 plus 5?", size=600, tools=(ADD, SEARCH))


def test_the_first_turn_calls_each_offered_tool_once() -> None:
    turn = next_turn(ASKED)
    assert [call.name for call in turn.calls] == ["add", "search"]
    assert len({call.id for call in turn.calls}) == 2
    assert json.loads(turn.calls[0].arguments) == {"a": 2, "note": "What is 2 plus 5?"}
    assert turn.text == ""


def test_the_turn_after_the_tools_answers_with_what_they_said() -> None:
    turn = next_turn(replace(ASKED, called=("add", "search"), tool_results=("7", "nothing")))
    assert turn.calls == ()
    assert turn.text == "My tools said add: 7, search: nothing. You asked: What is 2 plus 5?"


def test_without_tools_the_first_turn_answers() -> None:
    assert next_turn(replace(ASKED, tools=())).text.endswith("What is 2 plus 5?")


def test_tools_are_called_one_by_one_when_ordered() -> None:
    asked = replace(ASKED, user_text="Add 2. [one by one]")
    second = replace(asked, called=("add",), tool_results=("7",))
    third = replace(asked, called=("add", "search"), tool_results=("7", "x"))
    names = [[call.name for call in next_turn(each).calls] for each in (asked, second, third)]
    assert names == [["add"], ["search"], []]


def test_tools_are_left_alone_when_ordered() -> None:
    turn = next_turn(replace(ASKED, user_text="Just say hello [no tools]"))
    assert (turn.calls, turn.text) == ((), "The scripted model has no tools to ask about: Just say hello")


def test_a_structured_answer_fits_its_schema() -> None:
    schema = {"type": "object", "properties": {"title": {"type": "string"}, "n": {"type": "integer"}}}
    turn = next_turn(replace(ASKED, tools=(), answer_schema=schema))
    assert json.loads(turn.text) == {"title": "What is 2 plus 5?", "n": 2}


def test_the_same_conversation_gives_the_same_turn_and_another_seed_other_counts() -> None:
    assert next_turn(ASKED) == next_turn(ASKED)
    assert len({next_turn(replace(ASKED, seed=seed)).usage for seed in range(10)}) > 3


@pytest.mark.parametrize("size", [0, 100, 5_000, 100_000])
@pytest.mark.parametrize("seed", range(8))
def test_counts_are_positive_and_the_cached_ones_within_the_prompt(size: int, seed: int) -> None:
    for conversation in (replace(ASKED, size=size, seed=seed), replace(ASKED, size=size, seed=seed, called=("add",))):
        usage = next_turn(conversation).usage
        assert usage.prompt > 0
        assert usage.completion > 0
        assert min(usage.cache_read, usage.cache_write) >= 0
        assert usage.cache_read + usage.cache_write < usage.prompt


def test_the_turns_after_tool_calls_read_from_the_cache() -> None:
    assert all(next_turn(replace(ASKED, seed=seed, called=("add",))).usage.cache_read > 0 for seed in range(8))


def test_orders_are_read_from_the_users_text() -> None:
    assert orders(ASKED) == orders(replace(ASKED, user_text="the error 500 was slow"))
    ordered = orders(replace(ASKED, user_text="Go [error 429] and [slow 0.5]"))
    assert (ordered.error_status, ordered.delay_s) == (429, 0.5)
