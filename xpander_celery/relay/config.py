"""What the relay has to know, as plain values, and how it reaches the relay's process. Light: the standard library.

The values travel in the environment, the API key under the name that the platform's own client reads. Neither an
argument vector nor a repr ever holds the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from xpander_celery.errors import ConfigurationError

VARIABLE = "XPANDER_CELERY_RELAY_CONFIG"  # not the name of a setting: user code may load those in the relay
_PLATFORM = {  # what an own backend may want to read from the environment as well
    "api_key": "XPANDER_API_KEY",
    "organization_id": "XPANDER_ORGANIZATION_ID",
    "base_url": "XPANDER_BASE_URL",
}
_NO_SETTINGS = ("search_path", "loaded_at")  # where a worker runs, and since when, makes no other relay


@dataclass(frozen=True, slots=True)
class RelayConfig:
    """The relay's share of the settings (described in `settings.py`, under the same names), and its place.

    `directory` is the folder of one destination. `journal` is the URL of a journal in Redis; without one it is in
    `directory`. `search_path` is where `backend` and `before_send` are imported
    from. `loaded_at` (seconds since the epoch) is the age of the settings: the newest ones win.
    """

    directory: Path
    api_key: str | None = field(default=None, repr=False)
    organization_id: str | None = None
    base_url: str | None = None
    journal: str | None = field(default=None, repr=False)  # it may hold a password
    backend: str | None = None
    before_send: str | None = None
    rate_limit_per_minute: int | None = None
    concurrency: int = 8
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 15.0
    total_timeout_s: float = 30.0
    redelivery_wait_s: float = 7200.0
    max_age_s: float = 14 * 86400.0
    max_journal_bytes: int = 1024**3
    max_index_bytes: int = 4 * 1024**3
    search_path: tuple[str, ...] = ()
    loaded_at: float = 0.0

    @classmethod
    def from_values(cls, directory: Path, values: Mapping[str, Any], **more: Any) -> Self:
        """From `Settings.model_dump()`, of which the relay's share is taken."""
        known = {each.name for each in fields(cls)}
        chosen = {name: value for name, value in values.items() if name in known}
        if hasattr(chosen.get("api_key"), "get_secret_value"):
            chosen["api_key"] = chosen["api_key"].get_secret_value()
        return cls(directory=directory, **chosen, **more)

    def to_environ(self) -> dict[str, str]:
        """The variables by which a relay gets this configuration. An empty one counts as unset."""
        values = asdict(self) | {"directory": str(self.directory)}
        platform = {variable: values.pop(name) or "" for name, variable in _PLATFORM.items()}
        return platform | {VARIABLE: json.dumps(values)}

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """The configuration that `to_environ` put there; raises `ConfigurationError` where there is none."""
        try:
            values = json.loads(environ[VARIABLE])
            values["directory"] = Path(values["directory"])
            values["search_path"] = tuple(values["search_path"])
            values |= {name: environ.get(variable) or None for name, variable in _PLATFORM.items()}
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            remedy = "Start the relay by `xpander-celery relay`, which sets it."
            raise ConfigurationError(VARIABLE, "is missing or is not the relay's", remedy) from error

    @property
    def fingerprint(self) -> str:
        """A hash of everything that would make another relay; it does not give the key away."""
        values = {name: value for name, value in asdict(self).items() if name not in _NO_SETTINGS}
        return sha256(json.dumps(values, default=str, sort_keys=True).encode()).hexdigest()[:32]
