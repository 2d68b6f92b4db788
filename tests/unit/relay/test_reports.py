from __future__ import annotations

from typing import Any

import pytest

from xpander_celery.relay.reports import digest_of, trimmed
from xpander_celery.report import TaskReport, Tokens

REPORT = TaskReport(agent_id="agent", id="a", input="in", result="out", llm_response={"celery": {"task": "t"}})


def test_equal_reports_have_equal_digests() -> None:
    assert digest_of(REPORT) == digest_of(REPORT.model_copy())


@pytest.mark.parametrize(
    "change",
    [
        {"agent_id": "other"},
        {"id": "b"},
        {"input": None},
        {"result": "else"},
        {"is_success": False},
        {"duration": 1.0},
        {"tokens": Tokens(prompt_tokens=1)},
        {"used_tools": ("search",)},
        {"llm_response": None},
    ],
)
def test_whatever_the_platform_would_record_otherwise_changes_the_digest(change: dict[str, Any]) -> None:
    assert digest_of(REPORT.model_copy(update=change)) != digest_of(REPORT)


def test_trimming_cuts_the_texts_and_drops_the_raw_response_but_keeps_what_counts() -> None:
    large = REPORT.model_copy(
        update={
            "input": "ä" * 9000,
            "result": "x" * 9000,
            "llm_response": {"celery": {"task": "t"}, "response": "y" * 9000},
            "tokens": Tokens(prompt_tokens=1),
        }
    )
    small = trimmed(large)
    assert len(small.to_wire()) < 10_000
    assert str(small.input).startswith("ä" * 2048 + "…")
    assert "18000 bytes" in str(small.input)
    assert small.llm_response == {"celery": {"task": "t"}, "response": None}
    assert (small.id, small.tokens) == (large.id, large.tokens)


def test_what_is_small_already_stays() -> None:
    assert trimmed(REPORT).result == "out"
    assert trimmed(REPORT.model_copy(update={"input": None})).input is None
