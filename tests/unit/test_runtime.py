"""Installing, its settings, and that it costs nothing where nothing runs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, current_app, signals

import xpander_celery as xc
from xpander_celery import runtime
from xpander_celery.errors import ConfigurationError
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
    if how == "variable":
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
