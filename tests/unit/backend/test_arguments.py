"""What a caller passes, as what the platform takes."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import math
import sys
from collections import deque
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from xpander_celery.backend.arguments import agent_of, report_of, segment
from xpander_celery.errors import InvalidValueError
from xpander_celery.report import Tokens


class Hostile:
    """Every way to look at it raises."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("hostile")

    def __bool__(self) -> bool:
        raise RuntimeError("hostile")

    def __repr__(self) -> str:
        raise RuntimeError("hostile")

    def __len__(self) -> int:
        raise RuntimeError("hostile")

    def __iter__(self) -> Any:
        raise RuntimeError("hostile")

    def __contains__(self, item: object) -> bool:
        raise RuntimeError("hostile")

    def __float__(self) -> float:
        raise RuntimeError("hostile")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("hostile")

    __hash__ = None  # type: ignore[assignment]


class HostileDict(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("hostile")

    def get(self, key: str, default: Any = None) -> Any:
        raise RuntimeError("hostile")


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    y: float


class Model(BaseModel):
    name: str


def wire(**arguments: Any) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(report_of(agent_id="a", **arguments).to_wire())
    return body


def cycle() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        ("text ü", "text ü"),
        ("", ""),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        (5, "5"),
        (True, "true"),
        (Model(name="n"), '{"name":"n"}'),
        (Point(1, 0.5), '{"x":1,"y":0.5}'),
        (ValueError("bad"), "ValueError: bad"),
        (b"bytes", "bytes"),
        (b"\xff\xfe", "//4="),
        ("\ud800", "?"),
        (Colour.RED, "red"),
        (float("nan"), "nan"),
    ],
)
@pytest.mark.parametrize("field", ["input", "result"])
def test_free_text_is_kept_and_other_values_rendered(field: str, value: Any, text: str | None) -> None:
    assert wire(**{field: value})[field] == text


@pytest.mark.parametrize(
    "value",
    [
        {"id": "r1", "choices": [{"message": {"content": "ü", "tool_calls": None}}], "usage": {"total": 3.5}},
        [1, "two", None, True],
        "text",
        0,
        False,
        {},
        nested(200),
    ],
)
def test_a_response_that_json_can_hold_is_sent_verbatim(value: Any) -> None:
    assert wire(llm_response=value)["llm_response"] == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"when": datetime(2026, 1, 2, tzinfo=UTC)}, {"when": "2026-01-02T00:00:00+00:00"}),
        (Model(name="n"), {"name": "n"}),
        ({"error": ValueError("bad")}, {"error": "ValueError: bad"}),
        (cycle(), ["<circular reference>"]),
        ({"raw": b"\xff"}, {"raw": "/w=="}),
        ({"text": "\ud800"}, {"text": "?"}),
        ({"loss": float("nan")}, {"loss": "nan"}),
        ({1: "integer key"}, {"1": "integer key"}),
        ({"set": {3}}, {"set": [3]}),
    ],
)
def test_a_response_that_json_cannot_hold_is_rendered(value: Any, expected: Any) -> None:
    assert wire(llm_response=value)["llm_response"] == expected


def test_a_response_nested_too_deep_arrives_cut() -> None:
    assert "nested too deep" in json.dumps(wire(llm_response=nested(100_000))["llm_response"])


