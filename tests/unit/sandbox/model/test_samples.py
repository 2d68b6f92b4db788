from typing import Any

import pytest

from xpander_celery.sandbox.model.samples import sample


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, "Convert 12.5 EUR"),
        ({"type": "string", "maxLength": 7}, "Convert"),
        ({"type": "string", "format": "date"}, "2026-01-15"),
        ({"type": "number"}, 12.5),
        ({"type": "integer"}, 3),
        ({"type": "integer", "minimum": 20, "maximum": 30}, 20),
        ({"type": "boolean"}, True),
        ({"type": "null"}, None),
        ({"type": ["string", "null"]}, "Convert 12.5 EUR"),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True, True]),
        ({"enum": ["red", "blue"]}, "red"),
        ({"const": 7}, 7),
        ({"type": "integer", "default": 0}, 0),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, True),
        ({"properties": {"a": {"type": "boolean"}}}, {"a": True}),
        ({"$ref": "#/$defs/Flag", "$defs": {"Flag": {"type": "boolean"}}}, True),
    ],
)
def test_a_sample_fits_its_schema(schema: dict[str, Any], value: object) -> None:
    assert sample(schema, "Convert 12.5 EUR") == value


def test_numbers_are_taken_in_their_order_each_once() -> None:
    schema = {"properties": {"amount": {"type": "number"}, "rate": {"type": "number"}, "more": {"type": "integer"}}}
    assert sample(schema, "40 euros at 1.25") == {"amount": 40, "rate": 1.25, "more": 3}


def test_a_schema_that_contains_itself_ends() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}
    assert isinstance(sample({"$ref": "#/$defs/Node", "$defs": {"Node": node}}), dict)
