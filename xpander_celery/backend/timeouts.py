"""How long a call may take. Kept apart from `transport`, so that a Backend can be built without loading httpx."""

from __future__ import annotations

from dataclasses import dataclass, fields

from xpander_celery.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds: the longest wait for a connection, for the next bytes of an answer, and for a whole exchange."""

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 15.0
    total_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ConfigurationError(field.name, f"is {value!r}", "Give a positive number of seconds.")
