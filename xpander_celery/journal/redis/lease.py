"""The lease that makes one relay the active one. It runs out by itself when its holder is gone."""

from __future__ import annotations

from collections.abc import Callable

from xpander_celery.journal import Term
from xpander_celery.journal.liveness import new_process_id
from xpander_celery.journal.redis.client import Client
from xpander_celery.journal.redis.keys import LEAD, LEAVE, Keys

LEASE_S = 15.0
_UNKNOWN = "?"
_MARGIN_S = 1.0  # by which its holder takes it to be over before Redis does


class Lease:
    """A key that holds the id of the active relay, for `lease_s` from its last word. Methods raise as `Client` does.

    `identity` names the index of this relay. Redis keeps whose index was the last that a relay led with.
    """

    def __init__(
        self, client: Client, keys: Keys, *, identity: str, lease_s: float, clock: Callable[[], float]
    ) -> None:
        self.holder = new_process_id()
        self.is_first = True  # nobody is known to have led before: Redis is new, or has lost what it knew
        self._client = client
        self._keys = keys
        self._identity = identity
        self._lease_s = lease_s
        self._clock = clock
        self._ask_at = float("-inf")
        self._term: Term | None = None
        self._terms = 0
        self._has_seen_another = False

    @property
    def term(self) -> Term | None:
        """The term that this relay has by now, without asking."""
        return self._term if self._term is not None and self._clock() < self._term.until else None

    def keep(self) -> None:
        """Take the lease, or keep it. Asks Redis three times in its duration."""
        now = self._clock()
        if now < self._ask_at:
            return
        word, *led_before = self._client.ask(
            "EVAL", LEAD, 2, self._keys.lease, self._keys.leader, self.holder, int(self._lease_s * 1000), self._identity
        )
        self._ask_at = now + self._lease_s / 3
        until = now + self._lease_s - min(_MARGIN_S, self._lease_s / 10)
        if word == b"kept" and self._term is not None:
            self._term = Term(self._term.number, until, self._term.is_continued)
        elif word == b"taken":
            self._begin(led_before[0].decode(), until)
        elif word == b"kept":  # it was taken, and the reply was lost
            self._begin(_UNKNOWN, until)
        else:
            self._has_seen_another = True
            self._term = None

    def lose(self) -> None:
        """It was seen that this relay has it no longer; `keep` finds out who does."""
        self._term = None
        self._ask_at = float("-inf")

    def give_up(self) -> None:
        """Let another relay take it."""
        if self._term is not None:
            self._term = None
            self._ask_at = float("-inf")
            self._client.ask("EVAL", LEAVE, 1, self._keys.lease, self.holder)

    def _begin(self, led_before: str, until: float) -> None:
        self._terms += 1
        self.is_first = not led_before
        is_continued = not self._has_seen_another if self.is_first else led_before == self._identity
        self._term = Term(self._terms, until, is_continued)
        self._has_seen_another = False
