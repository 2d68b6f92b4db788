"""The request body is the platform's, byte for byte."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from xpander_celery.report import Outcome, TaskReport, Tokens


def test_all_eight_keys_are_present_in_the_platforms_order() -> None:
    assert TaskReport(agent_id="a").to_wire() == (
        b'{"id":null,"input":null,"llm_response":null,"tokens":null,"is_success":true,"result":null,'
        b'"duration":0.0,"used_tools":[]}'
    )


def test_tokens_have_five_keys_and_the_total_is_prompt_and_completion() -> None:
    report = TaskReport(agent_id="a", tokens=Tokens(completion_tokens=380, prompt_tokens=2140, cache_read_tokens=7))
    assert (
        b'"tokens":{"completion_tokens":380,"prompt_tokens":2140,"cache_read_tokens":7,"cache_write_tokens":0,'
        b'"total_tokens":2520}' in report.to_wire()
    )


def test_text_is_not_escaped_and_no_duration_breaks_the_json() -> None:
    report = TaskReport(agent_id="a", result="grüße", duration=float("nan"), used_tools=("search",))
    assert '"result":"grüße","duration":null,"used_tools":["search"]'.encode() in report.to_wire()


def test_tokens_add_up_and_refuse_negative_counts() -> None:
    total = Tokens(prompt_tokens=1, cache_read_tokens=2) + Tokens(prompt_tokens=3, completion_tokens=4)
    assert total == Tokens(prompt_tokens=4, completion_tokens=4, cache_read_tokens=2)
    assert not Tokens()
    with pytest.raises(ValidationError):
        Tokens(prompt_tokens=-1)


@pytest.mark.parametrize("outcome", Outcome)
def test_only_succeeded_and_ignored_are_successes(outcome: Outcome) -> None:
    assert outcome.is_success is (outcome in {"succeeded", "ignored"})
