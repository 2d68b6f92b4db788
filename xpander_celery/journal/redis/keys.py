"""The keys of one destination. All carry one hash tag, so that a Redis Cluster keeps them together. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from xpander_celery import events

GROUP = "relay"
CONSUMER = "active"  # there is never but one, whichever relay it is
EVENT_FIELD = f"e{events.VERSION}"  # an entry holds one field: an event, under its version,
DROPPED_FIELD = "dropped"  # or how many events a writer had to drop

ALIVE = b"1"
GONE = b"gone"  # said by a process that ended, or by its worker; otherwise the key just expires
GONE_FOR_S = 3600

FULL = "JOURNALFULL"
ADD = f"""
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then
  return redis.error_reply('{FULL} the stream holds ' .. ARGV[1] .. ' events')
end
return redis.call('XADD', KEYS[1], '*', ARGV[2], ARGV[3])
"""


_ADD_SHA1 = hashlib.sha1(ADD.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Keys:
    """`destination` is the name of the destination's folder in a journal of files."""

    destination: str

    def _of(self, what: str) -> str:
        return f"xpander-celery:{{{self.destination}}}:{what}"

    @property
    def stream(self) -> str:
        """The events."""
        return self._of("events")

    @property
    def lease(self) -> str:
        """Held by the active relay."""
        return self._of("lease")

    @property
    def corrupt(self) -> str:
        """The newest of what could not be read."""
        return self._of("corrupt")

    def alive(self, process_id: str) -> str:
        """The heartbeat of one process."""
        return self._of(f"alive:{process_id}")


def add_command(keys: Keys, max_entries: int, field: str, value: bytes) -> list[bytes | str | int]:
    """Adds one entry, unless the stream holds `max_entries`. Redis may ask for the script first (`NOSCRIPT`)."""
    return ["EVALSHA", _ADD_SHA1, 1, keys.stream, max_entries, field, value]
