"""Real libraries under real instrumentations, alone and in pairs, against an endpoint that counts what it served.

    python -m tests.instrumentations [--only NAME ...] [--seed N]

Each combination runs in a process of its own, in the environment of its library, which is set up as needed. Ends with
1 if a job's record differs from the endpoint's count. Libraries that cannot be installed are in the table as such.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Any

from tests.instrumentations.environments import ENVIRONMENTS, LIMITS, ROOT, Environment, set_up
from tests.support.sandbox import start_sandbox

_AT_ONCE = os.cpu_count() or 1
_TIMEOUT_S = 300
_ALL = ("prompt_tokens", "completion_tokens", "cache_read_tokens", "cache_write_tokens")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.instrumentations", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="names of environments")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    chosen = [each for each in ENVIRONMENTS if not arguments.only or each.name in arguments.only]
    with ExitStack() as stack:
        free: SimpleQueue[str] = SimpleQueue()  # an endpoint counts for one process at a time
        for _ in range(_AT_ONCE):
            free.put(stack.enter_context(start_sandbox("--model-seed", str(arguments.seed))).url)

        def run(combination: tuple[Environment, tuple[str, ...]]) -> int:
            url = free.get()
            try:
                return _run(*combination, url, arguments.seed)
            finally:
                free.put(url)

        with ThreadPoolExecutor(_AT_ONCE) as threads:
            wrong = sum(threads.map(run, _combinations(chosen)))
    print(f"{wrong} wrong" if wrong else "every record equals what the endpoint served")
    return 1 if wrong else 0


def _combinations(environments: Iterable[Environment]) -> Iterator[tuple[Environment, tuple[str, ...]]]:
    """Those of all environments that can be installed, each set up before its first one."""
    for environment in environments:
        problem = set_up(environment)
        if problem is not None:
            print(f"{environment.name:12} could not be installed: {problem}", flush=True)
            continue
        for layers in environment.combinations():
            yield environment, layers


def _run(environment: Environment, layers: tuple[str, ...], url: str, seed: int) -> int:
    """Run one combination and print its lines at once; how many jobs were wrong."""
    label = f"{environment.name:12} {' + '.join(layers) or '(no instrumentation)':46}"
    results, problem = _results(environment, layers, url, seed)
    limits = LIMITS.get((environment.name, layers), {})
    wrong = [result for result in results if not _is_right(result, limits.get(result["job"], _ALL))]
    limited = sum(result["job"] in limits for result in results)
    served = sum(result["calls"] for result in results)
    said = f"{len(results) - len(wrong)}/{len(results)} jobs right, {served} calls"
    if limited:
        said += f" ({limited} as far as this layer writes counts)"
    lines = [f"{label} {said}{'' if problem is None else f'  FAILED: {problem}'}"]
    for result in wrong:
        lines += [
            f"    {result['job']}: recorded {result['recorded']}, served {result['served']}",
            f"        tools {result['tools_recorded']}, {result['tools_served']}; {result['state']} {result['error']}",
        ]
    print("\n".join(lines), flush=True)
    return len(wrong) + (problem is not None)


def _results(
    environment: Environment, layers: tuple[str, ...], url: str, seed: int
) -> tuple[list[dict[str, Any]], str | None]:
    names = ("XPANDER_", "OTEL_", "CELERY_", "OPENAI_", "ANTHROPIC_", "LITELLM_", "LOGFIRE_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(names) and not name.lower().endswith("_proxy") and name != "PYTHONPATH"
    }
    quiet = {
        "AGNO_TELEMETRY": "false",
        "LITELLM_LOCAL_MODEL_COST_MAP": "true",
        "OTEL_EXPORTER": "in_memory",  # of litellm's callback
        "OTEL_METRICS_EXPORTER": "none",
        "OPENAI_API_KEY": "none",
    }
    command = [
        str(environment.python),
        "-m",
        "tests.instrumentations.scenario",
        environment.name,
        url,
        str(seed),
        *layers,
    ]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**kept, **quiet}, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return [], f"no end within {_TIMEOUT_S} s"
    results = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return results, lines[-1] if lines else f"exit code {done.returncode}"
    return results, None if results else "no job ran"


def _is_right(result: dict[str, Any], counts: tuple[str, ...] | None) -> bool:
    """Whether the record has these counts as they were served and no others, and tools only that were served."""
    if result["state"] != "SUCCESS" or not result["calls"]:
        return False
    if counts is None:
        return all(result["recorded"].get(count, 0) <= result["served"][count] for count in _ALL)
    if any(result["recorded"].get(count, 0) != (result["served"][count] if count in counts else 0) for count in _ALL):
        return False
    return set(result["tools_recorded"]) <= set(result["tools_served"])


if __name__ == "__main__":
    sys.exit(main())
