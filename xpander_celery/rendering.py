"""Any Python value to capped, redacted, JSON-safe text. Layer 1: pure.

What a user's job takes and gives passes through here before anything of it touches a disk. Nothing here raises: a value
that cannot be rendered gives a text that says so. Strings are capped before they are dumped, containers are read only
as far as the cap reaches.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import re
from array import array
from collections import deque
from collections.abc import ItemsView, Iterable, KeysView, Mapping, Set, ValuesView
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID

from pydantic import BaseModel, SecretBytes, SecretStr
from pydantic_core import to_json

from xpander_celery.redaction import (
    LOGIN_OPTIONS,
    MASK,
    could_hold_a_secret,
    looks_secret,
    redact_text,
    without_password,
)

_SEQUENCES = (list, tuple, Set, deque, KeysView, ValuesView, ItemsView, range, array)
_DEEPEST = 32
_NO_CAP = 1 << 62
_CUT = "… [cut, {} in all]"
_NAMING, _NAMED = ("name", "key", "Name", "Key"), ("value", "Value")  # as Kubernetes and AWS write variables
_LABEL = re.compile(r"[\w.-]{1,64}(?: [\w.-]{1,32})?")  # what names the value next to it in a pair
_SHORT_KEY = 16  # an identifier of so few characters is no secret itself
_OPTION = re.compile(r"--[\w-]+")  # of a command line: its value is the next item
_COUNTED = 1 << 20  # characters: of a longer text, the bytes are not counted
_PLAIN_INT = 10**18
_PLAIN_ROOM = 32  # bytes for a number, and the punctuation around it
_ABSENT = object()
_SLACK = 256  # read beyond a cap, so that a secret at the cut is still recognized


@dataclasses.dataclass(frozen=True, slots=True)
class Renderer:
    """How the values of jobs become text: with these caps (bytes of UTF-8), and these further secret key names."""

    max_input_bytes: int = 16 * 1024
    max_result_bytes: int = 64 * 1024
    max_traceback_bytes: int = 16 * 1024
    max_llm_response_bytes: int = 128 * 1024
    redact_keys: frozenset[str] = frozenset()

    def input(self, arguments: Any) -> str:
        """The arguments as compact JSON; a single string argument (`{"name": "text"}`) as that string."""
        if isinstance(arguments, str):
            return self.text(arguments, self.max_input_bytes)
        if type(arguments) is dict and len(arguments) == 1:
            [(name, value)] = arguments.items()
            if type(value) is str:
                if looks_secret(str(name), self.redact_keys):
                    return MASK
                return self.text(value, self.max_input_bytes)
        if type(arguments) is dict and self._is_plain(arguments):
            return _dump(arguments).decode()
        return self._json(arguments, self.max_input_bytes)

    def result(self, value: Any) -> str | None:
        """Text as it is, None as None, what JSON can hold as compact JSON, anything else by its `repr`."""
        if value is None:
            return None
        if isinstance(value, str):
            return self.text(value, self.max_result_bytes)
        return self._json(value, self.max_result_bytes)

    def failure(self, error: BaseException | None, traceback: str | None = None) -> str:
        """The exception's type and message, then the traceback where one is given."""
        said = describe(error) if error is not None else "unknown error"
        text = self.text(said, self.max_result_bytes)
        if traceback:
            text += "\n\n" + self.text(traceback, self.max_traceback_bytes, keep_end=True)
        return text

    def response(self, value: Any) -> Any:
        """A JSON-safe, redacted copy; over the cap, the beginning of its JSON text."""
        safe = _Walk(self.max_llm_response_bytes, self.redact_keys).copy(value, 0)
        dumped = _dump(safe)
        if len(dumped) <= self.max_llm_response_bytes:
            return safe
        return cut(dumped.decode(), self.max_llm_response_bytes)

    def text(self, text: str, max_bytes: int, *, keep_end: bool = False) -> str:
        """`text` redacted and capped; `keep_end` keeps its end (a traceback's last lines say most)."""
        if type(text) is not str:
            text = str.__str__(text)
        return _capped(text, max_bytes, self.redact_keys, keep_end=keep_end)

    def _is_plain(self, arguments: dict[Any, Any]) -> bool:
        """Whether no value needs to be capped, redacted or made JSON-safe, as with most jobs: a few short texts and
        numbers. Then the arguments are dumped as they are, without the copy that takes most of the time.
        """
        room = self.max_input_bytes
        if "value" in arguments or "Value" in arguments:  # of what another argument may name
            return False
        for name, value in arguments.items():
            if type(name) is not str or not name.isidentifier() or looks_secret(name, self.redact_keys):
                return False
            if not name.isascii():
                return False
            kind = type(value)
            if kind is str:
                room -= 2 * len(value)  # what is escaped takes two bytes, or is not printable
                if not value.isprintable() or not value.isascii() or could_hold_a_secret(value):
                    return False
            elif not (value is None or kind is bool or (kind is int and -_PLAIN_INT < value < _PLAIN_INT)):
                return False
            room -= len(name) + _PLAIN_ROOM
        return room > 0

    def _json(self, value: Any, max_bytes: int) -> str:
        safe = _Walk(max_bytes, self.redact_keys).copy(value, 0)
        return safe if type(safe) is str else cut(_dump(safe).decode(), max_bytes)


