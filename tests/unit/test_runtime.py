"""Installing, its settings, and that it costs nothing where nothing runs."""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import billiard.process
import pytest
from celery import Celery, current_app, signals

import xpander_celery as xc
from tests.support.redis_server import RedisServer
from xpander_celery import assembly, runtime
from xpander_celery.errors import ConfigurationError
from xpander_celery.journal.reader import FileReader
from xpander_celery.journal.redis.keys import Keys
from xpander_celery.relay.config import RelayConfig
from xpander_celery.requests import ObservedRequest
from xpander_celery.testing import capture_reports

ALL_SIGNALS = [value for value in vars(signals).values() if isinstance(value, type(signals.task_prerun))]


def receivers() -> list[tuple[str, Any]]:
    return sorted((signal.name, key) for signal in ALL_SIGNALS for key, _ in signal.receivers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"agnet_id": "a"}, "agnet_id: is no setting"),
        ({"concurrency": 0}, "concurrency: "),
        ({"base_url": "ftp://x"}, "XPANDER_BASE_URL: has the scheme 'ftp'"),
        ({"api_key": "two\nlines"}, "XPANDER_API_KEY: has characters"),
        ({"before_send": "no path"}, "before_send: is no import path"),
    ],
)
def test_a_malformed_setting_raises_and_names_itself(app: Celery, settings: Any, message: str) -> None:
    before = receivers()
    with pytest.raises(ConfigurationError, match=message):
        xc.instrument(app, **settings)
    assert receivers() == before


def test_what_is_no_app_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="app: is a str"):
        xc.instrument("app")  # type: ignore[arg-type]


def test_flush_raises_for_no_malformed_variable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XPANDER_CELERY_CONCURRENCY", "many")
    assert not xc.flush(0.1)
    assert "XPANDER_CELERY_CONCURRENCY" in said(caplog, "reporting_off")[0]


