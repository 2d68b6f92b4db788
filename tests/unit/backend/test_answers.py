"""Answers byte by byte, and beside the parser that httpx uses: what both read, they read alike."""

from __future__ import annotations

from dataclasses import dataclass

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xpander_celery.backend.answers import MAX_HEAD_BYTES, AnswerReader, MalformedAnswerError

HEAD = b"HTTP/1.1 200 OK\r\n"


@dataclass(frozen=True)
class Read:
    status: int
    body: bytes
    may_be_reused: bool
    needed_the_end: bool = False


def read(*pieces: bytes, method: bytes = b"POST", most: int = 1_000_000) -> Read:
    reader = AnswerReader(method=method, max_body_bytes=most)
    is_whole = False
    for piece in pieces:
        is_whole = reader.feed(piece)
    needed_the_end = not is_whole
    assert is_whole or reader.feed_end()
    return Read(reader.status, bytes(reader.body), reader.may_be_reused, needed_the_end)


def in_bytes(text: bytes) -> list[bytes]:
    return [text[at : at + 1] for at in range(len(text))]


SOUND = {
    "content-length": (HEAD + b"Content-Length: 5\r\n\r\nhello", Read(200, b"hello", True)),
    "an empty body": (HEAD + b"content-length: 0\r\n\r\n", Read(200, b"", True)),
    "the same length twice": (HEAD + b"Content-Length: 2, 2\r\nContent-Length: 2\r\n\r\nok", Read(200, b"ok", True)),
    "close": (HEAD + b"Connection: Close\r\nContent-Length: 2\r\n\r\nok", Read(200, b"ok", False)),
    "one of several options": (HEAD + b"Connection: foo, close\r\nContent-Length: 0\r\n\r\n", Read(200, b"", False)),
    "until the end": (HEAD + b"\r\nhello", Read(200, b"hello", False, needed_the_end=True)),
    "1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", Read(200, b"ok", False)),
    "1.0 that would stay": (
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
        Read(200, b"ok", False),
    ),
    "no reason": (b"HTTP/1.1 204\r\n\r\n", Read(204, b"", True)),
    "an empty reason": (b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", Read(200, b"", True)),
    "304 that tells a length": (b"HTTP/1.1 304 Same\r\nContent-Length: 9\r\n\r\n", Read(304, b"", True)),
    "bare line ends": (b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok", Read(200, b"ok", True)),
    "chunks": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;a=b\r\n world\r\n0\r\n\r\n",
        Read(200, b"hello world", True),
    ),
    "chunks and a trailer": (
        HEAD + b"Transfer-Encoding: Chunked\r\n\r\n00A\r\n0123456789\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n",
        Read(200, b"0123456789", True),
    ),
    "100 first": (b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: 2\r\n\r\nok", Read(200, b"ok", True)),
    "100 and 103 first": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: </a>\r\n\r\n" + HEAD + b"Content-Length: 0\r\n\r\n",
        Read(200, b"", True),
    ),
    "a strange status": (b"HTTP/1.1 799 Odd\r\nContent-Length: 0\r\n\r\n", Read(799, b"", True)),
    "text that is no ASCII": (HEAD + "X-Name: Zürich\r\nContent-Length: 0\r\n\r\n".encode(), Read(200, b"", True)),
}  # fmt: skip

BROKEN = {
    "no HTTP": b"220 mail.example ESMTP\r\n\r\n",
    "TLS": b"\x15\x03\x01\x00\x02\x02\x16",
    "HTTP/2": b"HTTP/2.0 200 OK\r\n\r\n",
    "HTTP/0.9": b"<html>hello</html>",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "two spaces": b"HTTP/1.1  200 OK\r\n\r\n",
    "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
    "interim answers without end": b"HTTP/1.1 100 Continue\r\n\r\n" * 17,
    "a folded header": HEAD + b"X-Long: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    "a space before the colon": HEAD + b"Content-Length : 0\r\n\r\n",
    "a header without a colon": HEAD + b"Content-Length\r\n\r\n",
    "a nameless header": HEAD + b": 0\r\n\r\n",
    "a carriage return inside": HEAD + b"X-A: a\rContent-Length: 0\r\n\r\n",
    "a NUL inside": HEAD + b"X-A: a\0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nabc",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "a signed length": HEAD + b"Content-Length: +1\r\n\r\na",
    "an empty length": HEAD + b"Content-Length: \r\n\r\n",
    "a length of other digits": HEAD + "Content-Length: \u0661\r\n\r\n".encode(),
    "a length of 30 digits": HEAD + b"Content-Length: 000000000000000000000000000001\r\n\r\na",
    "chunks and a length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "another coding": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks in 1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk without a size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n\r\n",
    "a chunk of no size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "a chunk of a negative size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
    "a chunk of 0x": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
    "a chunk of 17 digits": HEAD + b"Transfer-Encoding: chunked\r\n\r\n00000000000000001\r\na\r\n0\r\n\r\n",
    "a chunk longer than it says": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
    "a chunk line without end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 5000,
    "a broken trailer": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nno colon\r\n\r\n",
    "a head without end": HEAD + b"X-A: " + b"a" * (MAX_HEAD_BYTES + 1),
    "a long head": HEAD + b"X-A: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", SOUND)
