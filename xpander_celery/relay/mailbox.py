"""How other processes ask something of the relay of a directory: files, so no socket and no port. Light.

A request is one small file in `mailbox/`, taken away by the relay, which puts an answer beside it. The directory is
its owner's alone (0700), so whoever can ask may ask.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from xpander_celery.relay.status import is_running, write_whole

FOLDER = "mailbox"
_ASK, _ANSWER = ".ask", ".answer"
_LOOK_EVERY_S = 0.02
_UNCLAIMED_S = 60.0


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """One request. Nobody waits for its answer after `expires_at` (seconds since the epoch)."""

    id: str
    verb: str
    arguments: dict[str, Any]
    expires_at: float


class Postbox(Protocol):
    """A place where the relay is asked something, seen from the relay's side."""

    def take(self) -> Iterator[Request]:
        """Every request that came in since the last call and that somebody still waits for."""

    def answer(self, request: Request, answer: dict[str, Any]) -> None:
        """Answer one of them."""


class Mailbox:
    """The relay's side."""

    def __init__(self, directory: Path) -> None:
        self._folder = directory / FOLDER
        self._folder.mkdir(mode=0o700, exist_ok=True)

    def take(self) -> Iterator[Request]:
        """Every request that came in since the last call and that somebody still waits for."""
        with os.scandir(self._folder) as entries:
            paths = [self._folder / entry.name for entry in entries]
        for path in paths:
            if path.suffix == _ASK and not path.name.startswith("."):
                request = _read(path)
                path.unlink(missing_ok=True)
                if request is not None and request.expires_at > time.time():
                    yield request
            else:
                self._discard_unclaimed(path)

    def answer(self, request: Request, answer: dict[str, Any]) -> None:
        try:
            write_whole(self._folder / f"{request.id}{_ANSWER}", json.dumps(answer).encode())
        except OSError as error:  # whoever asked hears nothing in time, and may ask again
            logger.warning("a request cannot be answered: %s", error, extra={"event": "request_not_answered"})

    def _discard_unclaimed(self, path: Path) -> None:
        """Answers nobody came for, and what was left by processes that died while they wrote."""
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _UNCLAIMED_S:
                path.unlink()


def tell(directory: Path, verb: str, *, within_s: float, **arguments: Any) -> Path | None:
    """Ask and do not wait; returns where the question lies, None where no relay ever ran."""
    path = directory / FOLDER / f"{secrets.token_hex(8)}{_ASK}"
    question = {"verb": verb, "arguments": arguments, "expires_at": time.time() + within_s}
    try:
        write_whole(path, json.dumps(question).encode())
    except FileNotFoundError:
        return None
    return path


def ask(directory: Path, verb: str, *, timeout_s: float, **arguments: Any) -> dict[str, Any] | None:
    """Ask the relay of `directory`; None where none runs, or it did not answer within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    question_path = tell(directory, verb, within_s=timeout_s, **arguments)
    if question_path is None:
        return None
    answer_path = question_path.with_suffix(_ANSWER)
    try:
        while time.monotonic() < deadline and is_running(directory):
            time.sleep(_LOOK_EVERY_S)
            if answer_path.exists():
                answer: dict[str, Any] = json.loads(answer_path.read_bytes())
                return answer
        return None
    finally:
        question_path.unlink(missing_ok=True)
        answer_path.unlink(missing_ok=True)


def _read(path: Path) -> Request | None:
    try:
        values = json.loads(path.read_bytes())
        return Request(path.name.removesuffix(_ASK), values["verb"], values["arguments"], values["expires_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
