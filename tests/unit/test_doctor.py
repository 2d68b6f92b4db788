import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery import Celery

from tests.support.redis_server import RedisServer
from xpander_celery import cli, doctor
from xpander_celery.assembly import relay_config
from xpander_celery.backend import Backend, Configuration
from xpander_celery.doctor import Level
from xpander_celery.journal.redis.keys import Keys
from xpander_celery.relay.status import RelayLock, Status
from xpander_celery.runtime import instrument, settings_of, uninstrument

STATUS = Status(pid=123, version="0", fingerprint="f", loaded_at=0, started_at=0, at=0)


@pytest.fixture(autouse=True)
def configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XPANDER_API_KEY", "a-secret-key")
    monkeypatch.setenv("XPANDER_AGENT_ID", "agent-1")
    monkeypatch.setenv("XPANDER_CELERY_JOURNAL", str(tmp_path / "journal"))


def destination() -> Path:
    directory = relay_config(settings_of(None)).directory
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def examined(app: Any = None) -> dict[str, Level]:
    return {finding.text: finding.level for finding in doctor.examine(app, offline=True)}


def problems(app: Any = None) -> list[str]:
    return [f"{each.text} → {each.remedy}" for each in doctor.examine(app, offline=True) if each.level is Level.PROBLEM]


def test_where_all_is_well_no_problem_is_found_and_no_key_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--offline"]) == 0
    said = capsys.readouterr().out
    assert "✓ an API key is set" in said
    assert "✓ jobs go to the agent agent-1" in said
    assert "a-secret-key" not in said


def test_without_a_key_the_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("XPANDER_API_KEY")
    assert cli.main(["doctor"]) == 1
    assert "✗ there is no API key, so nothing is reported\n    → Set XPANDER_API_KEY." in capsys.readouterr().out


def test_without_an_agent_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XPANDER_AGENT_ID")
    assert examined()["no agent is set: only tasks that name one are reported"] is Level.NOTE


@pytest.mark.parametrize(
    ("variable", "value"),
    [("XPANDER_CELERY_CONCURRENCY", "many"), ("XPANDER_BASE_URL", "ftp://x"), ("XPANDER_API_KEY", "a\u00e9")],
)
def test_a_malformed_setting_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    [problem] = problems()
    assert problem.startswith(f"{variable}: ")


def test_reporting_that_is_switched_off_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPANDER_CELERY_DISABLED", "1")
    assert "XPANDER_CELERY_DISABLED" in problems()[0]


def test_switched_off_spans_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert any("OTEL_SDK_DISABLED" in text for text, level in examined().items() if level is Level.NOTE)


def test_a_journal_with_little_space_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LITTLE_SPACE_BYTES", 2**63)
    assert any("MiB are free" in text for text, level in examined().items() if level is Level.NOTE)


def test_a_journal_below_a_file_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XPANDER_CELERY_JOURNAL", str(tmp_path / "file"))
    assert "cannot be written" in problems()[0]


def test_an_external_relay_that_does_not_run_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPANDER_CELERY_RELAY", "external")
    assert problems() == ["no relay runs, and workers start none → Run `xpander-celery relay`."]
    lock = RelayLock.acquire(destination())
    assert lock is not None
    assert problems() == []
    lock.release()


def test_what_the_relay_says_of_itself_is_passed_on() -> None:
    replace(
        STATUS,
        flow="paused",
        reason="the key is refused",
        held_agents={"agent-9": "unknown"},
        waiting=3,
        held=1,
        dead=2,
        oldest_waiting_s=4000.0,
    ).write(destination())
    said = examined()
    assert said["delivery is paused: the key is refused"] is Level.PROBLEM
    assert said["reports for the agent agent-9 wait: unknown"] is Level.PROBLEM
    assert said["4 reports wait, the oldest for 4000 s"] is Level.NOTE
    assert said["2 reports were given up"] is Level.NOTE


def test_an_idle_relay_is_good_news() -> None:
    STATUS.write(destination())
    assert examined()["0 reports wait"] is Level.GOOD


def test_the_settings_of_an_app_are_read_those_of_instrument_included() -> None:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.xpander_agents = {"shop.*": "agent-2"}
    instrument(app, agent_id="agent-of-the-call")
    try:
        said = examined(app)
    finally:
        uninstrument()
    assert said["jobs go to the agent agent-of-the-call"] is Level.GOOD
    assert any("broker" in text for text in said)


def test_a_broker_without_its_library_is_a_problem() -> None:
    app = Celery("shop", broker="no-such-broker://", set_as_current=False)
    assert "library of the app's broker is missing" in problems(app)[0]


def answering(respond: Callable[[httpx.Request], httpx.Response]) -> doctor.Finding:
    configuration = Configuration(api_key="a-secret-key", base_url="http://platform.test")
    return doctor._platform(Backend(configuration, transport=httpx.MockTransport(respond)), "http://platform.test")


@pytest.mark.parametrize(
    ("status", "level", "word"),
    [
        (404, Level.GOOD, "takes the key"),
        (403, Level.PROBLEM, "refuses the API key"),
        (500, Level.PROBLEM, "no good answer"),
    ],
)
def test_the_platform_is_asked_for_its_opinion_of_the_key(status: int, level: Level, word: str) -> None:
    finding = answering(lambda request: httpx.Response(status, json={"detail": "x"}))
    assert finding.level is level
    assert word in finding.text
    assert "a-secret-key" not in finding.text


def test_a_platform_that_cannot_be_reached_is_a_problem() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    assert answering(refuse).level is Level.PROBLEM


# A journal in Redis


@pytest.fixture
def redis_journal(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[RedisServer]:
    redis_server.client.ask("FLUSHALL")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XPANDER_CELERY_JOURNAL", redis_server.url)
    yield redis_server
    redis_server.client.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")


def place(server: RedisServer) -> str:
    return f"127.0.0.1:{server.port}/0"


def test_a_redis_that_may_forget_is_a_note(redis_journal: RedisServer) -> None:
    found = next(each for each in doctor.examine(None, offline=True) if "journal is in Redis" in each.text)
    assert found.level is Level.NOTE
    assert (
        found.text
        == f"the journal is in Redis at {place(redis_journal)}, which loses events when it crashes (appendonly no)"
    )
    assert found.remedy == "Set appendonly to yes."


def test_a_redis_that_evicts_is_a_problem(redis_journal: RedisServer) -> None:
    redis_journal.client.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    assert len(problems()) == 1
    assert "set it to noeviction" in problems()[0]


def test_a_redis_that_does_not_answer_is_a_problem_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPANDER_CELERY_JOURNAL", "redis://:hunter2@127.0.0.1:1/0")
    assert len(problems()) == 1
    assert "127.0.0.1:1/0 does not answer" in problems()[0]
    assert "hunter2" not in problems()[0]


def test_the_relay_that_leads_may_be_on_any_machine(
    redis_journal: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XPANDER_CELERY_RELAY", "external")
    assert problems() == ["no relay runs, and workers start none → Run `xpander-celery relay`."]
    keys = Keys(relay_config(settings_of(None)).directory.name)
    leading = replace(STATUS, host="host-7", dead=2)
    redis_journal.client.ask("SET", keys.shared("status"), json.dumps(asdict(leading)))
    assert problems() == []
    assert examined()["a relay leads: host-7 (process 123)"] is Level.GOOD
    assert examined()["2 reports were given up"] is Level.NOTE
