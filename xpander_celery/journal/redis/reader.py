"""The reading side of the Redis journal, for the one relay that holds the lease; other relays stand by.

Entries are acknowledged and removed when their batch is settled, or, with `keeps_until_delivered`, when the relay says
that what they led to is delivered: where the relay's own disk may go away with it, only Redis keeps them until then.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from xpander_celery.events import VERSION, Event, UnreadableEventError, decode
from xpander_celery.journal import Batch, Term
from xpander_celery.journal.liveness import new_process_id
from xpander_celery.journal.notices import Notice
from xpander_celery.journal.reader import FileReader
from xpander_celery.journal.redis.client import Client, Command, RefusedError
from xpander_celery.journal.redis.keys import (
    CLAIM,
    CONSUMER,
    DROPPED_FIELD,
    GROUP,
    MAKE_GROUP,
    NOT_HELD,
    READ,
    Keys,
    max_entries_of,
)
from xpander_celery.journal.redis.lease import LEASE_S, Lease
from xpander_celery.journal.redis.pulse import Pulse
from xpander_celery.journal.redis.spool import Spool
from xpander_celery.redis_address import Address

_TIMEOUT_S = 2.0
_RETRY_S = 1.0
_LAST_WORDS_S = 5.0
_BATCH_BYTES = 4 * 1024**2
_ENTRIES_PER_CALL = 100
_CORRUPT_KEPT = 500
_BEGINNING = "0-0"
_MOST_DIGITS = 20  # Python refuses to read numbers of thousands
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    event: Event | None = None
    dropped: int = 0
    debris: bytes | None = None
    size: int = 0


class RedisReader:
    """Reads the stream of `destination`. While Redis does not answer, or another relay is active, batches are empty.

    `identity` names the relay's index. What workers of this machine spilled to `directory` is brought over to Redis.
    """

    def __init__(
        self,
        url: str,
        destination: str,
        *,
        identity: str | None = None,
        directory: Path | None = None,
        max_bytes: int = 1024**3,
        keeps_until_delivered: bool = False,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = Client(Address.parse(url), timeout_s=_TIMEOUT_S)
        self._keys = Keys(destination)
        self._keeps_until_delivered = keeps_until_delivered
        self._clock = clock
        # an index is another one to a later release, which reads again what this one left alone
        identity = f"{identity or new_process_id()}.{VERSION}"
        self._lease = Lease(self._client, self._keys, identity=identity, lease_s=lease_s, clock=clock)
        self._term = 0
        self._pulse = Pulse(self._client, self._keys, clock=clock)
        self._spilled = FileReader(directory) if directory is not None else None
        self._spool = Spool(directory, self._keys, max_entries_of(max_bytes), clock) if directory is not None else None
        self._positions: dict[str, int] = {}  # of the last entry that was settled, as `_position` writes it
        self._unsettled: dict[str, _Entry] = {}
        self._claim_from: str | None = None  # what a relay before this one had taken is looked through from here
        self._to_acknowledge: list[str] = []
        self._backlog_bytes = 0
        self._retry_at = float("-inf")
        self._trouble = Notice(_logger, "journal_redis_trouble", clock=clock)
        self._newer = Notice(_logger, "journal_newer", clock=clock)
        self._damage = Notice(_logger, "journal_corrupt", clock=clock)

    @property
    def is_active(self) -> bool:
        """Whether this relay is the one that reads, as far as is known."""
        return self._lease.term is not None

    def lead(self) -> Term | None:
        """Take or keep the lease. While Redis does not answer, a term goes on to its end."""
        if self._is_reachable():
            try:
                self._lease.keep()
            except (OSError, RefusedError) as error:
                self._meet_trouble(error)
        term = self._lease.term
        if term is not None and term.number != self._term:  # what was taken and not settled comes from Redis again
            self._term = term.number
            self._unsettled.clear()
            self._claim_from = _BEGINNING
        return term

    def resume(self, positions: Mapping[str, int]) -> None:
        """Go on behind what the index has, where Redis says that this index was the last to be written to."""
        term = self._lease.term
        is_known = term is not None and term.is_continued and not self._lease.is_first
        self._positions = dict(positions) if is_known else {}
        self._take_again()

    def poll(self, limit: int) -> Batch:
        """At most `limit` events (and about 4 MiB) beyond what was settled; what is not settled comes again.

        Nothing without the term that `lead` spoke of last, or while Redis is away; `is_whole` says so.
        """
        term = self._lease.term
        if term is None or term.number != self._term or not self._is_reachable():
            return Batch(positions=self._positions, is_whole=False)
        try:
            self._acknowledge_left_over()
            self._fetch(limit)
        except RefusedError as error:
            if error.code == NOT_HELD:
                self._lease.lose()
            else:
                self._meet_trouble(error)
            return Batch(positions=self._positions, is_whole=False)
        except OSError as error:
            self._meet_trouble(error)
            self._take_again()  # what Redis gave, in a reply that was lost
            return Batch(positions=self._positions, is_whole=False)
        return self._batch(limit)

    def settle(self, batch: Batch) -> None:
        """Forget what `batch` read."""
        settled = {entry_id: self._unsettled.pop(entry_id, None) for entry_id in batch.finished}
        debris = [entry.debris for entry in settled.values() if entry is not None and entry.debris is not None]
        if debris:
            self._damage.warn(
                "%d unreadable entries of %s: kept in %s", len(debris), self._client.address, self._keys.corrupt
            )
            self._keep_aside(debris)
        self._positions = batch.positions
        kept = set(batch.receipts)
        self._to_acknowledge.extend(entry_id for entry_id in settled if entry_id not in kept)
        if self._is_reachable():  # where this fails, a later poll does it
            try:
                self._acknowledge_left_over()
            except (OSError, RefusedError) as error:
                self._meet_trouble(error)

    def acknowledge(self, receipts: Sequence[str]) -> bool:
        """Remove the entries of these receipts from Redis."""
        if not self._is_reachable():
            return False
        try:
            for place in range(0, len(receipts), _ENTRIES_PER_CALL):
                self._remove(receipts[place : place + _ENTRIES_PER_CALL])
        except (OSError, RefusedError) as error:
            self._meet_trouble(error)
            return False
        return True

    def share(self, name: str, value: Mapping[str, Any], *, lasts_s: int) -> None:
        """Tell the other relays; only the active one does."""
        if not self.is_active or not self._is_reachable():
            return
        try:
            self._client.ask("SET", self._keys.shared(name), json.dumps(value), "EX", lasts_s)
        except (OSError, RefusedError) as error:
            self._meet_trouble(error)

    def shared(self, name: str) -> Mapping[str, Any] | None:
        """What the active relay, or the last one, said under this name; None where that is not known."""
        if not self._is_reachable():
            return None
        try:
            text = self._client.ask("GET", self._keys.shared(name))
            value = json.loads(text) if text is not None else None
        except (OSError, RefusedError) as error:
            self._meet_trouble(error)
            return None
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def is_alive(self, process_id: str) -> bool:
        """False once the process said that it is gone, or its heartbeat was missed for long; in doubt it is alive."""
        if not self._is_reachable():
            return True
        try:
            return self._pulse.is_alive(process_id)
        except (OSError, RefusedError) as error:
            self._meet_trouble(error)
            return True

    def backlog_bytes(self) -> int:
        """What is in the stream, and not removed yet; the last known figure while Redis does not answer."""
        if self._is_reachable():
            try:
                self._backlog_bytes = self._stream_bytes()
            except (OSError, RefusedError) as error:
                self._meet_trouble(error)
        return self._backlog_bytes

    def sync(self) -> None:
        """Redis syncs its own append-only file; what was spilled here is synced, and brought over once that can be."""
        if self._spilled is None or self._spool is None:
            return
        self._spilled.sync()
        if self._is_reachable():
            try:
                self._spool.drain(self._client)
            except (OSError, RefusedError) as error:
                self._meet_trouble(error)

    def close(self) -> None:
        """Let another relay take over at once, and bring over what was spilled here."""
        try:
            self._lease.give_up()
            until = self._clock() + _LAST_WORDS_S
            while self._spool is not None and not self._spool.drain(self._client) and self._clock() < until:
                continue
        except (OSError, RefusedError) as error:
            self._meet_trouble(error)
        if self._spool is not None:
            self._spool.let_go()
        self._client.forget()

    def _is_reachable(self) -> bool:
        return self._clock() >= self._retry_at

    def _meet_trouble(self, trouble: Exception) -> None:
        self._retry_at = self._clock() + _RETRY_S
        self._pulse.forget_missing()
        self._trouble.warn("Redis at %s does not serve the relay: %s", self._client.address, trouble)

    def _take_again(self) -> None:
        """Begin with all that was taken and is not settled."""
        self._unsettled.clear()
        self._claim_from = next((_following(*item) for item in self._positions.items()), _BEGINNING)

    def _fetch(self, limit: int) -> None:
        """Take entries until there are as many as wanted, or no more."""
        while len(self._unsettled) < limit and sum(each.size for each in self._unsettled.values()) < _BATCH_BYTES:
            wanted = min(_ENTRIES_PER_CALL, limit - len(self._unsettled))
            if self._claim_from is not None:
                following, entries, *_ = self._ask_group(CLAIM, wanted, self._claim_from)
                self._claim_from = None if following == _BEGINNING.encode() else following.decode()
                self._take(entries)
                continue
            found = self._ask_group(READ, wanted)
            entries = found[0][1] if found else []
            self._take(entries)
            if len(entries) < wanted:
                return

    def _ask_group(self, script: str, count: int, *more: str) -> Any:
        """What a script says of the group, which is made where there is none: at first, or after FLUSHALL."""
        keys = (2, self._keys.stream, self._keys.lease)
        command: Command = ("EVAL", script, *keys, self._lease.holder, GROUP, CONSUMER, count, *more)
        try:
            return self._client.ask(*command)
        except RefusedError as error:
            if error.code != "NOGROUP":
                raise
        try:
            self._client.ask("EVAL", MAKE_GROUP, 1, self._keys.stream, GROUP)
        except RefusedError as error:
            if error.code != "BUSYGROUP":
                raise
        return self._client.ask(*command)

    def _take(self, entries: Sequence[Any]) -> None:
        for found in entries:
            if found is None:
                continue
            entry_id = found[0].decode()
            if found[1] is None:  # removed by hand: Redis 6.2 still lists it
                self._to_acknowledge.append(entry_id)
                continue
            entry = self._read(found[1])
            if entry is not None:
                self._unsettled[entry_id] = entry

    def _read(self, fields: Sequence[bytes]) -> _Entry | None:
        """The entry, or None for one of a newer release, which stays pending until a relay of that release comes."""
        field, value = fields[0], fields[1]
        if field[:1] == b"e" and field[1:].isdigit() and len(field) < _MOST_DIGITS:
            if int(field[1:]) > VERSION:
                self._newer.warn(
                    "%s holds events of a newer release, which are left alone: let a relay of that release read them",
                    self._client.address,
                )
                return None
            try:
                return _Entry(event=decode(value), size=len(value))
            except UnreadableEventError:
                return _Entry(debris=value, size=len(value))
        if field == DROPPED_FIELD.encode() and value.isdigit() and len(value) < _MOST_DIGITS:
            return _Entry(dropped=int(value))
        return _Entry(debris=value, size=len(value))

    def _batch(self, limit: int) -> Batch:
        entries = dict(islice(self._unsettled.items(), limit))
        events = {entry_id: entry.event for entry_id, entry in entries.items() if entry.event is not None}
        return Batch(
            events=list(events.values()),
            corrupt=sum(entry.debris is not None for entry in entries.values()),
            dropped=sum(entry.dropped for entry in entries.values()),
            size=sum(entry.size for entry in entries.values()),
            positions=_position(next(reversed(entries))) if entries else self._positions,
            finished=frozenset(entries),
            receipts=tuple(events) if self._keeps_until_delivered else (),
        )

    def _keep_aside(self, debris: Sequence[bytes]) -> None:
        try:
            push: Command = ["LPUSH", self._keys.corrupt, *debris]
            self._client.tell([push, ["LTRIM", self._keys.corrupt, 0, _CORRUPT_KEPT - 1]])
        except (OSError, RefusedError) as error:
            self._meet_trouble(error)

    def _acknowledge_left_over(self) -> None:
        while self._to_acknowledge:
            ids = self._to_acknowledge[:_ENTRIES_PER_CALL]
            self._remove(ids)
            del self._to_acknowledge[: len(ids)]

    def _remove(self, ids: Sequence[str]) -> None:
        try:
            self._client.tell([["XACK", self._keys.stream, GROUP, *ids], ["XDEL", self._keys.stream, *ids]])
        except RefusedError as error:
            if error.code != "NOGROUP":  # FLUSHALL took them
                raise

    def _stream_bytes(self) -> int:
        if not self._client.ask("XLEN", self._keys.stream):
            return 0
        return int(self._client.ask("MEMORY", "USAGE", self._keys.stream) or 0)


def _position(entry_id: str) -> dict[str, int]:
    """The id of an entry as the index keeps places: the millisecond is the segment, the number in it the position."""
    millisecond, _, number = entry_id.partition("-")
    return {millisecond: int(number)}


def _following(millisecond: str, number: int) -> str:
    return f"{millisecond}-{number + 1}"
