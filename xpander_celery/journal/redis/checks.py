"""What a Redis server must and should be set to, so that it keeps what it was given."""

from __future__ import annotations

import logging

from xpander_celery.errors import JournalError
from xpander_celery.journal.redis.client import Client, Refusal

_logger = logging.getLogger(__name__)


def check(client: Client) -> None:
    """Raise `JournalError` for a server that evicts our events or refuses us; warn of one that a crash makes lose them.

    Raises OSError where it does not answer.
    """
    for what, remedy in troubles(client):
        _logger.warning("Redis at %s %s: %s", client.address, what, remedy, extra={"event": "journal_redis_setting"})


def troubles(client: Client) -> list[tuple[str, str]]:
    """What such a server does, and the remedy; none for one that is set well. Raises as `check`."""
    replies = client.call([["INFO", "memory"], ["INFO", "persistence"]])
    for reply in replies:
        if isinstance(reply, Refusal):
            if reply.code in ("NOAUTH", "WRONGPASS"):
                raise JournalError(f"Redis at {client.address} wants a password: put it into the journal's URL")
            return []  # a server that does not tell; what it refuses later goes to files
    known = dict(line.split(":", 1) for reply in replies for line in reply.decode().splitlines() if ":" in line)
    policy = known.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys"):
        raise JournalError(
            f"Redis at {client.address} drops events when its memory is full (maxmemory-policy {policy}): "
            "set it to noeviction, or give the journal a Redis of its own"
        )
    found = []
    if policy != "noeviction":
        found.append((f"drops heartbeats when its memory is full (maxmemory-policy {policy})", "set it to noeviction"))
    if known.get("aof_enabled") == "0":
        found.append(("loses events when it crashes (appendonly no)", "set appendonly to yes"))
    return found
