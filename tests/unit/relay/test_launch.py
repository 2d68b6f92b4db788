from __future__ import annotations

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.waiting import until
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.launch import LOG, Launcher
from xpander_celery.relay.mailbox import Mailbox
from xpander_celery.relay.status import EXIT_LEFT, EXIT_TAKEN, RelayLock, Status, is_running

_ROOT = Path(__file__).parents[3]

# A relay as far as its launcher can see: it notes that it was started, and then does what its first argument says.
RELAY = f"""
import json, os, pathlib, sys, time
sys.path.insert(0, {str(_ROOT)!r})
from xpander_celery.relay.config import RelayConfig
from xpander_celery.relay.status import RelayLock
config = RelayConfig.from_environ(os.environ)
directory = config.directory
facts = {{"pid": os.getpid(), "arguments": sys.argv[1:], "session": os.getsid(0), "key": config.api_key}}
facts["descriptors"] = os.listdir("/dev/fd")
whole = directory / f"started-{{time.time_ns()}}"
written = whole.with_name(f"being-written-{{os.getpid()}}")
written.write_text(json.dumps(facts))
written.rename(whole)  # a test reads it as soon as it is there
if sys.argv[1] == "run":
    lock = RelayLock.acquire(directory)
    time.sleep(60)
elif sys.argv[1] == "say":
    print("a line of its own", flush=True)
else:
    sys.exit(int(sys.argv[1]))
"""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for path in started(tmp_path):
        pid = json.loads(path.read_text())["pid"]
        try:
            if str(_ROOT) in " ".join(psutil.Process(pid).cmdline()):
                os.kill(pid, signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def launcher(
    directory: Path, clock: Clock, does: object = "run", now: Callable[[], float] = time.time, **settings: object
) -> Launcher:
    config = RelayConfig(directory, **{"api_key": "secret-key", "loaded_at": 5.0, **settings})  # type: ignore[arg-type]
    return Launcher(config, clock=clock, now=now, command=(sys.executable, "-c", RELAY, str(does)))


def started(directory: Path) -> list[Path]:
    return sorted(directory.glob("started-*"))


def ended(pid: int) -> bool:
    """Whether nothing is left of a process, not even a zombie."""
    return not psutil.pid_exists(pid)


def test_a_tick_starts_a_relay_and_further_ticks_leave_it_alone(directory: Path, clock: Clock) -> None:
    subject = launcher(directory, clock)
    subject.tick()
    subject.tick()
    until(lambda: is_running(directory), what="the relay")
    for _ in range(5):
        clock.now += 100
        subject.tick()
    assert len(started(directory)) == 1
    subject.close()


def test_it_is_a_session_of_its_own_with_no_descriptor_of_ours_and_no_key_in_its_arguments(
    directory: Path, clock: Clock
) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    subject = launcher(directory, clock)
    subject.tick()
    until(lambda: is_running(directory), what="the relay")
    os.close(writer)
    facts = json.loads(started(directory)[0].read_text())
    assert facts["session"] == facts["pid"] != os.getsid(0)
    assert len(facts["descriptors"]) <= 4  # the three, and the one that lists them
    assert os.read(reader, 1) == b""
    os.close(reader)
    assert facts["key"] == "secret-key"
    assert "secret-key" not in " ".join(psutil.Process(facts["pid"]).cmdline())
    subject.close()


def test_nothing_is_started_while_another_relay_runs(directory: Path, clock: Clock) -> None:
    lock = RelayLock.acquire(directory)
    assert lock is not None
    launcher(directory, clock).tick()
    assert started(directory) == []
    lock.release()


def test_a_relay_that_was_killed_is_replaced_and_leaves_no_zombie(directory: Path, clock: Clock) -> None:
    subject = launcher(directory, clock)
    subject.tick()
    until(lambda: is_running(directory), what="the relay")
    pid = json.loads(started(directory)[0].read_text())["pid"]
    clock.now += 100
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_running(directory), what="the end of the relay")
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, what="the death of the relay")
    subject.tick()
    assert ended(pid)
    clock.now += 5
    subject.tick()
    until(lambda: is_running(directory), what="another relay")
    subject.close()


