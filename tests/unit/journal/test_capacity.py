"""How the processes of a host share what one of them measured."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from xpander_celery.journal import capacity
from xpander_celery.journal.capacity import SHARED_MEASURE, Capacity, segment_bytes
from xpander_celery.journal.segments import segment_name

MEBIBYTE = 1024**2


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The results of all real measurements."""
    results: list[int] = []

    def measure(directory: Path) -> int:
        results.append(segment_bytes(directory))
        return results[-1]

    monkeypatch.setattr(capacity, "segment_bytes", measure)
    return results


def write(directory: Path, number: int, size: int) -> None:
    (directory / segment_name("0" * 16, number)).write_bytes(b"x" * size)


def test_only_segments_count_and_each_takes_whole_blocks(tmp_path: Path) -> None:
    write(tmp_path, 0, 1)
    write(tmp_path, 1, 4097)
    (tmp_path / "index.db").write_bytes(b"x" * MEBIBYTE)
    assert segment_bytes(tmp_path) == 3 * 4096


def test_a_hundred_short_lived_processes_measure_once(tmp_path: Path, measured: list[int]) -> None:
    for _ in range(100):
        Capacity(tmp_path, 64 * MEBIBYTE).allowance(0)
    assert len(measured) == 1


def test_what_processes_wrote_since_is_added_to_a_shared_measure(tmp_path: Path, measured: list[int]) -> None:
    processes = [Capacity(tmp_path, MEBIBYTE) for _ in range(4)]
    for written in (0, 255 * 1024):
        for process in processes:
            process.allowance(written)
    with pytest.raises(OSError, match=f"segments take {MEBIBYTE} of {MEBIBYTE} bytes") as full:
        processes[0].allowance(4 * 1024)
    assert full.value.errno == errno.ENOSPC
    assert len(measured) == 1


def test_an_old_or_broken_measure_is_made_anew(tmp_path: Path, measured: list[int]) -> None:
    for content in ("0 1 99999999", "9e99 1 99999999", "", "half"):
        (tmp_path / SHARED_MEASURE).write_text(content)
        Capacity(tmp_path, MEBIBYTE).allowance(0)
    assert measured == [0, 0, 0, 0]


def test_a_slow_measure_is_valid_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.4])
    monkeypatch.setattr("time.monotonic", lambda: next(ticks))
    Capacity(tmp_path, MEBIBYTE).allowance(0)
    assert (tmp_path / SHARED_MEASURE).read_text().split()[1] == "20.000"


def test_a_place_that_does_not_exist_yet_is_not_full(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    Capacity(tmp_path / "none", MEBIBYTE).allowance(0)
    Capacity(tmp_path / "file" / "none", MEBIBYTE).allowance(0)


def test_the_nearer_the_limit_the_sooner_it_is_looked_at_again(tmp_path: Path) -> None:
    assert Capacity(tmp_path, 1024 * MEBIBYTE).allowance(0) == MEBIBYTE
    assert Capacity(tmp_path, MEBIBYTE).allowance(0) == MEBIBYTE // 16
    Capacity(tmp_path, 1024 * MEBIBYTE).allowance(MEBIBYTE - 1)
    assert Capacity(tmp_path, MEBIBYTE).allowance(0) == 16 * 1024
