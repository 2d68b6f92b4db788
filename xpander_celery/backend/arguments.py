# ruff: noqa: A002 - the keywords are the official ones
"""What a caller passes to `Backend` as what the platform takes: rendered safely, or refused with the field's name.

Every public function either returns something that JSON can hold or raises `InvalidValueError`, whatever it is given.
Identities and numbers are never guessed: an id, a token count or a duration that is not one is refused. Free text and
`llm_response` are rendered, since a report with a `repr` in it is worth more than none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import quote
from uuid import UUID

from pydantic_core import to_json

from xpander_celery.errors import InvalidValueError
from xpander_celery.rendering import json_safe, to_text
from xpander_celery.report import TaskReport, Tokens

_T = TypeVar("_T")
_MAX_COUNT = 2**63 - 1
_TOKEN_FIELDS = ("completion_tokens", "prompt_tokens", "cache_read_tokens", "cache_write_tokens")


def report_of(
    *,
    agent_id: Any,
    id: Any = None,
    input: Any = None,
    llm_response: Any = None,
    tokens: Any = None,
    is_success: Any = True,
    result: Any = None,
    duration: Any = 0,
    used_tools: Any = None,
) -> TaskReport:
    """The report that the arguments of `areport_external_task` describe."""
    return TaskReport(
        agent_id=identifier("agent_id", agent_id),
        id=None if id is None else identifier("id", id),
        input=read("input", to_text, input),
        llm_response=json_value("llm_response", llm_response),
        tokens=read("tokens", _tokens, tokens),
        is_success=truth("is_success", is_success),
        result=read("result", to_text, result),
        duration=read("duration", _seconds, duration),
        used_tools=read("used_tools", _tool_names, used_tools),
    )


def read(field: str, function: Callable[[Any], _T], value: Any) -> _T:
    """`function(value)`, where reading a value of a user's own class may raise anything at all."""
    try:
        return function(value)
    except InvalidValueError:
        raise
    except Exception as error:
        raise InvalidValueError(field, f"cannot be read ({type(error).__name__}), is {_kind(value)}") from error


def agent_of(agent_id: Any, agent: Any = None, default: str | None = None) -> str:
    """The agent's id: of the object `agent`, else `agent_id`, else the default."""
    if agent is not None:
        return identifier("agent.id", read("agent.id", lambda it: getattr(it, "id", None), agent))
    if agent_id is None or (type(agent_id) is str and not agent_id):
        agent_id = default
    if agent_id is None:
        raise InvalidValueError("agent_id", "is missing: pass agent_id, or set XPANDER_AGENT_ID")
    return identifier("agent_id", agent_id)


def identifier(field: str, value: Any) -> str:
    """An id as text."""
    if type(value) is UUID or (type(value) is int and value.bit_length() < 64):
        return str(value)
    text = read(field, _plain_text, value)
    if text is None:
        raise InvalidValueError(field, f"must be text, is {_kind(value)}")
    if not text.strip():
        raise InvalidValueError(field, "is empty")
    return text


def segment(field: str, value: Any) -> str:
    """An id escaped for a URL's path, so that no character of it can lead to another route."""
    text = identifier(field, value)
    if text in (".", ".."):
        raise InvalidValueError(field, f"cannot be {text!r}")
    return quote(text, safe="")


def json_value(field: str, value: Any) -> Any:
    """What JSON can hold as it is, anything else rendered."""
    if value is None:
        return None
    try:
        plain = json.loads(json.dumps(value, allow_nan=False, ensure_ascii=False))
        to_json(plain)  # refuses lone surrogates, and nesting deeper than the encoder of reports can follow
    except Exception:  # noqa: BLE001 - a user's own class may raise anything while it is read
        return read(field, json_safe, value)
    return plain


def truth(field: str, value: Any) -> bool:
    """True or False."""
    if value is True or value is False:
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise InvalidValueError(field, f"must be True or False, is {_kind(value)}")


def _plain_text(value: Any) -> str | None:
    """A text as exactly `str` (a subclass may print as something else), None for anything that is no text."""
    if not isinstance(value, str):
        return None
    text = str.__str__(value)
    text.encode()
    return text


def _tokens(value: Any) -> Tokens | None:
    """Ours, the official client's object, or a mapping with its keys."""
    if value is None or type(value) is Tokens:
        return value
    given: Callable[[str], Any] = value.get if isinstance(value, Mapping) else lambda name: getattr(value, name, None)
    counts = {name: given(name) for name in _TOKEN_FIELDS}
    if counts["prompt_tokens"] is None and counts["completion_tokens"] is None:
        raise InvalidValueError("tokens", f"must have prompt_tokens or completion_tokens, is {_kind(value)}")
    return Tokens(**{name: _count(f"tokens.{name}", count) for name, count in counts.items()})


def _count(field: str, value: Any) -> int:
    if value is None:
        return 0
    number = value if type(value) is int else read(field, float, value)
    if not 0 <= number <= _MAX_COUNT or number != int(number):
        raise InvalidValueError(field, "must be a whole number, zero or more")
    return int(number)


def _seconds(value: Any) -> float:
    if value is None:
        return 0.0
    seconds = float(value.total_seconds() if isinstance(value, timedelta) else value)
    if not math.isfinite(seconds):
        raise InvalidValueError("duration", f"must be a finite number of seconds, is {seconds}")
    return seconds


def _tool_names(value: Any) -> tuple[str, ...]:
    """Names of tools. A single text is one name, not its letters; a callable counts by its name."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (_tool_name(value),)
    if not isinstance(value, Collection) or isinstance(value, (Mapping, bytes, bytearray, memoryview)):
        raise InvalidValueError("used_tools", f"must be a list of names, is {_kind(value)}")
    return tuple(_tool_name(tool) for tool in value)


def _tool_name(tool: Any) -> str:
    if not isinstance(tool, str):
        names = (getattr(tool, attribute, None) for attribute in ("name", "__name__"))
        tool = next((name for name in names if isinstance(name, str)), tool)
    return "None" if tool is None else to_text(tool) or ""


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
