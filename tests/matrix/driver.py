"""Sends the jobs of one group, in the environment of the worker's Celery version, and says their ids.

    python -m tests.matrix.driver VERSION POOL GROUP

prints one JSON object, {case: [job ids]}, when everything is sent and every revocation is under way.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any

from celery import chain, chord, group

from tests.matrix.app import LEDGER, app, plain
from tests.matrix.cases import CASES, Case

DEADLINE_S = 60.0


def send(case: Case) -> list[str]:
    job_id = str(uuid.uuid4())
    app.send_task(task_name(case), args=[case.script], task_id=job_id, **case.options)
    return [job_id]


def task_name(case: Case) -> str:
    return case.task if "." in case.task else f"tests.matrix.app.{case.task}"


def send_then_terminate(case: Case) -> list[str]:
    return revoked_while_running(case, "SIGTERM")


def send_then_kill(case: Case) -> list[str]:
    return revoked_while_running(case, "SIGKILL")


def revoked_while_running(case: Case, signal: str) -> list[str]:
    (job_id,) = send(case)
    later.append(lambda: (wait_until_spent(job_id), app.control.revoke(job_id, terminate=True, signal=signal)))
    return [job_id]


def wait_until_spent(job_id: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    ledger = LEDGER / job_id
    while not (ledger.exists() and " spent " in ledger.read_text()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job_id} did not run")
        time.sleep(0.05)


def send_then_revoke(case: Case) -> list[str]:
    (job_id,) = send(case)
    app.control.revoke(job_id)
    return [job_id]


def revoke_then_send(case: Case) -> list[str]:
    job_id = str(uuid.uuid4())
    app.control.revoke(job_id)
    deadline = time.monotonic() + DEADLINE_S
    while not any(job_id in revoked for revoked in (app.control.inspect(timeout=1).revoked() or {}).values()):
        if time.monotonic() > deadline:
            raise TimeoutError("the worker did not hear of the revocation")
    app.send_task(task_name(case), args=[case.script], task_id=job_id)
    return [job_id]


def send_garbage(case: Case) -> list[str]:
    with app.producer_or_acquire() as producer:
        producer.publish(
            b"garbage",
            routing_key=app.conf.task_default_queue,
            content_type="application/json",
            content_encoding="utf-8",
        )
    return []


def send_group(case: Case) -> list[str]:
    return [member.id for member in group(plain.si(case.script) for _ in range(3))()]


def send_chain(case: Case) -> list[str]:
    last = chain(plain.si(case.script), plain.si(case.script))()
    return [last.parent.id, last.id]


def send_chord(case: Case) -> list[str]:
    body = chord([plain.si(case.script), plain.si(case.script)])(plain.si(case.script))
    return [*(member.id for member in body.parent), body.id]


def send_ten(case: Case) -> list[str]:
    return [send(case)[0] for _ in range(10)]


def send_second(case: Case) -> list[str]:
    """Once the job before it runs, so that the worker has it prefetched."""
    deadline = time.monotonic() + DEADLINE_S
    while not any(LEDGER.iterdir()):
        if time.monotonic() > deadline:
            raise TimeoutError("no job runs")
        time.sleep(0.05)
    sent = send(case)
    while not any((app.control.inspect(timeout=1).reserved() or {}).values()):
        if time.monotonic() > deadline:
            raise TimeoutError("nothing is prefetched")
    return sent


WAYS: dict[str, Callable[[Case], list[str]]] = {
    "send": send,
    "send, then terminate": send_then_terminate,
    "send, then kill": send_then_kill,
    "send, then revoke": send_then_revoke,
    "revoke, then send": revoke_then_send,
    "send garbage": send_garbage,
    "group": send_group,
    "chain": send_chain,
    "chord": send_chord,
    "send ten": send_ten,
    "send second": send_second,
}
later: list[Callable[[], Any]] = []


def main(version: str, pool: str, group_name: str) -> None:
    chosen = [case for case in CASES if case.runs_in(group_name, version, pool)]
    first = [case for case in chosen if case.how == "revoke, then send"]  # its worker must be idle where it is solo
    sent = {case.name: WAYS[case.how](case) for case in [*first, *(case for case in chosen if case not in first)]}
    for act in later:
        act()
    print(json.dumps(sent), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
