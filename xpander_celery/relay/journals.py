"""Which journal the settings mean, seen from the relay's side: how it is read, and how its reader is asked.

Light: it loads what the one kind of journal needs, when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from xpander_celery.journal import JournalReader
from xpander_celery.relay import mailbox
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.status import Status, is_running

STATUS = "status"  # what the relay that leads shares with the others


def open_reader(
    config: RelayConfig, *, identity: str, clock: Callable[[], float]
) -> tuple[JournalReader, Sequence[mailbox.Postbox]]:
    """The reader of the journal, for the relay whose index has this identity, and where else it may be asked."""
    if config.journal is None:
        from xpander_celery.journal.reader import FileReader

        return FileReader(config.directory), ()
    from xpander_celery.journal.redis.reader import RedisReader
    from xpander_celery.relay.redis_mailbox import RedisMailbox

    destination = config.directory.name
    reader = RedisReader(
        config.journal,
        destination,
        identity=identity,
        directory=config.directory,
        max_bytes=config.max_journal_bytes,
        keeps_until_delivered=True,
        clock=clock,
    )
    return reader, (RedisMailbox(config.journal, destination, clock=clock),)


def ask(config: RelayConfig, verb: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any] | None:
    """Ask the relay that delivers, wherever it runs; None where none does, or it did not answer in time."""
    if config.journal is None:
        return mailbox.ask(config.directory, verb, timeout_s=timeout_s, **arguments)
    from xpander_celery.relay import redis_mailbox

    return redis_mailbox.ask(config.journal, config.directory.name, verb, timeout_s=timeout_s, **arguments)


def leader(config: RelayConfig) -> Status | None:
    """What the relay that delivers said of itself lately, wherever it runs; None where none does."""
    if config.journal is None:
        return Status.read(config.directory) if is_running(config.directory) else None
    from xpander_celery.journal.redis.reader import RedisReader

    reader = RedisReader(config.journal, config.directory.name)
    said = reader.shared(STATUS)
    reader.close()
    return Status.of(said) if said is not None else None
