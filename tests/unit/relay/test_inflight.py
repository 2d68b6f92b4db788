from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from xpander_celery.relay.inflight import FILE, InFlight


def test_nobody_is_suspected_at_first_nor_after_a_clear(tmp_path: Path) -> None:
    marks = InFlight(tmp_path, 2)
    assert marks.suspects == []
    marks.mark(1, 42)
    marks.clear(1)
    marks.close()
    assert InFlight(tmp_path, 2).suspects == []


def test_marks_survive_a_kill_and_accuse_once(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib, signal; from xpander_celery.relay.inflight import InFlight;"
        "marks = InFlight(pathlib.Path(sys.argv[1]), 3); marks.mark(0, 7); marks.mark(2, 2**40); marks.mark(1, 5);"
        "marks.clear(1); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert InFlight(tmp_path, 3).suspects == [7, 2**40]
    assert InFlight(tmp_path, 3).suspects == []


def test_the_number_of_workers_may_change(tmp_path: Path) -> None:
    marks = InFlight(tmp_path, 4)
    marks.mark(3, 9)
    marks.close()
    fewer = InFlight(tmp_path, 1)
    assert fewer.suspects == [9]
    fewer.mark(0, 1)
    fewer.close()
    assert InFlight(tmp_path, 8).suspects == [1]


def test_garbage_accuses_nobody(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"\xff" * 11)
    assert InFlight(tmp_path, 2).suspects == []
