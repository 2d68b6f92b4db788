import json
from typing import Any

import pytest

from xpander_celery.sandbox.contract import BodyError, ReportBody, read_body

TOKENS = {
    "completion_tokens": 380,
    "prompt_tokens": 2140,
    "cache_read_tokens": 0,
    "cache_write_tokens": 0,
    "total_tokens": 2520,
}
REPORT: dict[str, Any] = {
    "id": None,
    "input": None,
    "llm_response": None,
    "tokens": None,
    "is_success": True,
    "result": None,
    "duration": 0.0,
    "used_tools": [],
}


def read(**changes: Any) -> ReportBody:
    return read_body(ReportBody, json.dumps({**REPORT, **changes}).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokens": TOKENS},
        {"llm_response": {"celery": {"task": "a"}}},
        {"llm_response": [1, "two", None]},
        {"duration": 3, "used_tools": ["search", "calculate"], "is_success": False},
    ],
)
def test_a_body_of_the_contract_is_accepted(changes: dict[str, Any]) -> None:
    assert read(**changes).model_dump() == {**REPORT, **changes}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"id": 7}, "id"),
        ({"input": {"a": 1}}, "input"),
        ({"result": 12}, "result"),
        ({"is_success": "yes"}, "is_success"),
        ({"duration": None}, "duration"),
        ({"duration": -1.0}, "duration"),
        ({"duration": "3"}, "duration"),
        ({"used_tools": None}, "used_tools"),
        ({"used_tools": [3]}, "used_tools"),
        ({"tokens": {}}, "tokens"),
        ({"tokens": {**TOKENS, "total_tokens": 1}}, "tokens"),
        ({"tokens": {**TOKENS, "prompt_tokens": -1}}, "tokens"),
        ({"tokens": {**TOKENS, "prompt_tokens": "2140"}}, "tokens"),
        ({"agent_id": "a"}, "agent_id"),
    ],
)
def test_a_body_that_is_not_the_contracts_is_refused_by_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(BodyError) as refusal:
        read(**changes)
    assert {problem["loc"][1] for problem in refusal.value.detail} == {field}


@pytest.mark.parametrize("field", list(REPORT))
def test_a_missing_key_is_refused(field: str) -> None:
    body = {name: value for name, value in REPORT.items() if name != field}
    with pytest.raises(BodyError) as refusal:
        read_body(ReportBody, json.dumps(body).encode())
    assert refusal.value.detail == [{"loc": ["body", field], "msg": "Field required", "type": "missing"}]


@pytest.mark.parametrize("text", [b"", b"not json", b"[]", b'"text"', b'{"id": NaN}'])
def test_a_text_that_is_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(BodyError):
        read_body(ReportBody, text)
