"""Whether processes live, by their heartbeats. A missing one proves nothing until it is missed for `GRACE_S`.

Heartbeats go missing for a while when Redis restarts without its data, and workers come back to it only some time
after a failure.
"""

from __future__ import annotations

from collections.abc import Callable

from xpander_celery.journal.redis.client import Client
from xpander_celery.journal.redis.keys import GONE, Keys

GRACE_S = 20.0

_FRESH_S = 1.0
_ASKED_WITHIN_S = 60.0


class Pulse:
    """Answers from a snapshot of at most a second's age of all processes that are asked about. Raises as `Client`."""

    def __init__(self, client: Client, keys: Keys, *, clock: Callable[[], float]) -> None:
        self._client = client
        self._keys = keys
        self._clock = clock
        self._asked_at: dict[str, float] = {}
        self._words: dict[str, bytes | None] = {}
        self._fresh_until = float("-inf")
        self._missing_since: dict[str, float] = {}

    def is_alive(self, process_id: str) -> bool:
        """False if it said that it is gone, or was missed for `GRACE_S`."""
        now = self._clock()
        self._asked_at[process_id] = now
        if now >= self._fresh_until or process_id not in self._words:
            self._look(now)
        word = self._words[process_id]
        if word is not None:
            self._missing_since.pop(process_id, None)
            return word != GONE
        return now - self._missing_since.setdefault(process_id, now) < GRACE_S

    def forget_missing(self) -> None:
        """Redis did not answer for a while, so that nobody could send a heartbeat: begin to miss them anew."""
        self._missing_since.clear()
        self._fresh_until = float("-inf")

    def _look(self, now: float) -> None:
        self._asked_at = {each: at for each, at in self._asked_at.items() if now - at < _ASKED_WITHIN_S}
        self._missing_since = {each: at for each, at in self._missing_since.items() if each in self._asked_at}
        processes = list(self._asked_at)
        words = self._client.ask("MGET", *(self._keys.alive(process_id) for process_id in processes))
        self._words = dict(zip(processes, words, strict=True))
        self._fresh_until = now + _FRESH_S
