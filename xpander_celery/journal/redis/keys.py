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
_BYTES_PER_EVENT = 1024

FULL = "JOURNALFULL"
ADD = f"""
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then
  return redis.error_reply('{FULL} the stream holds ' .. ARGV[1] .. ' events')
end
return redis.call('XADD', KEYS[1], '*', ARGV[2], ARGV[3])
"""


# Whoever holds the lease keeps it; else whoever asks takes it, and is told whose index led before. The first PEXPIRE
# does nothing: in a Redis that is out of memory, a script may write once it has begun to (script.c, 7.0), and without a
# relay no memory would ever be freed.
LEAD = """
local holder = redis.call('GET', KEYS[1])
if holder == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return {'kept'}
end
if holder then
  return {'held'}
end
redis.call('PEXPIRE', KEYS[1], 1)
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local led_before = redis.call('GET', KEYS[2]) or ''
redis.call('SET', KEYS[2], ARGV[3])
return {'taken', led_before}
"""
LEAVE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"

# Entries for the one that holds the lease and nobody else: what another took, nobody would look for.
NOT_HELD = "NOTHELD"
_HELD = f"""
if redis.call('GET', KEYS[2]) ~= ARGV[1] then
  return redis.error_reply('{NOT_HELD} another relay is active')
end
"""
READ = _HELD + "return redis.pcall('XREADGROUP', 'GROUP', ARGV[2], ARGV[3], 'COUNT', ARGV[4], 'STREAMS', KEYS[1], '>')"
CLAIM = _HELD + "return redis.pcall('XAUTOCLAIM', KEYS[1], ARGV[2], ARGV[3], 0, ARGV[5], 'COUNT', ARGV[4])"
MAKE_GROUP = "redis.call('PERSIST', KEYS[1]) return redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')"

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
    def leader(self) -> str:
        """Whose index the last active relay led with."""
        return self._of("leader")

    def shared(self, name: str) -> str:
        """What the active relay tells the others."""
        return self._of(f"shared:{name}")

    @property
    def mailbox(self) -> str:
        """The ids of requests to the active relay,"""
        return self._of("mailbox")

    def request(self, request_id: str) -> str:
        """which lie here,"""
        return self._of(f"request:{request_id}")

    def answer(self, request_id: str) -> str:
        """and are answered here."""
        return self._of(f"answer:{request_id}")

    @property
    def corrupt(self) -> str:
        """The newest of what could not be read."""
        return self._of("corrupt")

    def alive(self, process_id: str) -> str:
        """The heartbeat of one process."""
        return self._of(f"alive:{process_id}")


def max_entries_of(max_bytes: int) -> int:
    """A cap in bytes as one in entries, which Redis can tell at once."""
    return max(1, max_bytes // _BYTES_PER_EVENT)


def add_command(keys: Keys, max_entries: int, field: str, value: bytes) -> list[bytes | str | int]:
    """Adds one entry, unless the stream holds `max_entries`. Redis may ask for the script first (`NOSCRIPT`)."""
    return ["EVALSHA", _ADD_SHA1, 1, keys.stream, max_entries, field, value]
