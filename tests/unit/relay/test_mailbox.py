from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xpander_celery.relay.mailbox import FOLDER, Mailbox, Request, ask, tell
from xpander_celery.relay.status import RelayLock


@pytest.fixture
def mailbox(tmp_path: Path) -> Iterator[Mailbox]:
    """Of a running relay, as far as the lock tells."""
    lock = RelayLock.acquire(tmp_path)
    assert lock is not None
    yield Mailbox(tmp_path)
    lock.release()


def serving(mailbox: Mailbox, answer: dict[str, Any]) -> tuple[threading.Thread, list[Request]]:
    """Answer the first request that comes, as a relay would."""
    seen: list[Request] = []

    def serve() -> None:
        deadline = time.monotonic() + 10
        while not seen and time.monotonic() < deadline:
            for request in mailbox.take():
                seen.append(request)
                mailbox.answer(request, answer)
            time.sleep(0.005)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread, seen


def test_a_question_gets_its_answer_and_leaves_nothing_behind(tmp_path: Path, mailbox: Mailbox) -> None:
    thread, seen = serving(mailbox, {"drained": True})
    assert ask(tmp_path, "flush", timeout_s=10, why="test") == {"drained": True}
    thread.join()
    assert (seen[0].verb, seen[0].arguments) == ("flush", {"why": "test"})
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_without_a_relay_nobody_is_waited_for(tmp_path: Path) -> None:
    began = time.monotonic()
    assert ask(tmp_path, "flush", timeout_s=10) is None
    Mailbox(tmp_path)
    assert ask(tmp_path, "flush", timeout_s=10) is None
    assert time.monotonic() - began < 5
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_a_relay_that_does_not_answer_is_waited_for_no_longer_than_told(tmp_path: Path, mailbox: Mailbox) -> None:
    assert ask(tmp_path, "flush", timeout_s=0.1) is None
    assert list(mailbox.take()) == []


def test_what_was_told_is_taken_once(tmp_path: Path, mailbox: Mailbox) -> None:
    tell(tmp_path, "leave", within_s=30, fingerprint="f")
    (request,) = mailbox.take()
    assert (request.verb, request.arguments) == ("leave", {"fingerprint": "f"})
    assert list(mailbox.take()) == []


def test_a_question_nobody_waits_for_any_more_is_dropped(tmp_path: Path, mailbox: Mailbox) -> None:
    tell(tmp_path, "leave", within_s=-1)
    assert list(mailbox.take()) == []
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_answers_nobody_came_for_and_garbage_are_removed_in_time(tmp_path: Path, mailbox: Mailbox) -> None:
    folder = tmp_path / FOLDER
    for name in ("x.answer", ".x.ask.123", "y.answer"):
        (folder / name).write_text("?")
    (folder / "garbage.ask").write_text("?")
    old = time.time() - 100
    os.utime(folder / "x.answer", (old, old))
    os.utime(folder / ".x.ask.123", (old, old))
    assert list(mailbox.take()) == []
    assert [path.name for path in folder.iterdir()] == ["y.answer"]


def test_it_is_the_owners_alone(tmp_path: Path, mailbox: Mailbox) -> None:
    path = tell(tmp_path, "leave", within_s=30)
    assert path is not None
    assert stat.S_IMODE((tmp_path / FOLDER).stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_full_disk_leaves_a_request_without_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    box = Mailbox(tmp_path)
    tell(tmp_path, "list", within_s=60)
    (request,) = box.take()
    monkeypatch.setattr("xpander_celery.relay.mailbox.write_whole", no_space)
    box.answer(request, {})
    assert "cannot be answered" in caplog.text