@pytest.mark.parametrize(
    "given_tokens",
    [
        Tokens(completion_tokens=380, prompt_tokens=2140),
        SimpleNamespace(completion_tokens=380, prompt_tokens=2140, cache_read_tokens=0, cache_write_tokens=None),
        {"completion_tokens": 380, "prompt_tokens": 2140, "total_tokens": 1, "other": "ignored"},
        {"completion_tokens": 380.0, "prompt_tokens": "2140"},
        {"completion_tokens": Decimal(380), "prompt_tokens": 2140},
    ],
)
def test_tokens_come_from_any_object_with_the_platforms_names(given_tokens: Any) -> None:
    assert list(wire(tokens=given_tokens)["tokens"].items()) == [
        ("completion_tokens", 380),
        ("prompt_tokens", 2140),
        ("cache_read_tokens", 0),
        ("cache_write_tokens", 0),
        ("total_tokens", 2520),
    ]


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("id", {"id": {"no": "id"}}),
        ("id", {"id": ""}),
        ("id", {"id": "  "}),
        ("id", {"id": "\ud800"}),
        ("id", {"id": True}),
        ("id", {"id": 1.5}),
        ("id", {"id": 10**5000}),
        ("tokens", {"tokens": 5}),
        ("tokens", {"tokens": "many"}),
        ("tokens", {"tokens": {"total": 5}}),
        ("tokens", {"tokens": Hostile()}),
        ("tokens", {"tokens": HostileDict()}),
        ("tokens.prompt_tokens", {"tokens": {"prompt_tokens": -1}}),
        ("tokens.prompt_tokens", {"tokens": {"prompt_tokens": 1.5}}),
        ("tokens.prompt_tokens", {"tokens": {"prompt_tokens": 2**63}}),
        ("tokens.prompt_tokens", {"tokens": {"prompt_tokens": "two"}}),
        ("tokens.prompt_tokens", {"tokens": {"prompt_tokens": float("nan")}}),
        ("tokens.cache_read_tokens", {"tokens": {"prompt_tokens": 1, "cache_read_tokens": Hostile()}}),
        ("is_success", {"is_success": None}),
        ("is_success", {"is_success": "yes"}),
        ("is_success", {"is_success": 1}),
        ("is_success", {"is_success": Hostile()}),
        ("duration", {"duration": float("nan")}),
        ("duration", {"duration": float("inf")}),
        ("duration", {"duration": "soon"}),
        ("duration", {"duration": 10**400}),
        ("duration", {"duration": Hostile()}),
        ("duration", {"duration": [1]}),
        ("used_tools", {"used_tools": 5}),
        ("used_tools", {"used_tools": {"search": 1}}),
        ("used_tools", {"used_tools": b"search"}),
        ("used_tools", {"used_tools": iter(["search"])}),
        ("used_tools", {"used_tools": Hostile()}),
        ("agent_id", {"agent_id": None}),
        ("agent_id", {"agent_id": Hostile()}),
        ("agent_id", {"agent_id": ["a"]}),
    ],
)
def test_what_cannot_be_meant_is_refused_naming_the_field(field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError, match=f"^{field}: ") as caught:
        report_of(**{"agent_id": "a", **arguments})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(0, 0.0), (3, 3.0), (1.25, 1.25), (timedelta(minutes=1), 60.0), ("2.5", 2.5), (Decimal("0.1"), 0.1), (None, 0.0)],
)
def test_durations_are_seconds(value: Any, seconds: float) -> None:
    assert wire(duration=value)["duration"] == seconds


@pytest.mark.parametrize("value", ["ext-job-9921", UUID(int=7), 42])
def test_ids_are_texts_uuids_and_whole_numbers(value: Any) -> None:
    assert wire(id=value)["id"] == str(value)


def search() -> None: ...


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, []),
        ([], []),
        (["a", "b", "a"], ["a", "b", "a"]),
        (("a",), ["a"]),
        ({"a"}, ["a"]),
        (deque(["a"]), ["a"]),
        ("search", ["search"]),
        ([search, SimpleNamespace(name="browse"), Colour.RED], ["search", "browse", "RED"]),
        ([5, None, b"x"], ["5", "None", "x"]),
        (["\ud800"], ["?"]),
    ],
)
def test_tools_are_names(value: Any, names: list[str]) -> None:
    assert wire(used_tools=value)["used_tools"] == names


