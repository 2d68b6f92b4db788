"""A job that Celery's pool gives to a second child, for the same request, is one record with what both spent."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

from tests.support import put_back
from tests.support.broker import Broker
from tests.support.waiting import until
from tests.support.worker import start_worker
from xpander_celery.events import Started
from xpander_celery.report import Outcome, Tokens


def test_a_job_that_two_children_ran_for_one_request_has_the_usage_of_both(
    redis_broker: Broker, tmp_path: Path
) -> None:
    app = put_back.app
    app.conf.update(broker_url=redis_broker.url, result_backend=redis_broker.backend)
    with start_worker(
        redis_broker, tmp_path, "--concurrency=2", app="tests.support.put_back", PUT_BACK_PLACE=str(tmp_path)
    ) as worker:
        second = sorted(child.pid for child in psutil.Process(worker.pid).children())[-1]  # looked at first
        psutil.Process(second).send_signal(signal.SIGSTOP)
        ids = {put_back.die_once.delay().id for _ in range(2)}
        for _ in range(2):  # once received, a job is on its way to a child when the next question is answered
            until(lambda: len(_held()) == 2, what="both jobs at the worker")
        until(lambda: any((tmp_path / job_id).exists() for job_id in ids), what="the job of the first child")
        (tmp_path / put_back.STOPPED).write_text(str(second))
        (tmp_path / put_back.GO).touch()
        again, *_ = until(lambda: [i for i in ids if _runs(tmp_path / i) == 2], what="a job that two children ran")
        report = worker.journal.report(again)
        assert (report.is_success, report.result) == (True, "survived")
        assert report.tokens == Tokens(prompt_tokens=20, completion_tokens=2)
        starts = [event for event in worker.journal.events(again) if isinstance(event, Started)]
        assert len({event.child for event in starts}) == 2
        assert len({event.owner for event in starts}) == 1
        [other] = ids - {again}
        if worker.journal.outcome(other) is Outcome.LOST:
            assert worker.journal.report(other).tokens == put_back.SPENT
        else:  # on a busy machine its child died unheard as well
            assert _runs(tmp_path / other) == 2
            assert worker.journal.report(other).tokens == Tokens(prompt_tokens=20, completion_tokens=2)


def _held() -> list[object]:
    inspect = put_back.app.control.inspect(timeout=5, limit=1)  # there is one worker, so its answer is all
    return [job for told in (inspect.reserved(), inspect.active()) for jobs in (told or {}).values() for job in jobs]


def _runs(ledger: Path) -> int:
    return len(ledger.read_text().split()) if ledger.exists() else 0