def json_safe(value: Any) -> Any:
    """A copy that JSON can hold, whole and unredacted: for values that a caller sends on purpose."""
    return _Walk(_NO_CAP, None).copy(value, 0)


def to_text(value: Any) -> str | None:
    """Text as it is, None as None, anything else as compact JSON or its `repr`; whole and unredacted."""
    if value is None:
        return None
    safe = json_safe(value)
    return safe if type(safe) is str else _dump(safe).decode()


def describe(error: BaseException) -> str:
    """`Type: message`, also for an exception whose `str` fails."""
    name = type(error).__name__
    try:
        message = str(error)
    except Exception as failure:  # noqa: BLE001 - a user's __str__ may raise anything
        message = f"(its message could not be read: {type(failure).__name__})"
    return f"{name}: {message}" if message else name


def _capped(text: str, max_bytes: int, redact_keys: frozenset[str], *, keep_end: bool = False) -> str:
    if len(text) <= max_bytes and text.isascii() and not could_hold_a_secret(text):
        return text
    size = None
    if len(text) > max_bytes + _SLACK:
        size = _size_of(text)
        if keep_end:  # from the beginning of a line, which says whose value it is
            end = text[-max_bytes - _SLACK :]
            text = end[end.find("\n") + 1 :]
        else:
            text = text[: max_bytes + _SLACK]
    return cut(redact_text(_encodable(text), redact_keys), max_bytes, size=size, keep_end=keep_end)


def cut(text: str, max_bytes: int, *, size: str | None = None, keep_end: bool = False) -> str:
    """`text` of at most `max_bytes` of UTF-8, a cut marked with the full size (`size`, where more was cut before)."""
    if size is None and len(text) * 4 <= max_bytes:
        return text
    encoded = text.encode()
    if size is None and len(encoded) <= max_bytes:
        return text
    mark = _CUT.format(size or f"{len(encoded)} bytes")
    room = max(0, max_bytes - len(mark.encode()))
    if keep_end:
        return mark + encoded[len(encoded) - room :].decode(errors="ignore")
    return encoded[:room].decode(errors="ignore") + mark


