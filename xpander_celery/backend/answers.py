"""Reads one HTTP/1.1 answer from the bytes of a connection. Pure: it knows neither sockets nor clocks.

Strict where two readers could disagree about where an answer ends (lengths, codings, folded lines), since what is left
of one answer would be taken for the next; generous where that cannot be (line ends, header values).
"""

from __future__ import annotations

import re

MAX_HEAD_BYTES = 64 * 1024
_MOST_INTERIM = 16  # answers such as 100 and 103 before the real one
_MAX_CHUNK_LINE = 4096  # the size of a chunk and what servers say beside it
_MAX_LENGTH_DIGITS = 16

_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [^\x00-\x08\x0a-\x1f\x7f]*)?")
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*|;[^\x00-\x08\x0a-\x1f\x7f]*)")
_LINE_END = re.compile(rb"\r?\n")


class MalformedAnswerError(ValueError):
    """What came is no HTTP answer, or one that cannot be read safely."""


class AnswerReader:
    """Give it what arrives (`feed`) and tell it of the end (`feed_end`); both say whether the answer is whole.

    Then `status`, `headers` (names in lower case) and `body` are it, and `may_be_reused` says whether the connection
    can carry another request. `has_begun`: whether any of it came.
    """

    def __init__(self, *, method: bytes, max_body_bytes: int) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = bytearray()
        self.may_be_reused = False
        self.has_begun = False
        self._method = method
        self._most = max_body_bytes
        self._unread = b""
        self._searched = 0  # of it, without finding the end of the head
        self._interim = 0
        self._has_head = False
        self._is_chunked = False
        self._in_trailer = False
        self._remaining: int | None = 0  # bytes of the body or of the chunk, its line end included; None: until the end
        self._is_whole = False

    def feed(self, data: bytes) -> bool:
        """Read more; raises `MalformedAnswerError`."""
        self.has_begun = True
        self._unread = self._unread + data if self._unread else data
        while not self._has_head:
            if not self._read_head():
                return False
        if not self._is_whole:
            self._is_whole = self._read_chunks() if self._is_chunked else self._read_plain()
        if self._is_whole and self._unread:
            self.may_be_reused = False  # more than was asked for: whose answer that is nobody knows
        return self._is_whole

    def feed_end(self) -> bool:
        """The connection ended: whole is what has no other end; raises `MalformedAnswerError` for the rest."""
        if not self.has_begun:
            raise MalformedAnswerError("the connection was closed without an answer")
        if not self._is_whole and (not self._has_head or self._is_chunked or self._remaining is not None):
            raise MalformedAnswerError("the connection was closed in the middle of an answer")
        self._is_whole = True
        return True

    def _read_head(self) -> bool:
        """Whether there was a whole head."""
        end = _END_OF_HEAD.search(self._unread, self._searched)
        if (end.start() if end else len(self._unread)) > MAX_HEAD_BYTES:
            raise MalformedAnswerError(f"a head of more than {MAX_HEAD_BYTES} bytes")
        if end is None:
            if not b"HTTP/1.".startswith(self._unread[:7]):
                raise MalformedAnswerError(f"no HTTP/1 answer: {self._unread[:40]!r}")
            self._searched = max(0, len(self._unread) - 3)
            return False
        first, *lines = _LINE_END.split(self._unread[: end.start()])
        self._unread, self._searched = self._unread[end.end() :], 0
        match = _STATUS.fullmatch(first)
        if match is None:
            raise MalformedAnswerError(f"no HTTP/1 answer: {first[:40]!r}")
        status = int(match[2])
        headers = [_header(line) for line in lines]
        if status < 200:
            self._interim += 1
            if status == 101 or self._interim > _MOST_INTERIM:
                raise MalformedAnswerError(f"an answer with status {status} that nobody asked for")
            return True  # the real one follows
        self.status, self.headers, self._has_head = status, headers, True
        self._plan(is_1_1=match[1] == b"1")
        return True

    def _plan(self, *, is_1_1: bool) -> None:
        """Find out where the body ends, and whether the connection goes on after it."""
        lengths: set[bytes] = set()
        codings: list[bytes] = []
        options: set[bytes] = set()
        for name, value in self.headers:
            if name == b"content-length":
                lengths.update(part.strip(b" \t") for part in value.split(b","))
            elif name == b"transfer-encoding":
                codings += [part.strip(b" \t").lower() for part in value.split(b",")]
            elif name == b"connection":
                options.update(part.strip(b" \t").lower() for part in value.split(b","))
        if codings and (codings != [b"chunked"] or lengths or not is_1_1):
            raise MalformedAnswerError(f"a body in a form that is not understood: {codings}, lengths {lengths}")
        if any(len(lengths) > 1 or not text.isdigit() or len(text) > _MAX_LENGTH_DIGITS for text in lengths):
            raise MalformedAnswerError(f"a content-length that is none: {lengths}")
        self.may_be_reused = is_1_1 and b"close" not in options
        if self._method == b"HEAD" or self.status in (204, 304):
            return
        if codings:
            self._is_chunked = True
        elif lengths:
            self._remaining = int(lengths.pop())
            self._check_size(self._remaining)
        else:
            self._remaining, self.may_be_reused = None, False

    def _read_plain(self) -> bool:
        if self._remaining is None:
            self._check_size(len(self.body) + len(self._unread))
            self.body += self._unread
            self._unread = b""
            return False
        taken, self._unread = self._unread[: self._remaining], self._unread[self._remaining :]
        self.body += taken
        self._remaining -= len(taken)
        return not self._remaining

    def _read_chunks(self) -> bool:
        """Whether the last chunk came, and the trailer after it."""
        at, unread = 0, self._unread
        try:
            while True:
                if self._remaining:
                    taken = unread[at : at + self._remaining]
                    at += len(taken)
                    self.body += taken
                    self._remaining -= len(taken)
                    if self._remaining:
                        return False
                    self._remaining = None  # now the line end of the chunk
                end = unread.find(b"\r\n", at)
                if end < 0:
                    if len(unread) - at > (MAX_HEAD_BYTES if self._in_trailer else _MAX_CHUNK_LINE):
                        raise MalformedAnswerError("a chunk without an end")
                    return False
                line = unread[at:end]
                if self._remaining is None:
                    if line:
                        raise MalformedAnswerError("a chunk longer than it says")
                    self._remaining = 0
                elif self._in_trailer:
                    if not line:
                        at = end + 2
                        return True
                    _header(line)
                else:
                    self._begin_chunk(line)
                at = end + 2
        finally:
            self._unread = unread[at:]

    def _begin_chunk(self, line: bytes) -> None:
        match = _CHUNK.fullmatch(line)
        if match is None or len(line) > _MAX_CHUNK_LINE:
            raise MalformedAnswerError(f"a chunk whose size is none: {line[:40]!r}")
        size = int(match[1], 16)
        self._check_size(len(self.body) + size)
        self._remaining, self._in_trailer = size, not size

    def _check_size(self, size: int) -> None:
        if size > self._most:
            raise MalformedAnswerError(f"an answer of more than {self._most} bytes")


def _header(line: bytes) -> tuple[bytes, bytes]:
    """One line of a head or of a trailer. A folded one is refused, as RFC 9112 (5.2) allows."""
    name, separator, value = line.partition(b":")
    if not separator or not _NAME.fullmatch(name) or _CONTROL.search(value):
        raise MalformedAnswerError(f"a header that is none: {line[:40]!r}")
    return name.lower(), value.strip(b" \t")