def test_a_malformed_variable_raises_and_names_itself(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPANDER_CELERY_CONCURRENCY", "many")
    with pytest.raises(ConfigurationError, match="XPANDER_CELERY_CONCURRENCY"):
        xc.instrument(app)


def test_instrument_is_idempotent_and_uninstrument_leaves_nothing(app: Celery) -> None:
    before, steps = receivers(), set(app.steps["consumer"])
    xc.instrument(app, agent_id="a")
    once, with_step = receivers(), set(app.steps["consumer"])
    xc.instrument(app, agent_id="a")
    xc.instrument(app, agent_id="b")
    assert receivers() == once
    assert app.steps["consumer"] == with_step
    xc.uninstrument()
    xc.uninstrument()
    assert receivers() == before
    assert app.steps["consumer"] == steps


def test_the_current_app_is_taken_as_the_app_behind_it(app: Celery) -> None:
    xc.instrument(current_app, api_key="k", agent_id="a")

    @app.task
    def ask() -> None: ...

    with capture_reports() as reports:
        ask.apply()
        assert len(reports) == 1


def test_key_names_to_redact_are_meant_however_they_are_written(app: Celery) -> None:
    xc.instrument(app, agent_id="a", redact_keys=["customerEmail", "Loyalty-No"])

    @app.task
    def greet(customer_email: str, options: dict[str, str]) -> None: ...

    with capture_reports() as reports:
        greet.apply(("ann@example.com", {"loyaltyNo": "4711", "color": "red"}))
        assert reports[0].input == '{"customer_email":"[redacted]","options":{"loyaltyNo":"[redacted]","color":"red"}}'


def test_instrument_neither_finalizes_the_app_nor_touches_the_disk(tmp_path: Path) -> None:
    code = """
import os, sys, threading
from celery import Celery
import xpander_celery as xc
app = Celery("shop", broker="memory://")
before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
xc.instrument(app, api_key="k", agent_id="a")
@app.task
def ask(): ...
after = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
print(app.finalized, app.configured, threading.active_count(), len(after) - len(before), os.listdir(os.environ["HOME"]))
"""
    environ = {**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.split(maxsplit=4) == ["False", "False", "1", "0", "[]\n"]
    assert done.stderr == ""


def test_tasks_may_be_defined_before_and_after(app: Celery) -> None:
    @app.task
    def before() -> None: ...

    with capture_reports(app) as reports:

        @app.task
        def after() -> None: ...

        before.apply()
        after.apply()
        assert len(reports) == 2


def test_without_a_key_eager_jobs_run_and_nothing_is_written(app: Celery, tmp_path: Path) -> None:
    xc.instrument(app, agent_id="a", journal=str(tmp_path / "journal"))

    @app.task
    def ask() -> str:
        xc.current_job().add_usage(xc.Tokens(prompt_tokens=1))
        return "fine"

    assert ask.apply().get() == "fine"
    assert not (tmp_path / "journal").exists()


def test_eager_jobs_are_written_to_the_journal(app: Celery, tmp_path: Path) -> None:
    xc.instrument(app, api_key="k", agent_id="a", journal=str(tmp_path / "journal"))

    @app.task
    def ask() -> None: ...

    ask.apply()
    [directory] = (tmp_path / "journal").iterdir()
    assert any(path.stat().st_size > 0 for path in directory.glob("*-000000.v*"))


def test_a_journal_that_cannot_be_written_does_not_stop_an_eager_job(app: Celery, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    xc.instrument(app, api_key="k", agent_id="a", journal=str(tmp_path / "file"))

    @app.task
    def ask() -> str:
        return "fine"

    assert ask.apply().get() == "fine"


@pytest.mark.parametrize("how", ["keyword", "variable"])
def test_disabled_means_nothing_at_all(app: Celery, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    before = receivers()
    if how == "variable":
        monkeypatch.setenv("XPANDER_CELERY_DISABLED", "1")
    xc.instrument(app, api_key="k", agent_id="a", **({"disabled": True} if how == "keyword" else {}))

    @app.task(base=xc.XpanderTask)
    @xc.reported
    def ask() -> str:
        return "fine"

    assert ask.apply().get() == "fine"
    assert receivers() == before


def test_a_setting_that_is_wrong_by_the_time_of_a_job_turns_reporting_off_with_one_log_line(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    xc.instrument(app, api_key="k", agent_id="a")
    app.conf.xpander_concurrency = "many"

    @app.task
    def ask() -> str:
        return "fine"

    assert [ask.apply().get(), ask.apply().get()] == ["fine", "fine"]
    lines = [record.getMessage() for record in caplog.records if record.name == runtime.__name__]
    assert len(lines) == 1
    assert "xpander_concurrency" in lines[0]


def test_configuration_that_is_set_after_instrument_holds(app: Celery) -> None:
    with capture_reports(app) as reports:
        app.conf.xpander_exclude = ["*.quiet"]

        @app.task(name="shop.quiet")
        def quiet() -> None: ...

        quiet.apply()
        assert len(reports) == 0


def test_keywords_win_over_configuration_and_that_over_the_environment(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XPANDER_AGENT_ID", "environment")

    @app.task
    def ask() -> None: ...

    with capture_reports(app) as reports:
        ask.apply()
        assert reports[0].agent_id == "environment"
    app.conf.xpander_agent_id = "configuration"
    with capture_reports(app) as reports:
        ask.apply()
        assert reports[0].agent_id == "configuration"
    with capture_reports(app, agent_id="keyword") as reports:
        ask.apply()
        assert reports[0].agent_id == "keyword"


def test_a_block_of_code_is_a_job(app: Celery) -> None:
    with capture_reports(app, agents={"night.*": "night-agent"}) as reports:
        with xc.job("night.digest", input="2026-01-31") as job:
            job.add_usage(xc.Tokens(prompt_tokens=2))
            assert xc.current_job() is job
            job.result = {"orders": 3}
        with pytest.raises(ValueError, match="no luck"), xc.job("day.digest", id="job-2", agent_id="day-agent"):
            raise ValueError("no luck")
    first, second = reports
    assert (first.agent_id, first.input, first.result) == ("night-agent", "2026-01-31", '{"orders":3}')
    assert first.tokens == xc.Tokens(prompt_tokens=2)
    assert (second.id, second.agent_id, second.is_success) == ("job-2", "day-agent", False)
    assert "no luck" in (second.result or "")


async def test_a_block_of_asynchronous_code_is_a_job(app: Celery) -> None:
    with capture_reports(app) as reports:
        async with xc.job("digest") as job:
            job.result = "done"
            assert xc.current_job() is job
    assert [each.result for each in reports] == ["done"]


def test_a_block_within_a_job_is_a_job_of_its_own(app: Celery) -> None:
    @app.task
    def ask() -> None:
        with xc.job("step") as step:
            step.result = "step"
        xc.current_job().result = "job"

    with capture_reports(app) as reports:
        ask.apply()
    outer, step = reports
    assert (outer.result, step.result) == ("job", "step")
    assert step.llm_response["celery"]["parent_id"] == outer.id


@pytest.mark.parametrize("how", ["keyword", "conf"])
def test_what_instrument_switched_off_is_installed_by_nothing_else(
    app: Celery, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("XPANDER_API_KEY", "k")
    before = receivers()
    app.conf.xpander_disabled = how == "conf"
    xc.instrument(app, **({"disabled": True} if how == "keyword" else {}))

    @app.task(base=xc.XpanderTask)
    def ask() -> None: ...

    app.finalize()
    with xc.job("digest") as job:
        assert job.id is None
    assert receivers() == before
    with capture_reports(app) as reports:  # which tests of the user's rely on
        ask.apply()
        assert len(reports) == 1
    assert receivers() == before
    app.conf.xpander_disabled = False
    xc.instrument(app, agent_id="a")
    assert receivers() != before
    with capture_reports() as reports:
        ask.apply()
        assert len(reports) == 1


def test_a_block_installs_nothing_while_all_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPANDER_CELERY_DISABLED", "1")
    before = receivers()
    with xc.job("digest") as job:
        assert job.id is None
    assert receivers() == before


def test_without_a_key_a_block_says_so_once_and_runs(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        with xc.job("digest") as job:
            job.result = "kept by nobody"
            job.add_usage(xc.Tokens(prompt_tokens=1))
            assert job.id is None
    assert [record.levelno for record in caplog.records if "no API key" in record.getMessage()] == [logging.WARNING]
    xc.uninstrument()


def test_flush_without_anything_is_done() -> None:
    assert xc.flush(0.1)


def test_one_more_app_is_reported_too(app: Celery) -> None:
    with Celery("other", broker="memory://", backend="cache+memory://", set_as_current=False) as other:

        @other.task(name="other.ask", shared=False)
        def ask() -> None: ...

        with capture_reports(app) as reports:
            ask.apply()
            assert len(reports) == 0
            xc.instrument(other)
            ask.apply()
            assert len(reports) == 1


def test_after_uninstrument_marked_tasks_still_run(app: Celery) -> None:
    @app.task(base=xc.XpanderTask)
    def ask() -> str:
        return "fine"

    xc.uninstrument()
    assert ask.apply().get() == "fine"


def kinds(journal: Path) -> list[str]:
    return [event.kind for directory in journal.iterdir() for event in FileReader(directory).poll(100).events]


def said(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if getattr(record, "event", None) == event]


def worker_starts(app: Celery) -> None:
    """What the worker program sends once logging is set up."""
    signals.celeryd_after_setup.send(sender="worker", instance=SimpleNamespace(app=app), conf=app.conf)


def test_a_task_that_cannot_be_read_keeps_no_other_from_being_reported(
    app: Celery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Unreadable(dict[str, str]):
        def __iter__(self) -> Any:
            raise LookupError("not here")

    xc.instrument(app, api_key="secret", agent_id="agent", journal=str(tmp_path), relay="external")

    @app.task(name="shop.strange", xpander=Unreadable(agent_id="other"))
    def strange() -> str:
        return "fine too"

    @app.task(name="shop.ask")
    def ask() -> str:
        return "fine"

    worker_starts(app)
    try:
        assert "TaskPlan failed" in said(caplog, "hook_failed")[0]
        assert issubclass(app.tasks["shop.ask"].Request, ObservedRequest)
        assert strange.apply().get() == "fine too"
        assert ask.apply().get() == "fine"
    finally:
        signals.worker_shutdown.send(sender=None)
    assert kinds(tmp_path) == ["started", "finished"]


def test_other_settings_of_another_app_are_refused_and_those_not_given_stay(app: Celery) -> None:
    xc.instrument(app, capture_input=False, redact_keys=["iban"], api_key="secret-1")
    with Celery("other", broker="memory://", set_as_current=False) as other:
        xc.instrument(other)
        xc.instrument(other, capture_input=False, concurrency=2)
        settings = runtime.settings_of(app)
        assert (settings.capture_input, settings.redact_keys, settings.concurrency) == (False, ("iban",), 2)
        with pytest.raises(ConfigurationError, match=r"capture_input: is False for another app of this process; one"):
            xc.instrument(other, capture_input=True)
        with pytest.raises(ConfigurationError, match="api_key: ") as refusal:
            xc.instrument(other, api_key="secret-2")
        assert "secret" not in str(refusal.value)
        assert not runtime.settings_of(app).capture_input
        xc.instrument(app, api_key="secret-1")
        assert runtime.settings_of(app).redact_keys == ()


def redis_settings(server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    server.client.ask("FLUSHALL")
    return {
        "api_key": "k",
        "agent_id": "a",
        "base_url": "http://127.0.0.1:9",
        "journal": server.url,
        "relay": "external",
    }


def test_jobs_of_a_redis_journal_go_to_one_stream_of_their_destination(
    app: Celery, redis_server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    xc.instrument(app, **redis_settings(redis_server, tmp_path, monkeypatch))
    with xc.job("digest"):
        pass
    relay = assembly.relay_config(runtime.settings_of(app))
    assert relay.journal == redis_server.url
    assert relay.directory.is_relative_to(tmp_path / "xpander-celery")
    assert redis_server.client.ask("XLEN", Keys(relay.directory.name).stream) == 2


def test_an_evicting_redis_stops_a_worker_at_its_start(
    app: Celery,
    redis_server: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    xc.instrument(app, **redis_settings(redis_server, tmp_path, monkeypatch))
    redis_server.client.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(SystemExit):
            worker_starts(app)
    finally:
        redis_server.client.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert "maxmemory-policy allkeys-lru" in said(caplog, "worker_refused")[0]


def test_a_redis_that_is_away_stops_no_worker_and_files_take_its_place(
    app: Celery,
    redis_server: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = redis_settings(redis_server, tmp_path, monkeypatch) | {"journal": "redis://:hunter2@127.0.0.1:1/0"}
    xc.instrument(app, **settings)
    worker_starts(app)
    with xc.job("digest"):
        pass
    [spilled] = (tmp_path / "xpander-celery").iterdir()
    assert kinds(spilled) == ["started", "finished"]
    signals.worker_shutdown.send(sender="worker")
    assert len(said(caplog, "journal_spills")) == 1
    assert "hunter2" not in caplog.text


def test_the_password_of_another_apps_redis_is_in_no_refusal(app: Celery) -> None:
    xc.instrument(app, journal="redis://:hunter2@redis/0")
    with (
        Celery("other", broker="memory://", set_as_current=False) as other,
        pytest.raises(ConfigurationError, match="journal: ") as refusal,
    ):
        xc.instrument(other, journal="redis://:hunter3@redis/0")
    assert "hunter" not in str(refusal.value)


def test_while_a_job_runs_the_settings_and_its_journal_stay(
    app: Celery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = tmp_path / "journal"
    xc.instrument(app, api_key="k", agent_id="a", journal=str(journal), relay="external")
    with xc.job("digest"):
        files = sorted(journal.rglob("*"))
        for _ in range(2):
            xc.instrument(app, api_key="k", agent_id="a", journal=str(tmp_path / "other"), relay="external")
        assert sorted(journal.rglob("*")) == files
    assert kinds(journal) == ["started", "finished"]
    assert len(said(caplog, "settings_kept")) == 1


def test_what_a_worker_forked_leaves_delivering_to_its_relay(app: Celery, tmp_path: Path) -> None:
    xc.instrument(app, api_key="k", agent_id="a", journal=str(tmp_path / "journal"), relay="external")
    worker_starts(app)
    child = os.fork()
    if child == 0:
        before = atexit._ncallbacks()
        with xc.job("digest"):
            pass
        os._exit(atexit._ncallbacks() - before)
    assert os.waitpid(child, 0)[1] == 0
    assert kinds(tmp_path / "journal") == ["started", "finished"]
    signals.worker_shutdown.send(sender="worker")


def test_while_a_worker_runs_the_settings_and_its_journal_stay(
    app: Celery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = tmp_path / "journal"
    settings: dict[str, Any] = {"api_key": "k", "agent_id": "a", "journal": str(journal), "relay": "external"}
    before = receivers()
    xc.instrument(app, **settings)
    worker_starts(app)
    files = sorted(journal.rglob("*"))
    xc.instrument(app, **settings)
    assert said(caplog, "settings_kept") == []
    xc.instrument(app, **settings, redact_keys=["iban"])
    assert len(said(caplog, "settings_kept")) == 1
    xc.uninstrument()
    assert sorted(journal.rglob("*")) == files
    signals.worker_shutdown.send(sender="worker")
    assert sorted(journal.rglob("*")) != files
    assert receivers() == before


def test_a_job_that_uninstruments_is_recorded_to_its_end_and_no_later_one(app: Celery, tmp_path: Path) -> None:
    before = receivers()
    xc.instrument(app, api_key="k", agent_id="a", journal=str(tmp_path / "journal"))

    @app.task
    def inner() -> None: ...

    @app.task
    def ask() -> None:
        xc.uninstrument()
        with xc.job("digest"):
            inner.apply()

    ask.apply()
    assert kinds(tmp_path / "journal") == ["started", "started", "finished", "finished"]
    assert receivers() == before
    inner.apply()
    assert len(kinds(tmp_path / "journal")) == 4


def test_instrument_takes_back_an_uninstrument_within_a_job(app: Celery, tmp_path: Path) -> None:
    xc.instrument(app, api_key="k", agent_id="a", journal=str(tmp_path / "journal"))

    @app.task
    def ask() -> None:
        xc.uninstrument()
        xc.instrument(app, api_key="k", agent_id="a", journal=str(tmp_path / "journal"))

    ask.apply()
    ask.apply()
    assert kinds(tmp_path / "journal") == ["started", "finished"] * 2


@pytest.mark.parametrize("began", [False, True])
def test_a_pool_child_whose_worker_does_not_report_says_so_once(
    app: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, began: bool
) -> None:
    xc.instrument(app, api_key="k", agent_id="a", journal=str(tmp_path / "journal"))
    monkeypatch.setattr(billiard.process._current_process, "_name", "ForkPoolWorker-1")
    assert runtime._runtime is not None
    runtime._runtime._worker.ran_above = began

    @app.task
    def ask() -> None: ...

    ask.apply()
    ask.apply()
    lines = said(caplog, "instrumented_in_child")
    assert ["Call instrument() where the app is defined" in line for line in lines] == ([] if began else [True])


@pytest.fixture
def removed_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.syspath_prepend("")
    (tmp_path / "gone").rmdir()


@pytest.mark.usefixtures("removed_directory")
def test_a_removed_working_directory_is_no_place_to_import_from(app: Celery, tmp_path: Path) -> None:
    xc.instrument(app, api_key="k", agent_id="a", journal=str(tmp_path / "journal"), before_send="shop:check")
    with xc.job("digest"):
        pass
    assert kinds(tmp_path / "journal") == ["started", "finished"]
    relay = assembly.relay_config(runtime.settings_of(app))
    assert "" not in relay.search_path


def test_a_path_object_among_the_places_to_import_from_is_handed_to_the_relay(
    app: Celery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    xc.instrument(app, api_key="k", agent_id="a", before_send="shop:check")
    relay = assembly.relay_config(runtime.settings_of(app))
    assert str(tmp_path) in RelayConfig.from_environ(relay.to_environ()).search_path


@pytest.mark.usefixtures("removed_directory")
def test_a_journal_relative_to_a_removed_directory_stops_workers_and_no_job(
    app: Celery, caplog: pytest.LogCaptureFixture
) -> None:
    xc.instrument(app, api_key="k", agent_id="a", journal="journal")
    for _ in range(2):
        with xc.job("digest"):
            pass
    assert len(said(caplog, "reporting_off")) == 1
    xc.uninstrument()
    xc.instrument(app, api_key="k", agent_id="a", journal="journal")
    with pytest.raises(SystemExit):
        worker_starts(app)
    assert "no place for the journal" in said(caplog, "worker_refused")[0]


@pytest.mark.parametrize("trouble", [RuntimeError("no home"), OSError("no home")])
def test_without_a_home_the_default_journal_is_off_with_one_warning(
    app: Celery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: Exception
) -> None:
    def no_home() -> Path:
        raise trouble

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    xc.instrument(app, api_key="k", agent_id="a")
    worker_starts(app)
    with xc.job("digest") as job:
        assert job.id is None
    lines = [(record.levelno, record.getMessage()) for record in caplog.records if record.name.startswith("xpander")]
    assert [level for level, _ in lines] == [logging.WARNING]
    assert lines[0][1].startswith("Reporting is off: no ")


def test_a_log_handler_that_fails_does_not_fail_a_job() -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("no space left")

    handler = Broken()
    logging.getLogger("xpander_celery").addHandler(handler)
    try:
        with xc.job("digest") as job:
            job.result = "done"
    finally:
        logging.getLogger("xpander_celery").removeHandler(handler)
        xc.uninstrument()