def test_the_agent_is_the_objects_then_the_given_then_the_default() -> None:
    assert agent_of("given", SimpleNamespace(id="object"), "default") == "object"
    assert agent_of("given", None, "default") == "given"
    assert agent_of(None, None, "default") == "default"
    assert agent_of("", None, "default") == "default"


def test_a_missing_agent_is_refused_saying_where_to_set_it() -> None:
    with pytest.raises(InvalidValueError, match="XPANDER_AGENT_ID"):
        agent_of(None, None, None)
    with pytest.raises(InvalidValueError, match=r"agent\.id"):
        agent_of("given", object(), "default")


@pytest.mark.parametrize(
    ("agent_id", "escaped"),
    [("agent-1", "agent-1"), ("a/b?c#d e", "a%2Fb%3Fc%23d%20e"), ("ü%", "%C3%BC%25"), ("a\r\nb", "a%0D%0Ab")],
)
def test_an_id_cannot_leave_its_segment_of_the_path(agent_id: str, escaped: str) -> None:
    assert segment("agent_id", agent_id) == escaped


@pytest.mark.parametrize("agent_id", [".", ".."])
def test_a_segment_that_would_climb_is_refused(agent_id: str) -> None:
    with pytest.raises(InvalidValueError, match="agent_id"):
        segment("agent_id", agent_id)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.text(), st.binary(), st.floats(), st.integers(), st.complex_numbers(), st.decimals(),
    st.fractions(), st.datetimes(), st.dates(), st.times(), st.timedeltas(), st.uuids(), st.ip_addresses(),
    st.slices(5), st.sampled_from([Colour.RED, search, sys, object(), int, ValueError("x"), range(3), Point(1, 2.0)]),
    st.builds(Model, name=st.text()), st.builds(bytearray, st.binary()), st.builds(memoryview, st.binary()),
    st.builds(Tokens, prompt_tokens=st.integers(0, 2**70)), st.builds(ValueError, st.text()),
)  # fmt: skip
KEYS = st.text() | st.integers() | st.binary() | st.none() | st.floats() | st.tuples(st.integers())
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(KEYS, inner, max_size=4),
        st.builds(deque, st.lists(inner, max_size=3)),
        st.iterables(inner, max_size=3),
        st.frozensets(st.text() | st.integers(), max_size=3),
        st.fixed_dictionaries({"prompt_tokens": inner, "completion_tokens": inner}),
        st.builds(SimpleNamespace, prompt_tokens=inner, name=inner),
    ),
    max_leaves=8,
)
FIELDS = ["id", "input", "llm_response", "tokens", "is_success", "result", "duration", "used_tools", "agent_id"]


@given(value=JSON)
@settings(max_examples=200, deadline=None)
def test_any_json_arrives_as_it_is(value: Any) -> None:
    assert wire(llm_response=value)["llm_response"] == value


def arrives_or_is_refused(field: str, value: Any) -> None:
    refused = None
    try:
        body = report_of(**{"agent_id": "a", field: value}).to_wire()
    except InvalidValueError as error:
        refused = error.field.split(".")[0]
    if refused is not None:
        assert refused == field
        return
    read = json.loads(body, parse_constant=pytest.fail)
    assert len(read) == 8
    assert math.isfinite(read["duration"])


@given(field=st.sampled_from(FIELDS), value=ANYTHING)
@settings(max_examples=400, deadline=None)
def test_any_value_arrives_or_raises_our_error_and_nothing_else(field: str, value: Any) -> None:
    arrives_or_is_refused(field, value)


@pytest.mark.parametrize("field", FIELDS)
def test_values_made_to_break_arrive_or_raise_our_error(field: str) -> None:
    odd = [Hostile(), HostileDict(a=1), [Hostile()], {"a": Hostile()}, cycle(), nested(5000), object(), search, sys]
    for value in [
        *odd,
        Colour.RED,
        ValueError("x"),
        itertools.count(),
        (n for n in itertools.count()),
        "\ud800",
        "\x00",
    ]:
        arrives_or_is_refused(field, value)