def test_an_exit_that_somebody_else_reaped_is_accepted(directory: Path, clock: Clock) -> None:
    subject = launcher(directory, clock, 0)
    subject.tick()
    pid = json.loads(until(lambda: started(directory), what="the relay")[0].read_text())["pid"]
    os.waitpid(pid, 0)
    subject.tick()
    subject.tick()
    until(lambda: len(started(directory)) == 2, what="another relay")
    subject.close()


def test_one_that_fails_is_started_again_with_growing_waits(
    directory: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    subject = launcher(directory, clock, 1)
    waits = []
    for number in range(1, 6):
        before = clock.now
        while len(started(directory)) < number:
            subject.tick()
            until(lambda: subject._child is None or subject._child.poll() is not None, what="its end")
            clock.now += 1
            assert clock.now - before < 1000
        waits.append(clock.now - before)
    assert waits == sorted(waits)
    assert waits[-1] >= 16
    assert "exit code 1" in caplog.text
    assert LOG in caplog.text
    subject.close()


def test_one_that_ends_well_is_started_again_at_once(directory: Path, clock: Clock) -> None:
    subject = launcher(directory, clock, 0)
    for number in range(1, 4):
        subject.tick()
        until(lambda: len(started(directory)) == number, what="the relay")  # noqa: B023
        until(lambda: subject._child is None or subject._child.poll() is not None, what="its end")
    subject.close()


def test_what_it_says_goes_into_a_log_that_only_its_owner_can_read(directory: Path, clock: Clock) -> None:
    subject = launcher(directory, clock, "say")
    subject.tick()
    until(lambda: (directory / LOG).exists() and "a line of its own" in (directory / LOG).read_text(), what="the line")
    assert (directory / LOG).stat().st_mode & 0o077 == 0
    subject.close()


def test_what_cannot_be_started_is_logged_and_never_raised(
    directory: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    subject = Launcher(RelayConfig(directory), clock=clock, command=("/no/such/python",))
    subject.tick()
    assert "cannot be started" in caplog.text
    assert not subject.flush(0.5)
    assert "cannot flush" in caplog.text
    missing = Launcher(RelayConfig(directory / "missing"), clock=clock)
    missing.tick()


def status(directory: Path, **changes: object) -> None:
    values = {"pid": 1, "version": "1", "fingerprint": "old", "loaded_at": 1.0, "started_at": 1.0, "at": 1.0}
    Status(**{**values, **changes}).write(directory)  # type: ignore[arg-type]


def test_a_relay_with_older_settings_is_asked_to_leave(directory: Path, clock: Clock) -> None:
    lock = RelayLock.acquire(directory)
    mailbox = Mailbox(directory)
    status(directory, loaded_at=1.0)
    subject = launcher(directory, clock, loaded_at=5.0)
    subject.tick()
    subject.tick()
    (request,) = mailbox.take()
    assert (request.verb, request.arguments) == ("leave", {"fingerprint": "old"})
    clock.now += 60
    subject.tick()
    assert len(list(mailbox.take())) == 1
    assert lock is not None
    lock.release()


def test_a_worker_with_older_settings_starts_no_relay_while_one_with_newer_ones_lives(
    directory: Path, clock: Clock
) -> None:
    lock = RelayLock.acquire(directory)
    assert lock is not None
    status(directory, loaded_at=1.0)
    older = launcher(directory, clock, loaded_at=1.0, api_key="old-key")
    newer = launcher(directory, clock, loaded_at=5.0)
    newer.tick()  # asks the relay to leave
    lock.release()
    older.tick()
    assert started(directory) == []
    newer.tick()
    until(lambda: is_running(directory))
    assert [json.loads(path.read_text())["key"] for path in started(directory)] == ["secret-key"]
    newer.close()


def test_a_worker_with_older_settings_takes_over_when_the_one_with_newer_ones_is_gone(
    directory: Path, clock: Clock
) -> None:
    newer = launcher(directory, clock, loaded_at=5.0)
    newer.tick()
    until(lambda: is_running(directory))
    os.kill(json.loads(started(directory)[0].read_text())["pid"], signal.SIGKILL)
    older = launcher(directory, clock, loaded_at=1.0, api_key="old-key", now=lambda: time.time() + 20)
    until(lambda: not is_running(directory))
    older.tick()
    until(lambda: is_running(directory))
    assert json.loads(started(directory)[-1].read_text())["key"] == "old-key"
    older.close()
    newer.close()


@pytest.mark.parametrize("newer", [{"loaded_at": 9.0}, {"loaded_at": 5.0}])
def test_a_relay_with_newer_settings_is_left_alone(directory: Path, clock: Clock, newer: dict[str, float]) -> None:
    """Two workers of different settings would else replace each other's relay for ever."""
    lock = RelayLock.acquire(directory)
    mailbox = Mailbox(directory)
    status(directory, **newer)
    launcher(directory, clock, loaded_at=5.0).tick()
    assert list(mailbox.take()) == []
    assert lock is not None
    lock.release()


def test_a_relay_with_the_same_settings_is_left_alone(directory: Path, clock: Clock) -> None:
    lock = RelayLock.acquire(directory)
    mailbox = Mailbox(directory)
    subject = launcher(directory, clock, loaded_at=5.0)
    status(directory, loaded_at=1.0, fingerprint=subject._config.fingerprint)
    subject.tick()
    assert list(mailbox.take()) == []
    assert lock is not None
    lock.release()


def test_why_delivery_is_paused_is_said_once_in_the_workers_log(
    directory: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lock = RelayLock.acquire(directory)
    subject = launcher(directory, clock)
    status(directory, flow="paused", reason="HTTP 401. Check XPANDER_API_KEY.")
    for _ in range(3):
        subject.tick()
    assert caplog.text.count("XPANDER_API_KEY") == 1
    status(directory)
    subject.tick()
    assert "goes on" in caplog.text
    assert lock is not None
    lock.release()


@pytest.mark.parametrize(("code", "drained"), [(0, True), (EXIT_LEFT, False), (1, False)])
def test_a_flush_without_a_relay_runs_one_in_the_foreground(
    directory: Path, clock: Clock, code: int, drained: bool
) -> None:
    assert launcher(directory, clock, code).flush(5.0) is drained
    (path,) = started(directory)
    facts = json.loads(path.read_text())
    assert facts["arguments"][1:] == ["--once", "--for", "4.9"]
    assert ended(facts["pid"])


def test_a_flush_in_the_background_only_asks(directory: Path, clock: Clock) -> None:
    assert not launcher(directory, clock, 0).flush(5.0, foreground=False)
    assert started(directory) == []


def test_a_flush_that_meets_a_relay_on_its_way_asks_again(directory: Path) -> None:
    subject = Launcher(RelayConfig(directory), command=(sys.executable, "-c", RELAY, str(EXIT_TAKEN)))
    assert not subject.flush(3.0)
    assert len(started(directory)) > 1


def test_a_flush_ends_at_its_deadline(directory: Path) -> None:
    subject = Launcher(RelayConfig(directory), command=(sys.executable, "-c", RELAY, "run"))
    began = time.monotonic()
    assert not subject.flush(0.5)
    assert time.monotonic() - began < 1.4
    pid = json.loads(until(lambda: started(directory), what="the relay")[0].read_text())["pid"]
    until(lambda: ended(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, what="its end")


def test_a_relay_outlives_its_launcher_without_a_warning(directory: Path, clock: Clock) -> None:
    subject = launcher(directory, clock)
    subject.tick()
    until(lambda: is_running(directory), what="the relay")
    subject.close()
    del subject
    gc.collect()
    assert is_running(directory)


def test_launching_is_light() -> None:
    program = (
        "import sys; import xpander_celery.relay.launch;"
        "print([name for name in ('httpx', 'sqlite3', 'pydantic', 'asyncio', 'celery') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_frozen_program_does_not_start_itself_as_the_relay(
    directory: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    subject = launcher(directory, clock)
    subject.tick()
    assert not subject.flush(0.1)
    assert started(directory) == []
    assert "run `xpander-celery relay`" in caplog.text
