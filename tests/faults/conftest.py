"""What tests of faults share, and their table: which row each is for, and after a run what became of every row.

A test says `@pytest.mark.fault(13)`, with several numbers where it is for several rows. A run of the whole folder fails
when a row has no test; one that is skipped says why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.broker import Broker, start_redis
from tests.support.redis_server import RedisServer, running_redis
from tests.support.sandbox import Sandbox, start_sandbox

FAULTS: Mapping[int, tuple[str, str]] = {
    1: ("SIGKILL child after append", "zero lost"),
    2: ("SIGKILL in the middle of a write", "torn line skipped and counted, neighbours intact"),
    3: ("SIGKILL parent", "segments adopted by the next relay; open jobs closed as lost"),
    4: ("SIGKILL relay between 200 and acknowledgement", "one duplicate POST, same id, one record"),
    5: ("SIGKILL relay between commit and unlink", "read again; one record"),
    6: ("two relays started", "one holds the lock, the other exits 0"),
    7: ("fork while the parent holds a segment", "parent dies, lock free; no shared writes"),
    8: ("warm stop right after a job", "delivered within 5 s, or by the next relay"),
    9: ("cold stop in each pool", "exits within 1 s more than without us; zero lost"),
    10: ("hard time limit", "one record, timed_out, in spite of the double signal"),
    11: ("child OOM-killed", "one record, lost, with the tokens spent so far"),
    12: ("max_tasks_per_child=1, many jobs", "a record each, no hang, no growth of descriptors"),
    13: (
        "platform refuses connections for hours",
        "≤ 1 request a minute, nothing dead, drains at the rate limit",
    ),
    14: ("platform accepts and never answers", "times out; job latency unchanged"),
    15: ("200 sent, reply lost", "sent again, one record"),
    16: ("429 with Retry-After 120, or an HTTP date", "no request for 120 s"),
    17: ("Retry-After 10⁹, or garbage", "clamped to 1 h, or ignored"),
    18: ("422 on one id among good ones", "that one dead after one attempt, the rest unaffected"),
    19: ("500 always for one id", "dead at 12, breaker stays closed"),
    20: ("API key revoked for 2 h", "paused, nothing dead, resumes by itself"),
    21: ("a report that crashes the relay", "dead after 3, the rest flow; other kills make none dead"),
    22: ("Redis SIGKILL with AOF", "zero lost"),
    23: ("Redis SIGKILL without AOF", "only undelivered stream entries lost; warned at start"),
    24: ("Redis frozen (SIGSTOP)", "first append at most 0.3 s, then microseconds; spool drains"),
    25: ("Redis FLUSHALL", "group re-created, new reports flow"),
    26: ("Redis out of memory (noeviction)", "spills to files, zero lost"),
    27: ("disk full, then freed", "jobs unaffected; memory, then counted drops; recovers unaided"),
    28: ("index corrupted", "quarantined, fresh index, unread segments delivered, count reported"),
    29: ("power cut", "on the disk at most 500 ms after an append; before it returns with fsync=always"),
    30: ("clock jumps ± 1 h", "no storm, no stall over 300 s"),
    31: ("stale keep-alive, DNS failure, bad TLS", "retried; no attempts used if all fail"),
    32: ("a signal inside append re-enters append", "no deadlock, both recorded"),
    33: ("3xx", "not followed, destination paused, one clear log line"),
}

_KINDS = ("failed", "passed", "skipped", "not run")
_NO_TEST = "NO TEST"

_rows = pytest.StashKey[dict[str, tuple[int, ...]]]()
_results = pytest.StashKey[dict[str, tuple[str, str]]]()
_is_whole = pytest.StashKey[bool]()


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    """Where the workers of a module have their jobs from."""
    with start_redis() as broker:
        yield broker


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server for the journal, that keeps what it took."""
    with running_redis(tmp_path / "redis", "--appendonly", "yes") as server:
        yield server


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """The platform."""
    with start_sandbox() as sandbox:
        yield sandbox


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(row, ...): the rows of the table of faults that a test is for")
    config.stash[_rows] = {}
    config.stash[_results] = {}
    config.stash[_is_whole] = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Note the rows of every test, before any selection takes tests away."""
    for item in items:
        rows = tuple(row for mark in item.iter_markers("fault") for row in mark.args)
        if unknown := set(rows) - set(FAULTS):
            raise pytest.UsageError(f"{item.nodeid}: the table of faults has no rows {sorted(unknown)}")
        if rows:
            config.stash[_rows][item.nodeid] = rows
    asked = config.invocation_params.args
    config.stash[_is_whole] = any(str(argument).rstrip("/").endswith("tests/faults") for argument in asked)


@pytest.hookimpl(hookwrapper=True)
def pytest_report_teststatus(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> object:
    """Keep the worst that any phase of a test came to."""
    if isinstance(report, pytest.TestReport) and report.nodeid in config.stash[_rows]:
        known, _ = config.stash[_results].get(report.nodeid, ("not run", ""))
        if report.failed:
            config.stash[_results][report.nodeid] = ("failed", "")
        elif report.skipped and known != "failed":
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            config.stash[_results][report.nodeid] = ("skipped", why.removeprefix("Skipped: "))
        elif report.when == "call" and known == "not run":
            config.stash[_results][report.nodeid] = ("passed", "")
    yield


def outcomes(config: pytest.Config) -> dict[int, str]:
    """What became of each row."""
    by_row: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
    for nodeid, rows in config.stash[_rows].items():
        for row in rows:
            by_row[row].append(config.stash[_results].get(nodeid, ("not run", "")))
    found = {}
    for row in FAULTS:
        kinds = [kind for kind, _ in by_row[row]]
        counted = [
            f"{kinds.count(kind)} {kind}" for kind in ("failed", "passed", "skipped", "not run") if kind in kinds
        ]
        reasons = sorted({why for _, why in by_row[row] if why})
        found[row] = ", ".join(counted) + (f" ({'; '.join(reasons)})" if reasons else "") if kinds else "NO TEST"
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table, with what became of each row."""
    if not any(result[0] != "not run" for result in config.stash[_results].values()):
        return
    terminalreporter.section("faults")
    for row, outcome in outcomes(config).items():
        fault, required = FAULTS[row]
        if outcome == _NO_TEST and not config.stash[_is_whole]:
            continue
        is_bad = "failed" in outcome or outcome == _NO_TEST
        colour = {"red": is_bad, "green": "passed" in outcome and not is_bad}
        terminalreporter.write(f"{row:>3}  {fault:<48} ")
        terminalreporter.write_line(outcome, **colour)
        terminalreporter.write_line(f"     → {required}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A row of the table without a test fails a run of the whole folder."""
    config = session.config
    missing = [row for row, outcome in outcomes(config).items() if outcome == _NO_TEST]
    if missing and config.stash[_is_whole] and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