def test_an_answer_is_read_alike_however_it_arrives(name: str) -> None:
    text, expected = SOUND[name]
    assert read(text) == expected
    assert read(*in_bytes(text)) == expected
    for at in range(1, len(text)):
        assert read(text[:at], text[at:]) == expected


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_answer_is_refused_however_it_arrives(name: str) -> None:
    text = BROKEN[name]
    with pytest.raises(MalformedAnswerError):
        read(text)
    with pytest.raises(MalformedAnswerError):
        read(*in_bytes(text))


@pytest.mark.parametrize("name", [name for name in SOUND if name != "until the end"])
def test_an_answer_that_ends_too_early_is_none(name: str) -> None:
    text, _ = SOUND[name]
    for at in range(len(text)):
        reader = AnswerReader(method=b"POST", max_body_bytes=1000)
        assert not reader.feed(text[:at])
        with pytest.raises(MalformedAnswerError):
            reader.feed_end()


def test_a_connection_that_ends_without_a_word_has_not_begun_to_answer() -> None:
    reader = AnswerReader(method=b"POST", max_body_bytes=10)
    with pytest.raises(MalformedAnswerError, match="without an answer"):
        reader.feed_end()
    assert not reader.has_begun


def test_the_answer_to_head_has_no_body_whatever_it_says() -> None:
    assert read(HEAD + b"Content-Length: 5\r\n\r\n", method=b"HEAD") == Read(200, b"", True)


def test_what_follows_an_answer_unasked_ends_the_connection() -> None:
    answer = HEAD + b"Content-Length: 2\r\n\r\nok"
    assert read(answer + answer) == Read(200, b"ok", False)
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert read(chunked + b"x") == Read(200, b"", False)


@pytest.mark.parametrize(
    "text",
    [
        HEAD + b"Content-Length: 11\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nB\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n6\r\naaaaaa\r\n5\r\n",
        HEAD + b"\r\n" + b"a" * 11,
    ],
)
def test_more_than_is_wanted_is_refused_before_it_is_kept(text: bytes) -> None:
    with pytest.raises(MalformedAnswerError, match="more than 10 bytes"):
        read(text, most=10)


def test_header_names_are_lower_case_and_values_are_stripped_and_in_order() -> None:
    reader = AnswerReader(method=b"POST", max_body_bytes=10)
    reader.feed(HEAD + b"Retry-After:  120 \r\nX-A:1\r\nx-a: 2\r\nContent-Length: 0\r\n\r\n")
    assert reader.headers == [(b"retry-after", b"120"), (b"x-a", b"1"), (b"x-a", b"2"), (b"content-length", b"0")]


# Beside h11, which is what httpx reads answers with


def read_by_h11(text: bytes) -> Read | None:
    """What h11 makes of it; None where it refuses, or waits for more than there is."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "h"), ("content-length", "0")]))
    connection.send(h11.EndOfMessage())
    body, status = b"", 0
    try:
        connection.receive_data(text)
        needed_the_end = False
        while True:
            event = connection.next_event()
            match event:
                case h11.NEED_DATA if needed_the_end:
                    return None
                case h11.NEED_DATA:
                    needed_the_end = True
                    connection.receive_data(b"")
                case h11.Response():
                    status = event.status_code
                case h11.Data():
                    body += bytes(event.data)
                case h11.EndOfMessage():
                    is_done = connection.their_state is h11.DONE and not connection.trailing_data[0]
                    return Read(status, body, is_done and not needed_the_end, needed_the_end)
                case h11.InformationalResponse():
                    pass
                case _:
                    return None
    except h11.RemoteProtocolError:
        return None


def read_or_none(text: bytes) -> Read | None:
    try:
        return read(text)
    except MalformedAnswerError:
        return None


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_answer_is_read_as_httpx_would(name: str) -> None:
    text, expected = SOUND[name]
    assert read_by_h11(text) == expected


PARTS = [
    b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 204 No\r\n", b"HTTP/1.1 100 Continue\r\n\r\n",
    b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
    b"Connection: keep-alive\r\n", b"X-A: b\r\n", b"\r\n", b"\n", b"hello", b"5\r\nhello\r\n", b"0\r\n",
    b"a", b" ", b":",
]  # fmt: skip


@given(st.lists(st.sampled_from(PARTS), max_size=8).map(b"".join))
@example(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
@example(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
def test_whatever_is_read_at_all_is_read_as_httpx_would(text: bytes) -> None:
    ours = read_or_none(text)
    assert ours is None or ours == read_by_h11(text)


@given(st.sampled_from(sorted(SOUND)), st.data())
def test_an_answer_with_a_byte_changed_is_refused_or_read_as_httpx_would(name: str, data: st.DataObject) -> None:
    text = bytearray(SOUND[name][0])
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    ours = read_or_none(bytes(text))
    assert ours is None or ours == read_by_h11(bytes(text))


@given(st.binary(max_size=200), st.integers(0, 200))
def test_no_bytes_whatever_do_more_than_be_refused(tail: bytes, cut: int) -> None:
    text = (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + tail)[: cut + 40]
    reader = AnswerReader(method=b"POST", max_body_bytes=100)
    try:
        if not reader.feed(text):
            reader.feed_end()
    except MalformedAnswerError:
        return
    assert len(reader.body) <= 100
