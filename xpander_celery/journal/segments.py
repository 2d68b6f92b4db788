"""The format of a segment file: its name, its lines, and what can be saved of a damaged one. Pure.

A segment is named `<process id>-<number>.v<format>e<events>`, after the versions of this format and of the events in
it. It holds one record a line: the CRC-32 of a JSON text as eight hexadecimal digits, a space, the text, a newline.
A text is an event, or a note of the journal itself (how many events a writer had to drop).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from zlib import crc32

from pydantic_core import from_json

from xpander_celery import events

FORMAT = 1
MAX_RECORD_BYTES = 256 * 1024
MAX_LINE_BYTES = MAX_RECORD_BYTES + 10

_NAME = re.compile(r"(?P<process>[0-9a-f]{16})-(?P<number>\d{6,})\.v(?P<format>\d+)e(?P<events>\d+)")
_RECORD = re.compile(rb"([0-9a-f]{8}) \{")
_MAX_CANDIDATES = 100  # a bound on the work that one damaged line can make
_DROP_NOTE = b'{"journal_dropped":'


@dataclass(frozen=True, slots=True)
class SegmentName:
    """What the name of a segment says."""

    process_id: str
    is_newer: bool  # written by a later release, in a way that this one cannot read


def segment_name(process_id: str, number: int) -> str:
    """The name of the `number`-th segment of a process."""
    return f"{process_id}-{number:06d}.v{FORMAT}e{events.VERSION}"


def parse_name(name: str) -> SegmentName | None:
    """What the name of a file says, None if it is no segment."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    is_newer = int(match["format"]) > FORMAT or int(match["events"]) > events.VERSION
    return SegmentName(match["process"], is_newer)


def frame(text: bytes) -> bytes:
    """The line of one record."""
    return b"%08x %b\n" % (crc32(text), text)


def drop_note(count: int) -> bytes:
    """The text by which a writer says, once it can write again, how many events it dropped."""
    return _DROP_NOTE + b"%d}" % count


def dropped_in(text: bytes) -> int | None:
    """The count in a drop note, None for any other text; raises ValueError for a note without one."""
    if not text.startswith(_DROP_NOTE):
        return None
    count = from_json(text)["journal_dropped"]
    if not isinstance(count, int) or count < 0:
        raise ValueError(f"no count: {count!r}")
    return count


@dataclass(frozen=True, slots=True)
class Line:
    """One line as found. `text` is None where nothing could be read; `debris` is what is to be kept aside."""

    end: int  # offset behind it, in the buffer that it was read from
    text: bytes | None
    debris: bytes | None


def lines(buffer: bytes, *, is_end: bool) -> Iterator[Line]:
    """The lines of `buffer`. An unfinished last one is a line only where `is_end` says that it stays unfinished."""
    start = 0
    while start < len(buffer):
        newline = buffer.find(b"\n", start, start + MAX_LINE_BYTES)
        end = newline + 1
        if newline < 0:
            if len(buffer) - start >= MAX_LINE_BYTES:
                newline = end = start + MAX_LINE_BYTES  # no line of ours: skip it in pieces
            elif is_end:
                newline = end = len(buffer)
            else:
                return
        if newline > start:
            yield _line(buffer[start:newline], end)
        elif end == len(buffer):
            yield Line(end, None, None)
        start = end


def _line(raw: bytes, end: int) -> Line:
    """Read one line; a record that was written behind a torn one is found by its checksum."""
    if raw[8:9] == b" " and _has_checksum(raw):
        return Line(end, raw[9:], None)
    for match in islice(_RECORD.finditer(raw, 1), _MAX_CANDIDATES):
        if _has_checksum(raw[match.start() :]):
            return Line(end, raw[match.start() + 9 :], raw[: match.start()])
    return Line(end, None, raw)


def _has_checksum(record: bytes) -> bool:
    try:
        return int(record[:8], 16) == crc32(record[9:])
    except ValueError:
        return False
