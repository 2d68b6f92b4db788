"""A value that fits a JSON schema, for tool arguments and structured answers. Pure; the same schema, the same value."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_DEPTH = 8
_STRINGS = {
    "date": "2026-01-15",
    "date-time": "2026-01-15T09:30:00Z",
    "time": "09:30:00Z",
    "email": "sam@example.com",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000001",
}


def sample(schema: Mapping[str, Any], hint: str = "") -> Any:
    """A value that fits `schema`; free text is taken from `hint` where it fits, and numbers in their order there."""
    return _Sampler(schema, hint).value(schema, _DEPTH)


class _Sampler:
    def __init__(self, root: Mapping[str, Any], hint: str) -> None:
        self._definitions: Mapping[str, Any] = root.get("$defs", {})
        self._hint = hint
        self._numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", hint)]

    def value(self, schema: Mapping[str, Any], depth: int) -> Any:
        if depth == 0:
            return None
        if "$ref" in schema:
            return self.value(self._definitions.get(str(schema["$ref"]).rsplit("/", 1)[-1], {}), depth - 1)
        for key in ("const", "default"):
            if schema.get(key) is not None:
                return schema[key]
        for key in ("enum", "examples"):
            if schema.get(key):
                return schema[key][0]
        for key in ("anyOf", "oneOf", "allOf"):
            if schema.get(key):
                return self.value(schema[key][0], depth - 1)
        return self._of_type(schema, depth)

    def _of_type(self, schema: Mapping[str, Any], depth: int) -> Any:
        kind = schema.get("type", "object" if "properties" in schema else "string")
        if isinstance(kind, list):
            kind = kind[0]
        if kind == "object":
            return {name: self.value(part, depth - 1) for name, part in schema.get("properties", {}).items()}
        if kind == "array":
            return [self.value(schema.get("items", {}), depth - 1)] * max(1, schema.get("minItems", 1))
        if kind == "string":
            return self._string(schema)
        if kind in ("integer", "number"):
            return self._number(schema, whole=kind == "integer")
        return {"boolean": True}.get(kind)

    def _string(self, schema: Mapping[str, Any]) -> str:
        text = _STRINGS.get(schema.get("format", "")) or self._hint or "sample"
        return text[: schema.get("maxLength", 80)]

    def _number(self, schema: Mapping[str, Any], *, whole: bool) -> float:
        low: float = schema.get("minimum", 0)
        high: float = schema.get("maximum", float("inf"))
        fitting = [number for number in self._numbers if low <= number <= high and (not whole or number.is_integer())]
        if not fitting:
            return max(low, min(3, high))
        self._numbers.remove(fitting[0])
        return int(fitting[0]) if whole else fitting[0]
