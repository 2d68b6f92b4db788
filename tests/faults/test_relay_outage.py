"""A day without the platform, simulated by the program that `make bench` runs with a million reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = Path(__file__).parents[2] / "benchmarks" / "bench_outage.py"
WAITING = int(os.environ.get("XPANDER_TEST_WAITING", "20000"))  # a million take about ten minutes


@pytest.mark.timeout(3600)
@pytest.mark.fault(13)
def test_13_a_day_without_the_platform_costs_a_request_a_minute_and_all_that_waits_is_delivered_once(
    tmp_path: Path,
) -> None:
    command = [sys.executable, str(_PROGRAM), "--waiting", str(WAITING), "--directory", str(tmp_path), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    figures = json.loads(done.stdout)
    print(done.stdout)
    assert (figures["broken"], done.returncode) == ([], 0)
    assert figures["delivered"] == WAITING
    assert 24 * 60 * 0.9 < figures["requests_of_the_day"] <= 24 * 60 + 15
