"""Values become capped, redacted, JSON-safe text, whatever they are."""

from __future__ import annotations

import dataclasses
import enum
import json
import tracemalloc
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

from xpander_celery.rendering import Renderer, cut, describe, json_safe, to_text

RENDERER = Renderer(redact_keys=frozenset({"shoe_size"}))


class Order(BaseModel):
    number: int = 7
    password: str = "hunter2"
    key: SecretStr = SecretStr("hunter2")


@dataclasses.dataclass
class Point:
    x: int
    y: float


class Login(NamedTuple):
    user: str
    password: str


@dataclasses.dataclass
class Hidden:
    shown: int = 1
    hidden: int = dataclasses.field(default=2, repr=False)


class Colour(enum.Enum):
    RED = "red"


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no repr today")


class HostileError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message today")


def circular() -> list[Any]:
    ring: list[Any] = [1]
    ring.append(ring)
    return ring


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"question": "How many?"}, "How many?"),
        ({"count": 3}, '{"count":3}'),
        ({"a": 1, "b": [True, None]}, '{"a":1,"b":[true,null]}'),
        ({"password": "hunter2"}, "[redacted]"),
        ({"user": {"name": "Ann", "apiKey": "hunter2"}}, '{"user":{"name":"Ann","apiKey":"[redacted]"}}'),
        ({"shoeSize": 44, "size": 44}, '{"shoeSize":"[redacted]","size":44}'),
        ({"token": None}, '{"token":null}'),
        ({}, "{}"),
    ],
)
def test_input_is_the_bound_arguments(arguments: dict[str, Any], text: str) -> None:
    assert RENDERER.input(arguments) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None),
        ("as it is", "as it is"),
        (12, "12"),
        (float("nan"), "nan"),
        ({"ok": True}, '{"ok":true}'),
        ((1, 2), "[1,2]"),
        (Order(), '{"number":7,"password":"[redacted]","key":"[redacted]"}'),
        (Point(1, 2.5), '{"x":1,"y":2.5}'),
        (Colour.RED, "red"),
        (Decimal("1.50"), "1.50"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00+00:00"),
        (b"bytes", "bytes"),
        (b"\xff\xfe", "//4="),
        ("lone \ud800 surrogate", "lone ? surrogate"),
        (circular(), '[1,"<circular reference>"]'),
        pytest.param(10**5000, "<int of 16610 bits>", id="huge int"),
        (Login("ann", "hunter2"), '{"user":"ann","password":"[redacted]"}'),
        (Hidden(), '{"shown":1}'),
        (deque([1, 2]), "[1,2]"),
        ({"a": 1}.values(), "[1]"),
        ([["X-Api-Key", "hunter2"], ["Accept", "text"]], '[["X-Api-Key","[redacted]"],["Accept","text"]]'),
        ([{"name": "password", "value": "hunter2"}], '[{"name":"password","value":"[redacted]"}]'),
        ([{"Name": "DB_PASSWORD", "Value": "hunter2"}], '[{"Name":"DB_PASSWORD","Value":"[redacted]"}]'),
        ([{"Key": "ApiToken", "Value": "hunter2"}], '[{"Key":"ApiToken","Value":"[redacted]"}]'),
        ([{"Name": "size", "Value": "12"}], '[{"Name":"size","Value":"12"}]'),
        ({"Name": "PASSWORD", "Value": "hunter2"}, '{"Name":"PASSWORD","Value":"[redacted]"}'),
        ({"password": True}, '{"password":true}'),
        (["psql", "--password", "hunter2", "--user", "ann"], '["psql","--password","[redacted]","--user","ann"]'),
        (["curl", "-u", "ann:hunter two", "-v"], '["curl","-u","ann:[redacted]","-v"]'),
        (["docker", "run", "-u", "1000:1000"], '["docker","run","-u","1000:1000"]'),
        (
            ["--api-key", "--verbose", "--password=hunter2", "shop"],
            '["--api-key","--verbose","--password=[redacted]","shop"]',
        ),
        (Hostile(), "<Hostile that could not be rendered: RuntimeError>"),
    ],
)
def test_result_is_text_json_or_repr(value: object, text: str | None) -> None:
    assert RENDERER.result(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["mysql --password=hunter2 -h db", "SELECT 1"], '["mysql --password=[redacted] -h db","SELECT 1"]'),
        (["My password: hunter2, why?", "hello"], '["My password: [redacted], why?","hello"]'),
        (["use sk-proj-abcdefghijklmnop1234", "token"], '["use [redacted]","token"]'),
        ([("X-Api-Key", "hunter2")], '[["X-Api-Key","[redacted]"]]'),
        ([("API key", "hunter2"), ("Host", "h")], '[["API key","[redacted]"],["Host","h"]]'),
        ({"amqp://ann:hunter2@db/x": 1}, '{"amqp://ann:[redacted]@db/x":1}'),
        ({("pin=hunter2", "x"): None}, "{\"('pin=[redacted]', 'x')\":null}"),
        ({"Authorization: Bearer abcdefghijkl": 1}, '{"Authorization: Bearer [redacted]":"[redacted]"}'),
        (["password\ud800", 1], '["password?",1]'),
    ],
)
def test_text_beside_and_as_a_name_is_redacted_too(value: object, text: str) -> None:
    assert Renderer().result(value) == text
    assert Renderer().input({"value_of": value}) == f'{{"value_of":{text}}}'


def test_an_absent_attribute_hides_no_other() -> None:
    class Order(BaseModel):
        number: int
        note: str

    @dataclasses.dataclass
    class Line:
        price: int = dataclasses.field(init=False)
        item: str = "tea"

    assert Renderer().result([Order.model_construct(number=3), Line()]) == '[{"number":3},{"item":"tea"}]'


