from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from xpander_celery.relay.status import LOCK, STATUS, RelayLock, Status, is_running, write_whole

STATUS_NOW = Status(
    pid=1, version="1", fingerprint="f", loaded_at=1.0, started_at=2.0, at=3.0, counters={"appended": 4}, waiting=5
)


def test_only_one_holds_the_lock_until_it_is_released(tmp_path: Path) -> None:
    assert not is_running(tmp_path)
    lock = RelayLock.acquire(tmp_path)
    assert lock is not None
    assert is_running(tmp_path)
    assert RelayLock.acquire(tmp_path) is None
    lock.release()
    assert not is_running(tmp_path)
    assert stat.S_IMODE((tmp_path / LOCK).stat().st_mode) == 0o600


def test_the_lock_is_free_when_its_holder_was_killed(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from xpander_celery.relay.status import RelayLock;"
        "lock = RelayLock.acquire(pathlib.Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert is_running(tmp_path)
        process.kill()
        process.wait()
    assert not is_running(tmp_path)


def test_somebody_who_tests_the_lock_at_the_same_moment_does_not_stop_a_relay(tmp_path: Path) -> None:
    is_running(tmp_path)
    (tmp_path / LOCK).touch()
    tester = os.open(tmp_path / LOCK, os.O_RDONLY)
    fcntl.flock(tester, fcntl.LOCK_SH)
    timer = threading.Timer(0.1, os.close, [tester])
    timer.start()
    lock = RelayLock.acquire(tmp_path)
    timer.join()
    assert lock is not None
    lock.release()


def test_testing_the_lock_leaves_nothing_to_a_child_that_is_forked_meanwhile(tmp_path: Path) -> None:
    """A fork between the test and its end would keep the lock taken for as long as the child lives."""
    (tmp_path / LOCK).touch()
    released: list[int] = []
    real = fcntl.flock

    def spy(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        released.append(operation)

    fcntl.flock = spy
    try:
        is_running(tmp_path)
    finally:
        fcntl.flock = real
    assert released[-1] == fcntl.LOCK_UN


def test_a_status_is_read_as_it_was_written(tmp_path: Path) -> None:
    STATUS_NOW.write(tmp_path)
    assert Status.read(tmp_path) == STATUS_NOW
    assert stat.S_IMODE((tmp_path / STATUS).stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [STATUS]


def test_a_status_of_another_release_is_read_as_far_as_it_is_known(tmp_path: Path) -> None:
    STATUS_NOW.write(tmp_path)
    text = (tmp_path / STATUS).read_text()
    (tmp_path / STATUS).write_text(text.replace('"waiting": 5', '"novelty": 1'))
    status = Status.read(tmp_path)
    assert status is not None
    assert (status.pid, status.waiting) == (1, 0)


def test_without_a_readable_status_there_is_none(tmp_path: Path) -> None:
    assert Status.read(tmp_path) is None
    for text in ("", "{", "[]", "{}"):
        (tmp_path / STATUS).write_text(text)
        assert Status.read(tmp_path) is None


def test_what_is_written_only_in_part_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "answer", b"before")
    monkeypatch.setattr("xpander_celery.relay.status.os.write", lambda descriptor, content: len(content) - 1)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "answer", b"after")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["answer"]
    assert (tmp_path / "answer").read_bytes() == b"before"


def test_its_age_goes_by_the_clock_of_files(tmp_path: Path) -> None:
    assert Status.age_s(tmp_path) is None
    Status(pid=1, version="1", fingerprint="f", loaded_at=0, started_at=0, at=0).write(tmp_path)
    age_s = Status.age_s(tmp_path)
    assert age_s is not None
    assert age_s < 60
