from dataclasses import replace

import pytest

from xpander_celery.demo.expectations import DemoError, Expected, check
from xpander_celery.demo.history import Record

SERVED = {"completion_tokens": 3, "prompt_tokens": 4, "cache_read_tokens": 1, "cache_write_tokens": 0}
AGENT = Record(
    id="1",
    task="demo.ask_agent",
    status="completed",
    is_success=True,
    duration=1.0,
    tokens={**SERVED, "total_tokens": 7},
    used_tools=["exchange_rate", "convert"],
    input="how many?",
    result="fifty",
    outcome="succeeded",
)
KILLED = replace(AGENT, id="2", task="demo.convert_video", outcome="lost", result="WorkerLostError: signal 9")
EXPECTED = [
    Expected("1", "demo.ask_agent", "succeeded", ""),
    Expected("2", "demo.convert_video", "lost", "WorkerLostError"),
]


def test_a_history_that_says_what_happened_passes() -> None:
    check(EXPECTED, [AGENT, KILLED], SERVED)


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        ([AGENT, replace(KILLED, outcome="failed")], "demo.convert_video ended failed"),
        ([AGENT, replace(KILLED, result="")], "not lost with 'WorkerLostError'"),
        ([replace(AGENT, tokens={**SERVED, "prompt_tokens": 8}), KILLED], "but the model served"),
        ([replace(AGENT, tokens=None), KILLED], "but the model served"),
        ([replace(AGENT, used_tools=["convert"]), KILLED], "recorded with the tools"),
    ],
)
def test_each_thing_that_is_amiss_is_said(records: list[Record], problem: str) -> None:
    with pytest.raises(DemoError, match=problem):
        check(EXPECTED, records, SERVED)


def test_a_real_model_may_count_and_do_what_it_likes() -> None:
    check(EXPECTED, [replace(AGENT, tokens=None, used_tools=[]), KILLED], None)
