"""What importing costs a process that has Celery: web processes, beat and scripts pay it too.

    python benchmarks/bench_import.py [--runs N]

Each run is a fresh interpreter that imports Celery first, then this package with what an app uses of it, and then
instruments the app, which reads the settings. The least of the runs counts, since a busy machine only ever adds; where
Celery's own import takes long too, the import may take one and a half times as much.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

BUDGET = {"cpu_s": 0.15, "ratio_to_celery_on_a_busy_machine": 1.5, "memory_mb": 20.0}

PROGRAM = """
import json, resource, sys

def spent():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit

started = spent()
from celery import Celery
app = Celery("bench", broker="memory://")
before = spent()
import xpander_celery as xc
xc.instrument, xc.job, xc.reported
imported = spent()
xc.instrument(app)
instrumented = spent()
cpu_s = [later[0] - earlier[0] for earlier, later in ((before, imported), (before, instrumented), (started, before))]
print(json.dumps([*cpu_s, imported[1] - before[1]]))
"""


def main() -> int:
    """Measure, print, and say by the exit status whether the budgets hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True).stdout)
        for _ in range(options.runs)
    ]
    cpu_s, instrumented_s, celery_s, memory_mb = (min(figures) for figures in zip(*runs, strict=True))
    found = {
        "cpu_s": round(cpu_s, 3),
        "memory_mb": round(memory_mb, 1),
        "with_instrument_cpu_s": round(instrumented_s, 3),
        "celery_cpu_s": round(celery_s, 3),
        "budget": BUDGET,
    }
    print(json.dumps(found, indent=2))
    longest_s = max(BUDGET["cpu_s"], BUDGET["ratio_to_celery_on_a_busy_machine"] * celery_s)
    return 0 if cpu_s <= longest_s and memory_mb <= BUDGET["memory_mb"] else 1


if __name__ == "__main__":
    sys.exit(main())
