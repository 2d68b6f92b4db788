"""The reading side of the file journal: tailing, finishing, damage, and what is left of dead processes."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from tests.support.journal import drain, progress, sized
from xpander_celery import events
from xpander_celery.events import encode
from xpander_celery.journal import reader as reader_module
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.locks import create_locked
from xpander_celery.journal.reader import QUARANTINE, FileReader
from xpander_celery.journal.segments import FORMAT, frame, segment_name

DEAD = "00000000000000dd"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reader(tmp_path: Path, clock: Clock) -> FileReader:
    return FileReader(tmp_path, clock=clock)


def left_by_the_dead(directory: Path, content: bytes, number: int = 0) -> Path:
    path = directory / segment_name(DEAD, number)
    path.write_bytes(content)
    return path


def line(number: object) -> bytes:
    return frame(encode(progress(number)))


def test_a_directory_that_does_not_exist_yet_is_empty(tmp_path: Path) -> None:
    reader = FileReader(tmp_path / "later")
    assert reader.poll(10).events == []
    assert reader.backlog_bytes() == 0
    reader.sync()


def test_a_finished_segment_is_removed_only_when_it_is_settled(tmp_path: Path, reader: FileReader) -> None:
    path = left_by_the_dead(tmp_path, line(1))
    batch = reader.poll(10)
    assert batch.finished == {path.name}
    assert batch.positions == {path.name: len(line(1))}
    assert path.exists()
    reader.settle(batch)
    assert not path.exists()
    assert reader.poll(10).positions == {}


def test_a_segment_that_was_committed_but_not_removed_is_not_read_again(tmp_path: Path) -> None:
    path = left_by_the_dead(tmp_path, line(1))
    following = FileReader(tmp_path)
    following.resume({path.name: len(line(1)), "0000000000000000-000009.v1e1": 77})
    batch = following.poll(10)
    assert batch.events == []
    assert batch.positions == {path.name: len(line(1))}
    following.settle(batch)
    assert not path.exists()


def test_what_was_committed_but_not_settled_is_not_read_again(tmp_path: Path, reader: FileReader) -> None:
    left_by_the_dead(tmp_path, line(1) + line(2) + line(3))
    following = FileReader(tmp_path)
    following.resume(reader.poll(2).positions)
    assert drain(following) == ["job-3"]


def test_a_live_segment_stays_and_a_line_in_the_making_is_waited_for(tmp_path: Path, reader: FileReader) -> None:
    descriptor = create_locked(tmp_path / segment_name(DEAD, 0))
    os.write(descriptor, line(1) + line(2)[:10])
    batch = reader.poll(10)
    assert ([event.job_id for event in batch.events], batch.finished, batch.corrupt) == (["job-1"], frozenset(), 0)
    reader.settle(batch)
    os.write(descriptor, line(2)[10:])
    os.close(descriptor)
    assert drain(reader) == ["job-2"]


def test_the_end_of_a_writer_that_was_torn_off_is_counted_and_kept_aside(tmp_path: Path, reader: FileReader) -> None:
    path = left_by_the_dead(tmp_path, line(1) + line(2)[:10])
    batch = reader.poll(10)
    assert [event.job_id for event in batch.events] == ["job-1"]
    assert batch.corrupt == 1
    reader.settle(batch)
    [kept] = (tmp_path / QUARANTINE).iterdir()
    assert kept.name == f"{path.name}.{len(line(1))}"
    assert kept.read_bytes() == line(2)[:10]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


def test_a_damaged_line_costs_itself_only_and_is_kept_once(
    tmp_path: Path, reader: FileReader, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = bytearray(line(2))
    damaged[30] ^= 0x40
    left_by_the_dead(tmp_path, line(1) + damaged + line(3))
    for _ in range(2):
        batch = reader.poll(10)
        assert [event.job_id for event in batch.events] == ["job-1", "job-3"]
        assert batch.corrupt == 1
    assert [path.read_bytes() for path in (tmp_path / QUARANTINE).iterdir()] == [bytes(damaged[:-1])]
    assert len(caplog.records) == 1


def test_a_whole_line_that_is_no_event_is_kept_aside(tmp_path: Path, reader: FileReader) -> None:
    left_by_the_dead(tmp_path, frame(b'{"kind":"unheard-of"}') + line(1))
    batch = reader.poll(10)
    assert ([event.job_id for event in batch.events], batch.corrupt) == (["job-1"], 1)
    assert [path.read_bytes() for path in (tmp_path / QUARANTINE).iterdir()] == [b'{"kind":"unheard-of"}']


def test_what_is_kept_aside_is_bounded(tmp_path: Path, reader: FileReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_QUARANTINED_FILES", 3)
    left_by_the_dead(tmp_path, b"junk\n" * 10)
    batch = reader.poll(10)
    assert batch.corrupt == 10
    assert len(list((tmp_path / QUARANTINE).iterdir())) == 3


def test_damage_that_cannot_be_kept_aside_stops_nothing(tmp_path: Path, reader: FileReader) -> None:
    (tmp_path / QUARANTINE).write_text("in the way")
    left_by_the_dead(tmp_path, b"junk\n" + line(1))
    assert drain(reader) == ["job-1"]


@pytest.mark.parametrize("version", [f"v{FORMAT + 1}e{events.VERSION}", f"v{FORMAT}e{events.VERSION + 1}"])
def test_a_segment_of_a_newer_release_is_left_alone_and_said(
    tmp_path: Path, reader: FileReader, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    newer = tmp_path / f"{DEAD}-000000.{version}"
    newer.write_bytes(line(1))
    left_by_the_dead(tmp_path, line(2))
    assert drain(reader) == ["job-2"]
    assert drain(reader) == []
    assert newer.read_bytes() == line(1)
    assert [record.getMessage() for record in caplog.records] == [
        f"{newer} was written by a newer release and is left alone: let a relay of that release read it"
    ]


def test_a_batch_is_bounded_in_bytes_too(tmp_path: Path, reader: FileReader) -> None:
    content = b"".join(frame(encode(sized(number, 200_000))) for number in range(40))
    left_by_the_dead(tmp_path, content)
    batch = reader.poll(1000)
    assert len(batch.events) == 21
    assert batch.size == batch.positions[segment_name(DEAD, 0)]
    assert drain(reader) == [f"job-{number}" for number in range(40)]


def test_a_busy_segment_does_not_starve_the_others(tmp_path: Path, reader: FileReader) -> None:
    busy, quiet = (
        create_locked(tmp_path / segment_name("0" * 16, 0)),
        create_locked(tmp_path / segment_name("f" * 16, 0)),
    )
    os.write(quiet, line("quiet"))
    found: list[str] = []
    for _ in range(4):
        os.write(busy, line("busy") * 3)
        batch = reader.poll(5)
        reader.settle(batch)
        found += [event.job_id for event in batch.events]
    os.close(busy)
    os.close(quiet)
    assert "job-quiet" in found


def test_a_batch_that_is_not_full_holds_all_that_was_written_before(tmp_path: Path, reader: FileReader) -> None:
    first, second = (create_locked(tmp_path / segment_name(digit * 16, 0)) for digit in "0f")
    os.write(first, line("first"))
    os.write(second, line("second") * 3)
    batch = reader.poll(2)
    assert [event.job_id for event in batch.events] == ["job-first", "job-second"]
    reader.settle(batch)
    os.write(first, line("last words"))
    os.close(first)
    assert sorted(event.job_id for event in reader.poll(10).events) == ["job-last words", "job-second", "job-second"]
    os.close(second)


def test_many_finished_segments_are_read_in_batches_and_each_once(tmp_path: Path, reader: FileReader) -> None:
    for number in range(30):
        left_by_the_dead(tmp_path, line(f"{number}-a") + line(f"{number}-b"), number)
    found = drain(reader, limit=7)
    assert found == [f"job-{number}-{part}" for number in range(30) for part in "ab"]
    assert list(tmp_path.iterdir()) == []


def test_a_segment_removed_by_hand_is_forgotten(tmp_path: Path, reader: FileReader) -> None:
    path = left_by_the_dead(tmp_path, line(1) * 3)
    reader.settle(reader.poll(2))
    path.unlink()
    assert reader.poll(10).positions == {}
    assert reader.backlog_bytes() == 0


def test_a_segment_removed_within_a_round_is_forgotten(tmp_path: Path, reader: FileReader) -> None:
    left_by_the_dead(tmp_path, line(1), 0)
    gone = left_by_the_dead(tmp_path, line(2), 1)
    reader.settle(reader.poll(1))
    gone.unlink()
    assert drain(reader) == []


def test_a_segment_that_a_crash_of_the_host_shortened_is_finished(tmp_path: Path, reader: FileReader) -> None:
    path = left_by_the_dead(tmp_path, line(1))
    reader.resume({path.name: 10_000})
    assert drain(reader) == []
    assert not path.exists()


def test_a_segment_that_cannot_be_read_does_not_stop_the_others(
    tmp_path: Path, reader: FileReader, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / segment_name(DEAD, 0)).mkdir()
    left_by_the_dead(tmp_path, line(2), 1)
    assert drain(reader) == ["job-2"]
    assert "cannot be read" in caplog.text


def test_drop_notes_are_summed_and_are_no_events(tmp_path: Path, reader: FileReader) -> None:
    left_by_the_dead(tmp_path, frame(b'{"journal_dropped":3}') + line(1) + frame(b'{"journal_dropped":4}'))
    batch = reader.poll(10)
    assert (len(batch.events), batch.dropped, batch.corrupt) == (1, 7, 0)


def test_liveness_files_of_the_dead_go_when_nothing_refers_to_them(
    tmp_path: Path, reader: FileReader, clock: Clock
) -> None:
    living = FileJournal(tmp_path)
    living.open()
    (tmp_path / f"{DEAD}.alive").touch()
    path = left_by_the_dead(tmp_path, line(1) * 2)
    reader.settle(reader.poll(1))
    assert (tmp_path / f"{DEAD}.alive").exists()
    reader.settle(reader.poll(10))
    clock.now += 6
    reader.settle(reader.poll(10))
    assert not path.exists()
    assert not (tmp_path / f"{DEAD}.alive").exists()
    assert reader.is_alive(living.process_id)
    living.close()


def test_files_half_created_by_the_killed_go_after_a_minute(tmp_path: Path, reader: FileReader, clock: Clock) -> None:
    old, young = tmp_path / f".{DEAD}.alive.ab.new", tmp_path / f".{DEAD}-000000.v1e1.cd.new"
    old.touch()
    young.touch()
    os.utime(old, (time.time() - 61, time.time() - 61))
    reader.settle(reader.poll(10))
    assert not old.exists()
    assert young.exists()


def test_other_files_in_the_directory_are_not_touched(tmp_path: Path, reader: FileReader) -> None:
    for name in ("relay.lock", "index.db", "journal.size"):
        (tmp_path / name).write_text("keep")
    drain(reader)
    reader.settle(reader.poll(1))
    assert {path.name for path in tmp_path.iterdir()} == {"relay.lock", "index.db", "journal.size"}


def test_syncing_touches_what_is_new_and_not_settled(
    tmp_path: Path, reader: FileReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(reader_module, "_sync", synced.append)
    path = tmp_path / segment_name(DEAD, 0)
    descriptor = create_locked(path)
    os.write(descriptor, line(1))
    reader.sync()
    assert synced == [path, tmp_path]
    reader.sync()
    assert synced == [path, tmp_path]
    os.write(descriptor, line(2))
    reader.sync()
    assert synced == [path, tmp_path, path]
    os.write(descriptor, line(3))
    reader.settle(reader.poll(10))
    reader.sync()
    assert synced == [path, tmp_path, path]
    os.close(descriptor)


def test_syncing_reaches_the_disk(tmp_path: Path, reader: FileReader) -> None:
    left_by_the_dead(tmp_path, line(1))
    reader.sync()
    assert drain(reader) == ["job-1"]
