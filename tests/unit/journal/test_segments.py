"""The format of a segment: names, lines, and what is saved of a damaged one."""

from __future__ import annotations

import pytest

from xpander_celery import events
from xpander_celery.journal.segments import (
    FORMAT,
    MAX_LINE_BYTES,
    drop_note,
    dropped_in,
    frame,
    lines,
    parse_name,
    segment_name,
)

A, B = frame(b'{"a":1}'), frame(b'{"b":2}')


def texts(buffer: bytes, *, is_end: bool = True) -> list[bytes]:
    return [line.text for line in lines(buffer, is_end=is_end) if line.text is not None]


def debris(buffer: bytes) -> list[bytes]:
    return [line.debris for line in lines(buffer, is_end=True) if line.debris is not None]


def test_a_name_leads_back_to_its_process() -> None:
    name = parse_name(segment_name("0123456789abcdef", 7))
    assert name is not None
    assert name.process_id == "0123456789abcdef"
    assert not name.is_newer


@pytest.mark.parametrize(
    "name",
    [
        f"0123456789abcdef-000000.v{FORMAT + 1}e{events.VERSION}",
        f"0123456789abcdef-000000.v{FORMAT}e{events.VERSION + 1}",
        "0123456789abcdef-1000000.v10e1",
    ],
)
def test_a_segment_of_a_later_release_is_known_as_such(name: str) -> None:
    parsed = parse_name(name)
    assert parsed is not None
    assert parsed.is_newer


@pytest.mark.parametrize("name", ["", "index.db", "0123456789abcdef.alive", ".0123456789abcdef-000000.v1e1.ab.new"])
def test_other_files_are_no_segments(name: str) -> None:
    assert parse_name(name) is None


def test_lines_are_read_back() -> None:
    assert texts(A + B) == [b'{"a":1}', b'{"b":2}']
    assert debris(A + B) == []


def test_an_unfinished_line_waits_for_its_rest() -> None:
    [line] = lines(A + B[:-1], is_end=False)
    assert line.end == len(A)


def test_an_unfinished_line_at_the_end_is_torn() -> None:
    assert texts(A + B[:10]) == [b'{"a":1}']
    assert debris(A + B[:10]) == [B[:10]]


def test_a_whole_record_that_lacks_only_its_newline_is_read() -> None:
    assert texts(A + B[:-1]) == [b'{"a":1}', b'{"b":2}']


def test_a_torn_line_leaves_the_next_one_intact() -> None:
    assert texts(A[:9] + b"\n" + B) == [b'{"b":2}']
    assert debris(A[:9] + b"\n" + B) == [A[:9]]


@pytest.mark.parametrize("damage", [A[:-3], b"\0" * 4096, b"00000000 {" * 3, b"deadbeef {"])
def test_a_record_glued_to_damage_is_found_by_its_checksum(damage: bytes) -> None:
    assert texts(damage + B) == [b'{"b":2}']
    assert debris(damage + B) == [damage]


@pytest.mark.parametrize("at", range(len(A) - 1))
def test_one_flipped_bit_anywhere_costs_that_line_only(at: int) -> None:
    damaged = bytearray(A)
    damaged[at] ^= 1
    found = texts(bytes(damaged) + B)
    assert b'{"b":2}' in found
    assert b'{"a":1}' not in found or int(A[:8], 16) == int(damaged[:8], 16)


def test_empty_lines_are_nothing() -> None:
    assert texts(b"\n\n" + A + b"\n\n" + B + b"\n") == [b'{"a":1}', b'{"b":2}']
    assert debris(b"\n\n" + A + b"\n") == []
    assert [line.end for line in lines(b"\n\n", is_end=False)] == [2]


def test_what_is_longer_than_any_record_is_skipped_in_pieces() -> None:
    junk = b"x" * (2 * MAX_LINE_BYTES + 10)
    found = list(lines(junk + b"\n" + A, is_end=False))
    assert [line.text for line in found] == [None, None, None, b'{"a":1}']
    assert b"".join(line.debris or b"" for line in found) == junk


def test_much_that_looks_like_a_record_is_given_up_soon() -> None:
    junk = b"00000000 {" * 20_000
    assert debris(junk + b"\n" + A) == [junk]
    assert texts(junk + b"\n" + A) == [b'{"a":1}']


def test_a_drop_note_says_its_count_and_an_event_is_none() -> None:
    assert dropped_in(drop_note(12)) == 12
    assert dropped_in(b'{"a":1}') is None


@pytest.mark.parametrize(
    "text",
    [b'{"journal_dropped":null}', b'{"journal_dropped":{}}', b'{"journal_dropped":1e999}', b'{"journal_dropped":-1}'],
)
def test_a_drop_note_without_a_count_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="count"):
        dropped_in(text)
