import json
from dataclasses import replace
from typing import Any

import pytest

from xpander_celery.demo.history import Record
from xpander_celery.demo.screen import Screen

TASK: dict[str, Any] = {
    "id": "1",
    "agent_id": "agent-demo",
    "status": "completed",
    "input": {"text": "how many?"},
    "result": "fifty [bold]\nand more",
    "llm_response": {"celery": {"task": "demo.ask_agent", "outcome": "succeeded"}},
    "tokens": {"total_tokens": 1234},
    "is_success": True,
    "duration": 1.5,
    "used_tools": ["convert"],
}


def test_a_record_is_read_from_a_task_of_the_platform() -> None:
    record = Record.of(TASK)
    assert (record.task, record.outcome, record.input) == ("demo.ask_agent", "succeeded", "how many?")
    bare = Record.of({**TASK, "llm_response": None})
    assert (bare.task, bare.outcome) == ("", "completed")


def test_as_json_there_is_one_object_a_line_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(as_json=True)
    with screen.progress("Working", total=2) as advance:
        advance(2)
    screen.records([Record.of(TASK), replace(Record.of(TASK), id="2")], "http://x")
    out, err = capsys.readouterr()
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["1", "2"]
    assert list(json.loads(out.splitlines()[0])) == [
        *("id", "task", "status", "is_success", "duration", "tokens", "used_tools", "input", "result")
    ]
    assert err == ""


def test_the_table_has_what_matters_and_takes_nothing_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(as_json=False).records([Record.of(TASK)], "http://127.0.0.1:1")
    out = capsys.readouterr().out
    for word in ("ask_agent", "succeeded", "1.50 s", "1,234", "convert", "fifty [bold]", "http://127.0.0.1:1/"):
        assert word in out
    assert "and more" not in out


def test_a_problem_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(as_json=False).problem("no broker")
    assert capsys.readouterr() == ("", "demo: no broker\n")
