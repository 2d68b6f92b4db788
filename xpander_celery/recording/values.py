"""Read strangers' values by name, mappings and objects alike. What cannot be had is not there. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xpander_celery.recording.contained import pass_limit

_LATEST_S = 2**33  # the year 2242: more is no time in seconds


def value_at(source: object, name: str) -> Any:
    """An entry of a mapping or an attribute of an object; None where there is none or it cannot be had."""
    try:
        return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
    except Exception as failure:  # noqa: BLE001  the attribute may be a property of a stranger, the mapping his own
        pass_limit(failure)
        return None


def result_of(method: Callable[[], object]) -> object:
    """What a method returns; None where it raises."""
    try:
        return method()
    except Exception as failure:  # noqa: BLE001  a stranger's method
        pass_limit(failure)
        return None


def items_of(value: object) -> Sequence[object]:
    """The items of a list; none of anything else."""
    return value if isinstance(value, (list, tuple)) else ()


def text_in(value: object) -> str | None:
    """A plain `str`: a class derived from it may compare and hash as it likes. None for an empty one."""
    return str.__str__(value) or None if isinstance(value, str) else None


def nanoseconds(seconds: object) -> int | None:
    """A time in seconds since the epoch, in nanoseconds."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < _LATEST_S:
        return None
    return int(seconds * 1e9)
