"""Runs the table of end states: Celery versions x pools x cases, on real workers.

    python -m tests.matrix [--versions 5.4,5.7] [--pools solo] [--groups calm] [--broker rabbitmq]
                           [--write docs/ends.md]

Where no groups are named, the tests of what lies around a job's body, and of how workers begin and end, run with each
version before that; `--tests` runs nothing else. Exits 0 when every job gave exactly the record that is due.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import redis

from tests.matrix.cases import CASES, GROUPS, POOLS, Case
from tests.matrix.environments import ROOT, VERSIONS, python_of
from tests.matrix.judge import fewest_faults_of, outcome_in
from tests.matrix.site import Site
from tests.matrix.table import documented, due_of, rendered
from tests.support.broker import start_rabbitmq, start_redis
from tests.support.sandbox import Sandbox, start_sandbox

AROUND = (
    *(f"tests/unit/test_{name}.py" for name in ("task", "hooks", "requests", "plans", "messages")),
    "tests/integration/test_life_of_workers.py",
)
AT_ONCE = 6
DEADLINE_S = 75.0


@dataclass
class Result:
    """What became of one group of jobs."""

    site: Site
    jobs: dict[str, list[str]] = field(default_factory=dict)  # by case
    error: str | None = None
    seconds: float = 0.0


def cases_of(site: Site) -> list[Case]:
    return [case for case in CASES if case.runs_in(site.group, site.version, site.pool)]


def faults_by_case(site: Site, jobs: dict[str, list[str]]) -> dict[str, list[str]]:
    """What is wrong, by case; what belongs to no case (a job that nobody sent) under the empty name."""
    records = {record["id"]: record for record in site.sandbox.records(site.agent_id)}
    posts = site.sandbox.posts_by_id()
    faults: dict[str, list[str]] = {}
    for case in cases_of(site):
        found = [
            f"{job_id}: {fault}"
            for job_id in jobs.get(case.name, ())
            for fault in fewest_faults_of(
                case.due(site.version, site.pool), records.get(job_id), posts.get(job_id, 0), site.attempts(job_id)
            )
        ]
        faults[case.name] = found
    known = {job_id for ids in jobs.values() for job_id in ids}
    helpers = set(site.jobs()) - known  # jobs that were sent by jobs: members of a replacement, eager calls
    faults[""] = [f"a record of no job: {records[job_id]}" for job_id in records.keys() - known - helpers]
    for job_id in helpers:
        outcome, sent = outcome_in(records.get(job_id)), posts.get(job_id, 0)
        if (outcome, sent) != ("succeeded", 1):
            faults[""].append(f"{job_id}: a job sent by a job is {outcome} and was sent {sent} times")
    return faults


def run(site: Site) -> Result:
    began, result = time.monotonic(), Result(site)
    try:
        result.jobs = site.run(lambda jobs: not any(faults_by_case(site, jobs).values()), DEADLINE_S)
    except Exception:
        result.error = traceback.format_exc()
    result.seconds = time.monotonic() - began
    print(f"  {site.name}: {result.seconds:.0f} s{' ERROR' if result.error else ''}", file=sys.stderr, flush=True)
    return result


def sites_of(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """The wanted (version, pool, group), those that take longest first."""
    wanted = [
        (version, pool, group)
        for group in sorted(options.groups, key=lambda name: name != "calm")
        for version in options.versions
        for pool in options.pools
    ]
    return [each for each in wanted if any(case.runs_in(each[2], each[0], each[1]) for case in CASES)]


def run_all(options: argparse.Namespace, directory: Path, sandbox: Sandbox) -> list[Result]:
    """Every group on a broker database of its own, a few at a time."""
    with ExitStack() as stack:
        stores = stack.enter_context(start_redis())
        rabbitmq = stack.enter_context(start_rabbitmq()).url if options.broker == "rabbitmq" else None
        free: SimpleQueue[str] = SimpleQueue()
        for number in range(1, AT_ONCE + 1):
            free.put(f"{stores.url.rpartition('/')[0]}/{number}")

        def run_one(wanted: tuple[str, str, str]) -> Result:
            version, pool, group = wanted
            database = free.get()
            try:
                with redis.Redis.from_url(database) as client:
                    client.flushdb()
                place = directory / "-".join(wanted).replace(" ", "-")
                return run(Site(version, pool, group, place, rabbitmq or database, database, sandbox))
            finally:
                free.put(database)

        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(run_one, sites_of(options)))


def tests_fail(version: str) -> bool:
    """Whether a test does of what lies around a job's body, or of how workers begin and end."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python_of(version), "-m", "pytest", "-q", "-p", "no:cacheprovider", *AROUND]
    print(f"Celery {version}: {' '.join(AROUND)}", flush=True)
    return bool(subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=False).returncode)


def main(arguments: Sequence[str]) -> int:
    options = parsed(arguments)
    for version in options.versions:
        python_of(version)
    if options.tests or options.groups == tuple(GROUPS):
        failed = [version for version in options.versions if tests_fail(version)]
        if failed or options.tests:
            return bool(failed)
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="xpander-matrix-"))
    with start_sandbox() as sandbox:
        results = run_all(options, directory, sandbox)
        findings = {result.site: faults_by_case(result.site, result.jobs) for result in results if not result.error}
        table = rendered(
            {
                (site.version, site.pool, case.name): outcome_of(site, case, result.jobs)
                for result in results
                for site in [result.site]
                for case in cases_of(site)
            },
            options.versions,
            options.pools,
        )
    faults = [
        f"{site.name}: {case}: {fault}"
        for site, by_case in findings.items()
        for case, found in by_case.items()
        for fault in found
    ]
    faults += [f"{result.site.name}: {result.error}" for result in results if result.error]
    print(table)
    jobs = sum(len(ids) for result in results for ids in result.jobs.values())
    print(f"\n{jobs} jobs in {time.monotonic() - began:.0f} s, {len(faults)} faults", *faults, sep="\n")
    if options.write and not faults:
        options.write.write_text(documented())
    if faults:
        print(f"Logs, ledgers and journals: {directory}")
        return 1
    shutil.rmtree(directory)
    return 0


def outcome_of(site: Site, case: Case, jobs: dict[str, list[str]]) -> str:
    """What the platform has of a case's jobs, as one word (several, if they differ, or if it is left to chance)."""
    if len(case.due(site.version, site.pool)) > 1:
        return due_of(case, site.version, site.pool)
    outcomes = sorted({outcome_in(site.sandbox.record(job_id)) for job_id in jobs.get(case.name, ())})
    return ", ".join(outcomes) or "none"


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make matrix ARGS=...", description="Every end of a job, on real workers.")
    for name, known in (("versions", VERSIONS), ("pools", POOLS), ("groups", tuple(GROUPS))):
        parser.add_argument(f"--{name}", type=lambda text: text.split(","), default=known, help=", ".join(known))
    parser.add_argument("--broker", choices=("redis", "rabbitmq"), default="redis")
    parser.add_argument("--tests", action="store_true", help="only those tests, with each version")
    parser.add_argument("--write", type=Path, help="write what is due into this file, if there is no fault")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
