"""The table: every way a job can end, how it is provoked, and the one record that it must give. Pure data.

A case's job runs a script (see `app.py`). `pools` and `versions` say where another record is due than in prefork of the
newest Celery, `note` why.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

POOLS = ("prefork", "threads", "solo", "gevent", "eventlet")
PREFORK = ("prefork",)
ONE_PROCESS = ("threads", "solo", "gevent", "eventlet")
GREEN = ("gevent", "eventlet")
CONCURRENT = ("prefork", "threads", "gevent", "eventlet")

Script = list[list[list[Any]]]


@dataclass(frozen=True)
class Record:
    """What is due. `text` is in the result, `attempts` how often the body began, `posts` how often it may be sent."""

    outcome: str
    text: str = ""
    attempts: int = 1
    posts: tuple[int, ...] = (1,)

    @property
    def is_absent(self) -> bool:
        return not self.outcome

    def __str__(self) -> str:
        return self.outcome or "none"


NONE = Record("", posts=(0,), attempts=0)
DONE = Record("succeeded", "done")
TWICE = replace(DONE, attempts=2)
LOST = Record("lost", "WorkerLostError")
TIMED_OUT = Record("timed_out", "TimeLimitExceeded")
REVOKED = Record("revoked", "revoked")
UNKILLABLE = Record("failed", "does not implement kill_job")  # Celery's handler of the signal fails inside the body


# Where the two differ in how often the body runs, and Celery leaves it to chance: the ledger tells which one is due.
Due = Record | tuple[Record, ...]


def everywhere(record: Record, pools: tuple[str, ...]) -> dict[str, Due]:
    return dict.fromkeys(pools, record)


@dataclass(frozen=True)
class Case:
    """One row. `group` is the kind of worker that it needs (`GROUPS`), `how` the way its job is sent (`driver.py`),
    `note` why Celery gives another outcome than one may expect.
    """

    name: str
    script: Script
    record: Record
    how: str = "send"
    task: str = "plain"
    options: dict[str, Any] = field(default_factory=dict)
    group: str = "calm"
    groups: dict[str, str] = field(default_factory=dict)  # where a pool needs another
    only: tuple[str, ...] = POOLS
    since: str = "5.4"
    pools: dict[str, Due] = field(default_factory=dict)
    versions: dict[tuple[str, str], Due] = field(default_factory=dict)  # by (version, pool)
    note: str = ""

    def runs_on(self, version: str, pool: str) -> bool:
        return pool in self.only and version >= self.since

    def runs_in(self, group: str, version: str, pool: str) -> bool:
        return self.runs_on(version, pool) and self.groups.get(pool, self.group) == group

    def due(self, version: str, pool: str) -> tuple[Record, ...]:
        """One of these, whichever the ledger says."""
        due = self.versions.get((version, pool)) or self.pools.get(pool) or self.record
        return due if isinstance(due, tuple) else (due,)


@dataclass(frozen=True)
class Group:
    """A worker: its command line and environment, what is done to it once its jobs run, and whether one follows it."""

    name: str
    concurrency: int = 8
    environment: dict[str, str] = field(default_factory=dict)
    signal: str | None = None
    running: int = 0  # how many bodies have begun when the signal is sent
    held_s: float = 0.0  # how long after it the bodies wait at most; see the verb "wait"
    followed: bool = False


# Gevent and eventlet workers have no event loop, so they never take back what a dead one held: the worker that follows
# them is one of threads.
# What nobody takes back for twice the visibility timeout is reported as lost, and once more when it comes after all: so
# long a worker may take to start on a loaded machine.
_REDELIVERING = {"MATRIX_VISIBILITY_S": "30", "XPANDER_CELERY_REDELIVERY_WAIT_S": "120"}
GROUPS = {
    group.name: group
    for group in (
        Group("calm", environment={"XPANDER_CELERY_REDELIVERY_WAIT_S": "20"}),
        Group("warm", concurrency=1, environment={"MATRIX_PREFETCH": "4"}, signal="SIGTERM", running=1, held_s=1),
        Group("cold", concurrency=1, signal="SIGQUIT", running=1, held_s=4),
        Group(
            "cold late", concurrency=1, environment=_REDELIVERING, signal="SIGQUIT", running=1, held_s=4, followed=True
        ),
        Group("soft", concurrency=2, environment={"MATRIX_SOFT_S": "3"}, signal="SIGQUIT", running=2, held_s=8),
        Group(
            "soft late",
            concurrency=1,
            environment={"MATRIX_SOFT_S": "1", **_REDELIVERING},
            signal="SIGQUIT",
            running=1,
            held_s=5,
            followed=True,
        ),
        Group("killed", concurrency=1, signal="SIGKILL", running=1, held_s=30),
        Group(
            "killed late",
            concurrency=1,
            environment=_REDELIVERING,
            signal="SIGKILL",
            running=1,
            held_s=30,
            followed=True,
        ),
        Group("exit", concurrency=1),
        Group("interrupt", concurrency=1),
        Group("recycled", concurrency=2, environment={"MATRIX_RECYCLE": "1"}),
        Group("heavy", concurrency=2, environment={"MATRIX_MEMORY": "100000"}),
    )
}

SPEND = ["spend", 10]
PLAIN = [[SPEND]]
KILLED_ONCE = [[SPEND, ["leave", "SIGKILL"]], [SPEND]]
LONG = [[SPEND, ["sleep", 40]], [SPEND]]
HELD = [[SPEND, ["wait"]], [SPEND]]

RETURNS = (
    Case("success", [[SPEND, ["return", {"answer": 42}]]], Record("succeeded", '{"answer":42}')),
    Case("success after a countdown", PLAIN, DONE, options={"countdown": 1}),
    Case("failure", [[SPEND, ["fail", "no such thing"]]], Record("failed", "ValueError: no such thing")),
    Case(
        "result that cannot be encoded",
        [[SPEND, ["return", "an object"]]],
        Record("failed", "not JSON serializable"),
    ),
    Case(
        "result back-end fails after the body",
        [[SPEND, ["return", "unstorable"]]],
        Record("failed", "the result back-end is full", posts=(1, 2)),  # the success may be on its way already
    ),
    Case("Ignore", [[SPEND, ["ignore"]]], Record("ignored")),
    Case("Reject", [[SPEND, ["reject", False]]], Record("rejected"), task="late"),
    Case("Reject, acknowledged early", [[SPEND, ["reject", False]]], Record("rejected")),
    Case("Reject with requeue, then success", [[SPEND, ["reject", True]], [SPEND]], TWICE, task="late"),
)
RETRIES = (
    Case(
        "retry, then success",
        [[SPEND, ["retry", 0]], [SPEND, ["retry", 1]], [SPEND]],
        replace(DONE, attempts=3),
    ),
    Case(
        "autoretry until it gives up",
        [[SPEND, ["outage"]]],
        Record("failed", "ConnectionError: down", attempts=3),
        task="autoretry",
    ),
    Case("retry that never comes", [[SPEND, ["retry_elsewhere"]]], Record("retried", "no further attempt came")),
    Case(
        "replaced by a task",
        [[SPEND, ["replace", "task"]], [["spend", 5], ["return", "replaced"]]],
        Record("succeeded", "replaced", attempts=2),
    ),
    Case(
        "replaced by a chain",
        [[SPEND, ["replace", "chain"]], [["spend", 5], ["return", "replaced"]]],
        Record("succeeded", "replaced", attempts=2),
    ),
    Case("replaced by a group", [[SPEND, ["replace", "group"]]], Record("succeeded", '["done","done"]')),
)
LIMITS = (
    Case(
        "soft time limit",
        [[SPEND, ["sleep", 10, 2]]],
        Record("failed", "SoftTimeLimitExceeded"),
        options={"soft_time_limit": 1},
        pools=everywhere(DONE, ONE_PROCESS),
        note="Only prefork interrupts a job.",
    ),
    Case(
        "hard time limit",
        [[SPEND, ["sleep", 10, 2]]],
        TIMED_OUT,
        options={"time_limit": 1},
        pools=everywhere(DONE, ("threads", "solo", "eventlet")),
        note="Threads, solo and eventlet do not interrupt a job.",
    ),
    Case(
        "hard time limit, blocking body", [[SPEND, ["block", 10]]], TIMED_OUT, options={"time_limit": 1}, only=PREFORK
    ),
    Case(
        "hard time limit, not acknowledged",
        [[SPEND, ["sleep", 10]], [SPEND]],
        TWICE,
        task="late_unacknowledged",
        options={"time_limit": 1},
        only=PREFORK,
        versions={("5.4", "prefork"): TIMED_OUT},
        note="With `acks_on_failure_or_timeout=False` the job comes again, but for 5.4.",
    ),
    Case(
        "revoke(terminate), SIGTERM",
        [[SPEND, ["sleep", 10, 3]]],
        REVOKED,
        how="send, then terminate",
        pools=everywhere(DONE, ("threads", "solo")),
        versions={("5.4", "gevent"): DONE},
        note="Threads and solo cannot end a job, nor can gevent of 5.4.",
    ),
    Case("revoke(terminate), SIGKILL", LONG, REVOKED, how="send, then kill", only=PREFORK),
    Case("revoke(terminate), SIGKILL, acks_late", LONG, REVOKED, how="send, then kill", task="late", only=PREFORK),
    Case(
        "revoked before it starts",
        PLAIN,
        replace(REVOKED, attempts=0),
        how="send, then revoke",
        options={"countdown": 5},
    ),
    Case("revoked before it arrives", PLAIN, replace(REVOKED, attempts=0), how="revoke, then send"),
    Case(
        "expired",
        PLAIN,
        Record("expired", "expired", attempts=0),
        options={"countdown": 20, "expires": 15},
        note="Where it expires in a queue of RabbitMQ, the broker drops it: no worker sees it, and there is no record.",
    ),
)
LOSSES = (
    Case("SIGKILL of the child", [[SPEND, ["leave", "SIGKILL"]]], LOST, only=PREFORK),
    Case("os._exit in the child", [[SPEND, ["leave", "os._exit"]]], LOST, only=PREFORK),
    Case("SIGKILL of the child, acks_late", KILLED_ONCE, LOST, task="late", only=PREFORK),
    Case("the same, reject_on_worker_lost", KILLED_ONCE, TWICE, task="late_requeued", only=PREFORK),
    Case("the same, retry_on_worker_lost", KILLED_ONCE, TWICE, task="retried_when_lost", only=PREFORK, since="5.7"),
    Case(
        "SystemExit in the body",
        [[SPEND, ["leave", "SystemExit"]]],
        LOST,
        pools=everywhere(Record("failed", "SystemExit"), ONE_PROCESS),
        groups={"solo": "exit"},  # it ends the worker
        note="In prefork it ends the process, elsewhere the job alone, and in solo the worker after it.",
    ),
    Case(
        "KeyboardInterrupt in the body",
        [[SPEND, ["leave", "KeyboardInterrupt"]]],
        LOST,
        pools=everywhere(Record("failed", "KeyboardInterrupt"), ONE_PROCESS),
        groups={"solo": "interrupt"},  # it ends the worker
        note="As SystemExit.",
    ),
)
MESSAGES = (
    Case("unknown task", PLAIN, Record("failed", "no.such.task", attempts=0), task="no.such.task"),
    Case("malformed message", PLAIN, NONE, how="send garbage"),
    Case("job that calls another eagerly", [[SPEND, ["eager"]]], DONE),
    Case("member of a group", PLAIN, DONE, how="group"),
    Case("member of a chain", PLAIN, DONE, how="chain"),
    Case("member of a chord", PLAIN, DONE, how="chord"),
    Case("own Request and __call__: success", PLAIN, DONE, task="own"),
    Case("own on_failure: failure", [[SPEND, ["fail", "own"]]], Record("failed", "ValueError: own"), task="own"),
    Case("own Request: SIGKILL of the child", [[SPEND, ["leave", "SIGKILL"]]], LOST, task="own", only=PREFORK),
)
WORKERS = (
    Case("warm stop: the running job", HELD, DONE, group="warm"),
    Case(
        "warm stop: a prefetched job",
        PLAIN,
        NONE,
        group="warm",
        how="send second",
        only=CONCURRENT,
        pools=everywhere(DONE, GREEN),
        versions={(version, "threads"): DONE for version in ("5.4", "5.5", "5.6")},
        note="It goes back to the broker, unless the pool runs it before the worker ends.",
    ),
    Case(
        "cold stop",
        HELD,
        LOST,
        group="cold",
        pools={"threads": DONE, "solo": UNKILLABLE},
        versions={("5.4", "solo"): DONE},
        note="Threads cannot be stopped. The handler of the signal fails within the job of solo, but for 5.4.",
    ),
    Case(
        "cold stop, acks_late",
        HELD,
        TWICE,
        group="cold late",
        task="late",
        pools={"threads": DONE, "solo": UNKILLABLE, "eventlet": LOST, "gevent": (LOST, TWICE)},
        versions={
            ("5.4", "prefork"): LOST,
            ("5.4", "threads"): replace(TWICE, posts=(1, 2)),  # it ends, and is delivered again all the same
            ("5.4", "solo"): DONE,
            ("5.4", "eventlet"): TWICE,
        },
        note="Green pools give a job that they kill out as a success, so its message is acknowledged and does not come "
        "again; the gevent worker may end in an error before that, and then it does. In 5.4 the cold stop of prefork "
        "acknowledges what it kills.",
    ),
    Case(
        "soft stop: a job that ends in time",
        [[SPEND, ["sleep", 2]]],
        DONE,
        group="soft",
        since="5.5",
        pools={"solo": UNKILLABLE},
        note="The only thread of solo waits in the handler of the signal, which fails within the job.",
    ),
    Case(
        "soft stop: a job that does not",
        HELD,
        LOST,
        group="soft",
        since="5.5",
        only=CONCURRENT,
        pools=everywhere(DONE, ("threads", *GREEN)),
        note="Threads and green pools wait for their jobs.",
    ),
    Case(
        "soft stop, acks_late",
        HELD,
        TWICE,
        group="soft late",
        task="late",
        since="5.5",
        pools={**everywhere(DONE, ("threads", *GREEN)), "solo": UNKILLABLE},
        note="As above.",
    ),
    Case("SIGKILL of the worker", HELD, LOST, group="killed"),
    Case("SIGKILL of the worker, acks_late", HELD, TWICE, group="killed late", task="late"),
    Case("worker_max_tasks_per_child", [[SPEND, ["settle"]]], DONE, group="recycled", how="send ten", only=PREFORK),
    Case(
        "worker_max_memory_per_child",
        [[SPEND, ["grow", 200], ["settle"]]],
        DONE,
        group="heavy",
        how="send ten",
        only=PREFORK,
    ),
)
CASES = (*RETURNS, *RETRIES, *LIMITS, *LOSSES, *MESSAGES, *WORKERS)
