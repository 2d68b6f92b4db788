"""How the relay that leads is asked something from anywhere: through the Redis that holds the journal. Light.

A request is a key that lasts as long as somebody waits for its answer, and its id in a list; the answer is another key.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

from xpander_celery.journal.notices import Notice
from xpander_celery.journal.redis.client import Client, RefusedError
from xpander_celery.journal.redis.keys import Keys
from xpander_celery.redis_address import Address
from xpander_celery.relay.mailbox import Request

_TIMEOUT_S = 1.0
_TAKE_EVERY_S = 0.1
_TAKE_AGAIN_S = 2.0
_ANSWER_LASTS_S = 60
_LOOK_EVERY_S = 0.05

logger = logging.getLogger(__name__)


class RedisMailbox:
    """The relay's side. While Redis does not answer, nobody asks."""

    def __init__(self, url: str, destination: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = Client(Address.parse(url), timeout_s=_TIMEOUT_S)
        self._keys = Keys(destination)
        self._clock = clock
        self._take_at = float("-inf")
        self._trouble = Notice(logger, "mailbox_trouble", clock=clock)

    def take(self) -> Iterator[Request]:
        """Every request that came in since the last call and that somebody still waits for."""
        now = self._clock()
        if now < self._take_at:
            return
        self._take_at = now + _TAKE_EVERY_S
        try:
            while (request_id := self._client.ask("RPOP", self._keys.mailbox)) is not None:
                request = self._read(request_id.decode(errors="replace"))
                if request is not None:
                    yield request
        except (OSError, RefusedError) as error:
            self._meet_trouble(error)

    def answer(self, request: Request, answer: dict[str, Any]) -> None:
        """Answer one of them."""
        try:
            self._client.ask("SET", self._keys.answer(request.id), json.dumps(answer), "EX", _ANSWER_LASTS_S)
        except (OSError, RefusedError) as error:
            self._meet_trouble(error)

    def _read(self, request_id: str) -> Request | None:
        key = self._keys.request(request_id)
        text, lasts_ms, _ = self._client.call([["GET", key], ["PTTL", key], ["DEL", key]])
        try:
            values = json.loads(text)
            return Request(request_id, values["verb"], values["arguments"], time.time() + lasts_ms / 1000)
        except (ValueError, KeyError, TypeError):  # nobody waits any longer, or it was no request
            return None

    def _meet_trouble(self, trouble: Exception) -> None:
        self._take_at = self._clock() + _TAKE_AGAIN_S
        self._trouble.warn("Nobody can ask this relay through Redis at %s: %s", self._client.address, trouble)


def ask(url: str, destination: str, verb: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any] | None:
    """Ask the relay that leads; None where none does, it did not answer within `timeout_s`, or Redis is away."""
    deadline = time.monotonic() + timeout_s
    client, keys = Client(Address.parse(url), timeout_s=min(_TIMEOUT_S, max(0.1, timeout_s))), Keys(destination)
    request_id = secrets.token_hex(8)
    question = json.dumps({"verb": verb, "arguments": arguments})
    try:
        if not client.ask("EXISTS", keys.lease):
            return None
        client.ask("SET", keys.request(request_id), question, "PX", max(1, int(timeout_s * 1000)))
        client.tell([["LPUSH", keys.mailbox, request_id], ["EXPIRE", keys.mailbox, _ANSWER_LASTS_S]])
        while time.monotonic() < deadline and client.ask("EXISTS", keys.lease):
            text = client.ask("GETDEL", keys.answer(request_id))
            if text is not None:
                answer: dict[str, Any] = json.loads(text)
                return answer
            time.sleep(_LOOK_EVERY_S)
    except (OSError, RefusedError) as error:
        logger.warning("Redis at %s cannot be asked: %s", client.address, error, extra={"event": "mailbox_trouble"})
    finally:
        client.forget()
    return None