def test_keyword_arguments_of_any_name_are_redacted() -> None:
    assert "hunter2" not in Renderer().input({"a": 1, "amqp://ann:hunter2@db/x": 1})


def test_text_of_a_strange_class_is_rendered_as_the_text_that_it_is() -> None:
    class Strange(str):
        def isascii(self) -> bool:
            raise ValueError

        def __str__(self) -> str:
            raise ValueError

    assert Renderer().result(Strange("fine")) == "fine"
    assert Renderer().result([Strange("fine")]) == '["fine"]'
    assert Renderer().input({"x": Strange("fine"), "y": 1}) == '{"x":"fine","y":1}'


def test_failure_names_the_type_and_keeps_the_end_of_a_long_traceback() -> None:
    renderer = Renderer(max_traceback_bytes=200)
    text = renderer.failure(ValueError("password=hunter2"), "line\n" * 500 + "the last line")
    assert text.startswith("ValueError: password=[redacted]\n\n… [cut, 2513 bytes in all]")
    assert text.endswith("the last line")


def test_an_exception_whose_message_fails_is_still_named() -> None:
    assert describe(HostileError()) == "HostileError: (its message could not be read: RuntimeError)"
    assert describe(KeyError()) == "KeyError"


def test_a_cut_is_marked_with_the_full_size_and_never_splits_a_character() -> None:
    text = Renderer(max_result_bytes=100).result("é" * 5000)
    assert text is not None
    assert len(text.encode()) <= 100
    assert text.endswith("… [cut, 10000 bytes in all]")


def test_a_secret_at_the_cut_does_not_show_its_first_half() -> None:
    text = Renderer(max_result_bytes=100).result("x" * 60 + " sk-" + "a" * 500)
    assert text is not None
    assert "sk-a" not in text


def test_a_long_list_is_read_only_as_far_as_the_cap() -> None:
    class Counted(list[int]):
        read = 0

        def __iter__(self) -> Iterator[int]:
            for item in super().__iter__():
                self.read += 1
                yield item

    items = Counted(range(100_000))
    text = Renderer(max_result_bytes=1000).result(items)
    assert text is not None
    assert len(text.encode()) <= 1000
    assert items.read <= 1002


@pytest.mark.parametrize("value", [b"\xff" * 50_000_000, "é" * 50_000_000, deque(range(3_000_000)), b"x" * 50_000_000])
def test_a_huge_value_is_never_copied(value: object) -> None:
    tracemalloc.start()
    try:
        text = Renderer(max_result_bytes=1000).result(value)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert text is not None
    assert "in all]" in text
    assert len(text.encode()) <= 1000
    assert peak <= 1_000_000


def test_a_front_cut_traceback_begins_with_a_whole_line() -> None:
    text = Renderer(max_traceback_bytes=300).failure(ValueError("x"), "password=" + "s" * 2000 + "\nthe last line")
    assert "sss" not in text
    assert text.endswith("the last line")


def test_a_response_stays_json_and_over_the_cap_becomes_the_beginning_of_its_text() -> None:
    assert RENDERER.response({"id": "r1", "api_key": "hunter2"}) == {"id": "r1", "api_key": "[redacted]"}
    capped = Renderer(max_llm_response_bytes=200).response({"text": "y" * 5000})
    assert isinstance(capped, str)
    assert capped.startswith('{"text":"yyy')
    assert len(capped.encode()) <= 200


def test_json_safe_neither_caps_nor_redacts() -> None:
    value = {"password": "hunter2", "text": "z" * 300_000, "points": {Point(1, 2.0).x}}
    assert json_safe(value) == {"password": "hunter2", "text": "z" * 300_000, "points": [1]}
    assert to_text({"a": "é"}) == '{"a":"é"}'
    assert to_text(None) is None


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.builds(Hostile),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner),
    max_leaves=30,
)


@given(ANYTHING, st.integers(64, 4096))
def test_any_value_gives_encodable_text_within_the_cap(value: object, cap: int) -> None:
    renderer = Renderer(max_input_bytes=cap, max_result_bytes=cap, max_llm_response_bytes=cap)
    assert len(renderer.input(value).encode()) <= cap
    assert len((renderer.result(value) or "").encode()) <= cap
    assert len(json.dumps(renderer.response(value), ensure_ascii=False, separators=(",", ":")).encode()) <= 2 * cap + 2
    json.dumps(json_safe(value), allow_nan=False).encode()


@given(st.text(), st.integers(40, 400))
def test_cut_is_the_identity_below_the_cap_and_bounded_above(text: str, cap: int) -> None:
    short = cut(text, cap)
    assert len(short.encode()) <= cap
    if len(text.encode()) <= cap:
        assert short == text


NAMES = st.sampled_from(
    ["question", "api_key", "name", "value", "key", "Name", "Value", "n", "é", "Token", "a" * 40]
) | st.text(max_size=5)
TEXTS = st.text(max_size=30) | st.sampled_from(
    [
        "Where?",
        "password: x",
        "sk-" + "a" * 20,
        "a\tb",
        "\x7f",
        '"quoted"',
        "eyJhbGciOi.eyJzdWI.x",
        "https://u:p@host",
        "x" * 80,
    ]
)
SMALL = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS


@given(st.dictionaries(NAMES, SMALL, min_size=2, max_size=6), st.sampled_from([64, 128, 16 * 1024]))
def test_plain_arguments_are_rendered_as_all_others_are(arguments: dict[str, Any], cap: int) -> None:
    render = Renderer(max_input_bytes=cap, redact_keys=frozenset({"n"}))
    assert render.input(arguments) == render._json(arguments, cap)
