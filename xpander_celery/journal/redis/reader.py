"""The reading side of the Redis journal, for the one relay that holds the lease; other relays stand by.

Entries are acknowledged and removed when their batch is settled, or, with `keeps_until_delivered`, when the relay says
that what they led to is delivered: where the relay's own disk may go away with it, only Redis keeps them until then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from xpander_celery.events import VERSION, Event, UnreadableEventError, decode
from xpander_celery.journal import Batch
from xpander_celery.journal.notices import Notice
from xpander_celery.journal.redis.client import Client, Command, RefusedError
from xpander_celery.journal.redis.keys import CONSUMER, DROPPED_FIELD, GROUP, Keys
from xpander_celery.journal.redis.lease import LEASE_S, Lease
from xpander_celery.journal.redis.pulse import Pulse
from xpander_celery.redis_address import Address

_TIMEOUT_S = 2.0
_RETRY_S = 1.0
_BATCH_BYTES = 4 * 1024**2
_ENTRIES_PER_CALL = 100
_CORRUPT_KEPT = 500
_BEGINNING = "0-0"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    event: Event | None = None
    dropped: int = 0
    debris: bytes | None = None
    size: int = 0


class RedisReader:
    """Reads the stream of `destination`. While Redis does not answer, or another relay is active, batches are empty."""

    def __init__(
        self,
        url: str,
        destination: str,
        *,
        keeps_until_delivered: bool = False,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = Client(Address.parse(url), timeout_s=_TIMEOUT_S)
        self._keys = Keys(destination)
        self._keeps_until_delivered = keeps_until_delivered
        self._clock = clock
        self._lease = Lease(self._client, self._keys.lease, lease_s=lease_s, clock=clock)
        self._pulse = Pulse(self._client, self._keys, clock=clock)
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
        return self._lease.is_held

    def resume(self, positions: Mapping[str, int]) -> None:
        """Nothing to do: Redis itself knows what was acknowledged."""

    def poll(self, limit: int) -> Batch:
        """At most `limit` events (and about 4 MiB) beyond what was settled; what is not settled comes again."""
        try:
            if not self._is_reachable() or not self._is_turn():
                return Batch()
            self._acknowledge_left_over()
            self._fetch(limit)
        except (OSError, RefusedError) as error:
            self._meet_trouble(error)
            return Batch()
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
        kept = set(batch.receipts) if self._keeps_until_delivered else set()
        self.acknowledge([entry_id for entry_id in settled if entry_id not in kept])

    def acknowledge(self, receipts: Sequence[str]) -> None:
        """Remove the entries of these `receipts` from Redis; where that fails, it is done by a later poll."""
        self._to_acknowledge.extend(receipts)
        if not self._is_reachable():
            return
        try:
            self._acknowledge_left_over()
        except (OSError, RefusedError) as error:
            self._meet_trouble(error)

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
        """Nothing to do: Redis syncs its own append-only file."""

    def close(self) -> None:
        """Let another relay take over at once."""
        try:
            self._lease.give_up()
        except (OSError, RefusedError) as error:
            self._meet_trouble(error)
        self._client.forget()

    def _is_reachable(self) -> bool:
        return self._clock() >= self._retry_at

    def _meet_trouble(self, trouble: Exception) -> None:
        self._retry_at = self._clock() + _RETRY_S
        self._pulse.forget_missing()
        self._trouble.warn("Redis at %s does not serve the relay: %s", self._client.address, trouble)

    def _is_turn(self) -> bool:
        was_held = self._lease.is_held
        is_held = self._lease.keep()
        if is_held and not was_held:  # what was taken and not acknowledged comes from Redis again
            self._unsettled.clear()
            self._claim_from = _BEGINNING
        return is_held

    def _fetch(self, limit: int) -> None:
        """Take entries until there are as many as wanted, or no more."""
        while len(self._unsettled) < limit and sum(each.size for each in self._unsettled.values()) < _BATCH_BYTES:
            wanted = min(_ENTRIES_PER_CALL, limit - len(self._unsettled))
            if self._claim_from is not None:
                claim: Command = ["XAUTOCLAIM", self._keys.stream, GROUP, CONSUMER, 0, self._claim_from]
                following, entries, *_ = self._ask_group([*claim, "COUNT", wanted])
                self._claim_from = None if following == _BEGINNING.encode() else following.decode()
                self._take(entries)
                continue
            read: Command = ["XREADGROUP", "GROUP", GROUP, CONSUMER, "COUNT", wanted]
            found = self._ask_group([*read, "STREAMS", self._keys.stream, ">"])
            entries = found[0][1] if found else []
            self._take(entries)
            if len(entries) < wanted:
                return

    def _ask_group(self, command: Command) -> Any:
        """The reply to a command on the group, which is made where there is none: at first, or after FLUSHALL."""
        try:
            return self._client.ask(*command)
        except RefusedError as error:
            if error.code != "NOGROUP":
                raise
        try:
            self._client.ask("XGROUP", "CREATE", self._keys.stream, GROUP, 0, "MKSTREAM")
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
        if field[:1] == b"e" and field[1:].isdigit():
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
        if field == DROPPED_FIELD.encode() and value.isdigit():
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
            finished=frozenset(entries),
            receipts=tuple(events),
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
            self._client.tell([["XACK", self._keys.stream, GROUP, *ids], ["XDEL", self._keys.stream, *ids]])
            del self._to_acknowledge[: len(ids)]

    def _stream_bytes(self) -> int:
        if not self._client.ask("XLEN", self._keys.stream):
            return 0
        return int(self._client.ask("MEMORY", "USAGE", self._keys.stream) or 0)
