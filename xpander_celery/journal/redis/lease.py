"""The lease that makes one relay the active one. It runs out by itself when its holder is gone."""

from __future__ import annotations

from collections.abc import Callable

from xpander_celery.journal.liveness import new_process_id
from xpander_celery.journal.redis.client import Client

LEASE_S = 15.0


class Lease:
    """A key that holds the id of the active relay, for `lease_s` from its last word. Methods raise as `Client` does."""

    def __init__(self, client: Client, key: str, *, lease_s: float, clock: Callable[[], float]) -> None:
        self.holder = new_process_id()
        self.is_held = False
        self._client = client
        self._key = key
        self._lease_s = lease_s
        self._clock = clock
        self._ask_at = float("-inf")

    def keep(self) -> bool:
        """Take the lease, or keep it, and say whether it is held. Asks Redis three times in its duration."""
        now = self._clock()
        if now < self._ask_at:
            return self.is_held
        self.is_held = False  # also if what follows fails: then it may run out
        self.is_held = self._is_prolonged() or self._is_taken()
        self._ask_at = now + self._lease_s / 3
        return self.is_held

    def give_up(self) -> None:
        """Let another relay take it."""
        if self.is_held:
            self.is_held = False
            self._ask_at = float("-inf")
            if self._is_prolonged():
                self._client.ask("DEL", self._key)

    def _is_prolonged(self) -> bool:
        # should the lease run out between the two commands, another relay's is prolonged, which does no harm
        is_ours: bool = self._client.ask("GET", self._key) == self.holder.encode()
        return is_ours and self._client.ask("PEXPIRE", self._key, self._lease_ms) == 1

    def _is_taken(self) -> bool:
        reply = self._client.ask("SET", self._key, self.holder, "NX", "PX", self._lease_ms)
        return reply is not None

    @property
    def _lease_ms(self) -> int:
        return int(self._lease_s * 1000)