class _Walk:
    """One copy of a value: JSON-safe, redacted unless `redact` is None, stopped when `room` bytes are surely filled."""

    __slots__ = ("_path", "_redact", "_room")

    def __init__(self, room: int, redact: frozenset[str] | None) -> None:
        self._room = room
        self._redact = redact
        self._path: set[int] = set()

    def copy(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is str:
            return self._text(value)
        if value is None or kind is bool:
            self._room -= 4
            return value
        if kind is int:
            self._room -= 1
            return value if value.bit_length() < 1024 else f"<int of {value.bit_length()} bits>"
        if kind is float:
            self._room -= 1
            return value if math.isfinite(value) else repr(value)
        if depth >= _DEEPEST:
            return self._text(f"<{kind.__name__}, nested too deep>")
        if id(value) in self._path:
            return self._text("<circular reference>")
        self._path.add(id(value))
        try:
            if kind is dict:
                return self._mapping(value, depth + 1)
            if kind is list or kind is tuple:
                return self._sequence(value, depth + 1)
            return self._container(value, depth + 1)
        except Exception as failure:  # noqa: BLE001 - a user's own class may raise anything here
            return self._text(f"<{kind.__name__} that could not be rendered: {type(failure).__name__}>")
        finally:
            self._path.discard(id(value))

    def _container(self, value: Any, depth: int) -> Any:
        if isinstance(value, Mapping):
            return self._mapping(value, depth)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._mapping(dict(zip(value._fields, value, strict=False)), depth)
        if isinstance(value, _SEQUENCES):
            return self._sequence(value, depth)
        if isinstance(value, Enum):
            return self.copy(value.value, depth)
        if isinstance(value, (SecretStr, SecretBytes)):
            return self._text(MASK)
        if isinstance(value, BaseModel):
            shown = [name for name, field in type(value).model_fields.items() if field.repr and not field.exclude]
            return self._mapping(_attributes(value, shown) | (value.__pydantic_extra__ or {}), depth)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value) if field.repr]
            return self._mapping(_attributes(value, names), depth)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self._text(_decoded(value, max(64, self._room - 64)))
        return self._text(_leaf(value))

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        for named in _NAMED:
            if named in value and any(self._names_a_secret(value.get(naming)) for naming in _NAMING):
                value = {**value, named: MASK}
        for key, item in value.items():
            if self._room < 0:
                copied["…"] = f"[cut, {len(value)} keys in all]"
                break
            name = key if type(key) is str else str(key.value if isinstance(key, Enum) else key)
            self._room -= len(name) + 4
            is_secret = item is not None and type(item) is not bool and self._names_a_secret(name)
            if len(name) >= _SHORT_KEY or not name.isidentifier():
                name = self._key(name)
            copied[name] = MASK if is_secret else self.copy(item, depth)
        return copied

    def _key(self, name: str) -> str:
        if self._redact is None:
            return _encodable(name)
        return _capped(name, max(64, self._room + 64), self._redact)

    def _names_a_secret(self, name: object) -> bool:
        return self._redact is not None and type(name) is str and looks_secret(name, self._redact)

    def _is_secret_label(self, text: object) -> bool:
        return self._names_a_secret(text) and _LABEL.fullmatch(str(text)) is not None

    def _sequence(self, value: Iterable[Any], depth: int) -> list[Any]:
        copied: list[Any] = []
        if isinstance(value, (list, tuple)) and len(value) == 2 and self._is_secret_label(value[0]):
            return [self._text(value[0]), MASK]  # a pair, as in a list of headers
        is_secret = is_login = False
        for item in value:
            if self._room < 0:
                copied.append(f"[cut, {len(value)} items in all]")  # type: ignore[arg-type]
                break
            self._room -= 1
            is_option = type(item) is str and item.startswith("--")
            if is_login and type(item) is str:
                item = without_password(item)
            copied.append(MASK if is_secret and not is_option else self.copy(item, depth))
            is_login = self._redact is not None and type(item) is str and item in LOGIN_OPTIONS
            is_secret = is_option and _OPTION.fullmatch(item) is not None and self._names_a_secret(item)
        return copied

    def _text(self, text: str) -> str:
        if self._redact is None:
            return _encodable(text)
        rendered = _capped(text, max(64, self._room + 64), self._redact)
        self._room -= len(rendered)
        return rendered


def _attributes(value: Any, names: Iterable[str]) -> dict[str, Any]:
    """Those that it has: a model made by `model_construct` may lack some."""
    return {name: each for name in names if (each := getattr(value, name, _ABSENT)) is not _ABSENT}


def _leaf(value: Any) -> str:
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bool, int, float, Decimal, UUID, PurePath, timedelta)):
        return str(value)
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, BaseException):
        return describe(value)
    return repr(value)


def _decoded(value: bytes | bytearray | memoryview, most: int) -> str:
    """UTF-8 as text, anything else as base64; of at most that many bytes."""
    view = memoryview(value).cast("B")
    head = bytes(view[:most])
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        is_split = len(head) < len(view) and error.start > len(head) - 4
        text = head[: error.start].decode() if is_split else base64.b64encode(head[: most * 3 // 4]).decode()
    return text if len(head) == len(view) else text + _CUT.format(f"{len(view)} bytes")


def _encodable(text: str) -> str:
    """`text` with lone surrogates replaced, since UTF-8 cannot hold them."""
    if text.isascii():
        return text
    return text.encode(errors="replace").decode()


def _size_of(text: str) -> str:
    if text.isascii():
        return f"{len(text)} bytes"
    return f"{len(text.encode(errors='replace'))} bytes" if len(text) <= _COUNTED else f"{len(text)} characters"


def _dump(safe: Any) -> bytes:
    return to_json(safe, inf_nan_mode="strings")
