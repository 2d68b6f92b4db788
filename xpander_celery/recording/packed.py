"""The facts of a job's spans in 86 bytes each: there may be 100,000. It must not know what they mean."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from struct import Struct
from typing import Any

from xpander_celery.recording.attributes import Kind
from xpander_celery.recording.facts import SpanFacts

# span id, parent id, start, end, prompt (-1: none), completion, cache read, cache write, response key,
# scope, model, tool, requested tools (as numbers of names), kind, failed, beside
_ROW = Struct("<QQqqqqqqQIIIIB??")
_NO_USAGE = -1
_KINDS = tuple(Kind)


class PackedSpans:
    """Facts to which any thread may append while another reads: each append is one operation on one buffer."""

    __slots__ = ("_next", "_numbers", "_rows")

    def __init__(self) -> None:
        self._rows = bytearray()
        self._numbers: dict[Any, int] = {None: 0, "": 1, (): 2}  # of scopes, models, tools and tuples of tools
        self._next = count(len(self._numbers))

    def __len__(self) -> int:
        return len(self._rows) // _ROW.size

    def append(self, facts: SpanFacts) -> None:
        """Keep the facts. Raises OverflowError or struct.error for counts beyond 63 bits."""
        (
            span_id,
            parent_id,
            scope,
            kind,
            start,
            end,
            failed,
            prompt,
            completion,
            cache_read,
            cache_write,
            beside,
            model,
            response_key,
            tool,
            requested,
        ) = facts
        numbers = self._numbers
        for name in (scope, model, tool, requested):
            if name not in numbers:
                numbers.setdefault(name, next(self._next))
        self._rows += _ROW.pack(
            span_id,
            parent_id,
            start,
            end,
            _NO_USAGE if prompt is None else prompt,
            completion,
            cache_read,
            cache_write,
            response_key,
            numbers[scope],
            numbers[model],
            numbers[tool],
            numbers[requested],
            kind,
            failed,
            beside,
        )

    def __iter__(self) -> Iterator[SpanFacts]:
        """The facts as they are now, in the order in which the spans ended."""
        rows = bytes(self._rows)
        names = {number: name for name, number in list(self._numbers.items())}
        for row in _ROW.iter_unpack(rows):
            span_id, parent_id, start, end, prompt, completion, cache_read, cache_write, response_key, *rest = row
            scope, model, tool, requested, kind, failed, beside = rest
            yield SpanFacts(
                span_id,
                parent_id,
                names[scope],
                _KINDS[kind],
                start,
                end,
                failed,
                None if prompt == _NO_USAGE else prompt,
                completion,
                cache_read,
                cache_write,
                beside,
                names[model],
                response_key,
                names[tool],
                names[requested],
            )
