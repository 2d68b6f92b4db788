"""How workers begin and end with reporting: refusals with a reason, and stops that lose nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import celery
import pytest

from tests.support import jobs
from tests.support.broker import Broker
from tests.support.waiting import until
from tests.support.worker import APP, Worker, start_worker
from xpander_celery.demo.processes import Leashed, ProcessError, clean_environ
from xpander_celery.events import Started
from xpander_celery.journal.liveness import has_file
from xpander_celery.report import Outcome, Tokens

ONE_CHILD = "--concurrency=1"


@pytest.fixture(autouse=True, scope="module")
def publisher(redis_broker: Broker) -> Iterator[None]:
    before = jobs.app.conf.broker_url, jobs.app.conf.result_backend
    jobs.app.conf.update(broker_url=redis_broker.url, result_backend=redis_broker.backend)
    yield
    jobs.app.conf.update(broker_url=before[0], result_backend=before[1])


def test_a_malformed_setting_stops_the_worker_and_says_what_to_do(redis_broker: Broker, tmp_path: Path) -> None:
    with (
        pytest.raises(ProcessError) as refusal,
        start_worker(redis_broker, tmp_path, XPANDER_CELERY_CONCURRENCY="many"),
    ):
        pass
    assert "XPANDER_CELERY_CONCURRENCY: Input should be a valid integer" in str(refusal.value)


def test_an_unusable_journal_stops_the_worker(redis_broker: Broker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ProcessError) as refusal,
        start_worker(redis_broker, tmp_path, XPANDER_CELERY_JOURNAL=str(tmp_path / "file")),
    ):
        pass
    assert "This worker stops: the journal cannot be opened" in str(refusal.value)


def test_a_default_journal_that_cannot_be_written_turns_reporting_off(redis_broker: Broker, tmp_path: Path) -> None:
    with start_worker(
        redis_broker,
        tmp_path,
        ONE_CHILD,
        XPANDER_CELERY_JOURNAL="",
        XDG_STATE_HOME="/proc/no-such-place",
        TEST_RELAY="auto",
    ) as worker:
        assert jobs.add.delay(1, 1).get(timeout=30) == 2
        worker.stop()
        assert worker.log.count("Reporting is off: no journal") == 1
        assert "relay" not in worker.log.replace("without-", "")


def test_an_unknown_option_of_a_task_stops_the_worker(redis_broker: Broker, tmp_path: Path) -> None:
    with (
        pytest.raises(ProcessError) as refusal,
        start_worker(redis_broker, tmp_path, TEST_OPTION="agnet_id"),
    ):
        pass
    assert "This worker stops: xpander: has no option 'agnet_id'" in str(refusal.value)


def test_without_a_key_jobs_run_with_one_warning(redis_broker: Broker, tmp_path: Path) -> None:
    with start_worker(redis_broker, tmp_path, ONE_CHILD, XPANDER_API_KEY="") as worker:
        assert jobs.add.delay(1, 1).get(timeout=30) == 2
        worker.stop()
        assert worker.log.count("there is no API key. Set XPANDER_API_KEY") == 1
        assert not (tmp_path / "journal").exists()


def test_without_an_agent_each_task_is_named_once(redis_broker: Broker, tmp_path: Path) -> None:
    with start_worker(redis_broker, tmp_path, "--concurrency=2", XPANDER_AGENT_ID="") as worker:
        assert jobs.add.delay(1, 1).get(timeout=30) == 2
        called = jobs.add.apply_async((1, 1), headers={"xpander_agent_id": "agent-of-the-call"})
        assert worker.journal.report(called.id).agent_id == "agent-of-the-call"
        worker.stop()
        assert worker.log.count("tests.support.jobs.add has no agent") == 1
        assert "jobs.own_agent has no agent" not in worker.log


def test_disabled_leaves_no_trace(redis_broker: Broker, tmp_path: Path) -> None:
    with start_worker(redis_broker, tmp_path, ONE_CHILD, XPANDER_CELERY_DISABLED="1") as worker:
        assert jobs.add.delay(1, 1).get(timeout=30) == 2
        assert "xpander" not in worker.log.replace("xpander_celery/demo", "")
        assert not (tmp_path / "journal").exists()


def test_instrument_within_worker_init_works(redis_broker: Broker, tmp_path: Path) -> None:
    with start_worker(redis_broker, tmp_path, ONE_CHILD, TEST_INSTRUMENT="worker_init") as worker:
        job_id = jobs.die.delay().id
        assert worker.journal.outcome(job_id) is Outcome.LOST
        assert worker.journal.report(job_id).tokens == Tokens(prompt_tokens=10, completion_tokens=1)


INSTRUMENTED_AGAIN = """
from celery import signals
from tests.support.jobs import app, xc

