"""Where a Redis server is, as a URL says it. Layer 0: pure, and light, since the relay needs it as the settings do."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from xpander_celery.errors import JournalError

SCHEMES = ("redis", "rediss", "unix", "valkey", "valkeys")


def is_url(journal: str | None) -> bool:
    """Whether the setting `journal` means a Redis server, and no directory."""
    return journal is not None and "://" in journal


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Redis server is, and how to get in."""

    host: str = "localhost"
    port: int = 6379
    path: str | None = None  # of a Unix socket
    database: int = 0
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    is_encrypted: bool = False
    verifies: bool = True
    authorities: str | None = None

    @classmethod
    def parse(cls, url: str) -> Address:
        """From `redis://[[user]:password@]host[:port][/database]`, `rediss://…` (TLS), `unix://path`; also `valkey(s)://`.

        Options in the query, as redis-py names them: `db`, `ssl_cert_reqs` (`none`), `ssl_ca_certs`. Raises
        `JournalError`, whose text never has the password.
        """
        try:
            parts = urlsplit(url)
            options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
            is_socket = parts.scheme == "unix"
            database = options.pop("db", None) or ("" if is_socket else parts.path.strip("/")) or "0"
            address = cls(
                host=parts.hostname or "localhost",
                port=parts.port or 6379,
                path=unquote(parts.path) if is_socket else None,
                database=int(database),
                username=unquote(parts.username) if parts.username else None,
                password=unquote(parts.password) if parts.password else None,
                is_encrypted=parts.scheme in ("rediss", "valkeys"),
                verifies=options.pop("ssl_cert_reqs", "required") != "none",
                authorities=options.pop("ssl_ca_certs", None),
            )
        except ValueError:  # whose text may hold a part of the password
            raise JournalError(
                "the journal's URL cannot be read; it looks like redis://user:password@host:6379/0"
            ) from None
        if parts.scheme not in SCHEMES or options:
            problem = f"unknown options {sorted(options)}" if options else f"an unknown scheme, {parts.scheme!r}"
            raise JournalError(f"the journal's URL has {problem}; known schemes: {', '.join(SCHEMES)}")
        return address

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}/{self.database}"

    def greeting(self) -> list[list[str | int]]:
        """The commands that come before all others."""
        commands: list[list[str | int]] = []
        if self.password is not None:
            commands.append(["AUTH", *([self.username] if self.username else []), self.password])
        if self.database:
            commands.append(["SELECT", self.database])
        return commands