@signals.worker_ready.connect(weak=False)
def instrument(**_):
    xc.instrument(app, redact_keys=["iban"])
"""
INSTRUMENTED_IN_CHILDREN = """
import os
from celery import Celery, signals
import xpander_celery as xc

app = Celery("late", broker=os.environ["BROKER_URL"], backend=os.environ["RESULT_BACKEND"])

@app.task(name="tests.support.jobs.add")
def add(x, y):
    return x + y

@signals.worker_process_init.connect(weak=False)
def instrument(**_):
    xc.instrument(app)
"""


SENT_BY_BEAT = """
import os
from celery import Celery
import xpander_celery as xc

app = Celery("late", broker=os.environ["BROKER_URL"], backend=os.environ["RESULT_BACKEND"])
app.conf.beat_schedule = {"ask": {"task": "late.ask", "schedule": 0.5, "args": ["why?"]}}
app.conf.xpander_relay = "external"
xc.instrument(app)

@app.task(name="late.ask")
def ask(question):
    return question
"""


def start_worker_of(code: str, broker: Broker, directory: Path) -> AbstractContextManager[Worker]:
    (directory / "late_jobs.py").write_text(code)
    path = f"{Path(__file__).parents[2]}:{directory}"
    return start_worker(broker, directory, ONE_CHILD, app="late_jobs", PYTHONPATH=path)


def test_a_job_that_beat_sends_is_one_record_and_beat_writes_none(redis_broker: Broker, tmp_path: Path) -> None:
    (tmp_path / "beat").mkdir()
    with start_worker_of(SENT_BY_BEAT, redis_broker, tmp_path) as worker:
        beat = Leashed(
            "beat",
            [sys.executable, "-m", "celery", "-A", "late_jobs", "beat", "--schedule", str(tmp_path / "schedule")],
            log=tmp_path / "beat.log",
            environ=clean_environ(
                BROKER_URL=redis_broker.url,
                RESULT_BACKEND=redis_broker.backend,
                PYTHONPATH=f"{Path(__file__).parents[2]}:{tmp_path}",
                XPANDER_API_KEY="key",
                XPANDER_AGENT_ID="agent",
                XPANDER_CELERY_JOURNAL=str(tmp_path / "beat" / "journal"),
            ),
        )
        with beat:
            ends = until(lambda: len(worker.journal.verdicts()) > 1 and worker.journal.verdicts(), what="two jobs")
        reports = [end.report for end in ends.values() if end.report is not None]
        assert {(each.input, each.result, each.is_success) for each in reports} == {("why?", "why?", True)}
        assert all(each.llm_response["celery"]["queue_wait_s"] >= 0 for each in reports)
    assert list((tmp_path / "beat").iterdir()) == []
    jobs.app.control.purge()


def test_instrument_again_in_a_running_worker_keeps_it_alive(redis_broker: Broker, tmp_path: Path) -> None:
    with start_worker_of(INSTRUMENTED_AGAIN, redis_broker, tmp_path) as worker:
        job_id = jobs.sleep.delay(1).id
        [started, *_] = until(lambda: worker.journal.events(job_id), what="the start of the job")
        assert isinstance(started, Started)
        assert started.owner != started.child
        assert has_file(next((tmp_path / "journal").iterdir()), started.owner)
        assert worker.log.count("settings of a running worker cannot change; restart it") == 1
        assert worker.journal.report(job_id).result == "slept"


def test_instrument_in_pool_children_only_is_warned_of(redis_broker: Broker, tmp_path: Path) -> None:
    with start_worker_of(INSTRUMENTED_IN_CHILDREN, redis_broker, tmp_path) as worker:
        for _ in range(2):
            assert jobs.add.delay(1, 1).get(timeout=30) == 2
        assert worker.log.count("Call instrument() where the app is defined") == 1


def test_marked_tasks_are_reported_without_instrument(redis_broker: Broker, tmp_path: Path) -> None:
    with start_worker(redis_broker, tmp_path, ONE_CHILD, TEST_INSTRUMENT="never") as worker:
        plain = jobs.add.delay(1, 1)
        plain.get(timeout=30)
        for job in (jobs.own_agent.s("secret", "why?"), jobs.decorated.s("why?"), jobs.decorated_above.s("why?")):
            assert worker.journal.report(job.apply_async().id).is_success
        assert worker.journal.events(plain.id) == []


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_warm_stop_right_after_a_job_loses_nothing(redis_broker: Broker, tmp_path: Path, pool: str) -> None:
    with start_worker(redis_broker, tmp_path, f"--pool={pool}", ONE_CHILD) as worker:
        job_id = jobs.sleep.delay(0.5).id
        until(lambda: worker.journal.events(job_id), what="the start of the job")
        worker.stop()
        assert worker.journal.report(job_id, timeout_s=1).result == "slept"


def test_what_a_worker_had_only_fetched_is_not_reported(redis_broker: Broker, tmp_path: Path) -> None:
    with start_worker(redis_broker, tmp_path, ONE_CHILD, "--prefetch-multiplier=4") as worker:
        running = jobs.sleep.delay(1).id
        waiting = [jobs.sleep.delay(0).id for _ in range(2)]
        until(lambda: worker.journal.events(running), what="the start of the job")
        worker.stop()
        assert [worker.journal.events(job_id) for job_id in waiting] == [[], []]
    with start_worker(redis_broker, tmp_path / "next", ONE_CHILD) as worker:
        for job_id in waiting:
            assert worker.journal.report(job_id).is_success


def test_a_cold_stop_loses_the_running_job_and_says_so(redis_broker: Broker, tmp_path: Path) -> None:
    with start_worker(redis_broker, tmp_path, ONE_CHILD) as worker:
        job_id = jobs.sleep.delay(60).id
        until(lambda: worker.journal.events(job_id), what="the start of the job")
        worker.signal(signal.SIGQUIT)
        worker.wait()
        report = worker.journal.report(job_id, timeout_s=1)
        assert worker.journal.outcome(job_id) is Outcome.LOST
        assert (report.is_success, (report.result or "")[:15]) == (False, "WorkerLostError")


@pytest.mark.skipif(celery.VERSION < (5, 5), reason="this Celery acknowledges what a cold stop kills")
def test_a_job_that_a_cold_stop_gives_back_is_one_record(redis_broker: Broker, tmp_path: Path) -> None:
    with start_worker(redis_broker, tmp_path, ONE_CHILD) as worker:
        job_id = jobs.sleep_late.delay(60).id
        until(lambda: worker.journal.events(job_id), what="the start of the job")
        worker.signal(signal.SIGQUIT)
        worker.wait()
        assert worker.journal.verdicts() == {}
    journal = str(tmp_path / "journal")
    with start_worker(
        redis_broker, tmp_path / "next", ONE_CHILD, TEST_SHORT="1", XPANDER_CELERY_JOURNAL=journal
    ) as worker:
        report = worker.journal.report(job_id, timeout_s=60)
        assert (report.is_success, report.result) == (True, "slept")
        assert report.tokens == Tokens(prompt_tokens=20, completion_tokens=2)


def test_other_commands_of_the_app_write_nothing(redis_broker: Broker, tmp_path: Path) -> None:
    environ = clean_environ(
        BROKER_URL=redis_broker.url,
        RESULT_BACKEND=redis_broker.backend,
        PYTHONPATH=str(Path(__file__).parents[2]),
        XPANDER_API_KEY="key",
        XPANDER_AGENT_ID="agent",
        XPANDER_CELERY_JOURNAL=str(tmp_path / "journal"),
        HOME=str(tmp_path),
    )
    for command in (["report"], ["inspect", "ping", "--timeout=0.2"], ["call", f"{APP}.add", "--args=[1,1]"]):
        subprocess.run(
            [sys.executable, "-m", "celery", "-A", APP, *command], env=environ, capture_output=True, timeout=60
        )
    assert list(tmp_path.iterdir()) == []
    jobs.app.control.purge()
