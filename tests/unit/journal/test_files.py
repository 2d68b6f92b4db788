"""The writing side of the file journal: what becomes of an event when writing goes well, and when it does not."""

from __future__ import annotations

import errno
import logging
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.journal import drain, progress, sized
from xpander_celery.errors import JournalError
from xpander_celery.journal import Appended, files
from xpander_celery.journal.files import HELD_BYTES, HELD_EVENTS, FileJournal
from xpander_celery.journal.reader import FileReader


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state" / "destination"


@pytest.fixture
def journal(directory: Path, clock: Clock) -> Iterator[FileJournal]:
    journal = FileJournal(directory, clock=clock)
    yield journal
    journal.close()


class Disk:
    """Stands before `os.write`: `limit` is how many bytes a write to a segment takes, None for all of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limit: int | None = None
        self.error: int | None = None
        self.sizes: list[int] = []
        self._write = os.write
        monkeypatch.setattr("os.write", self.write)

    def write(self, descriptor: int, data: bytes) -> int:
        if not self._is_segment(descriptor):
            return self._write(descriptor, data)
        self.sizes.append(len(data))
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return self._write(descriptor, data if self.limit is None else data[: self.limit])

    @staticmethod
    def _is_segment(descriptor: int) -> bool:
        try:
            return ".v1e1" in str(Path(f"/dev/fd/{descriptor}").readlink())
        except OSError:
            return False


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell segments from other files")
    return Disk(monkeypatch)


def segments(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if ".v1e1" in path.name)


def messages(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if getattr(record, "event", "") == event]


def test_an_append_is_one_write(journal: FileJournal, disk: Disk) -> None:
    journal.open()
    for number in range(3):
        journal.append(progress(number))
    assert len(disk.sizes) == 3


def test_nothing_is_created_before_it_is_needed(journal: FileJournal, directory: Path) -> None:
    assert not directory.exists()
    journal.append(progress(1))
    assert directory.exists()


def test_directory_and_files_are_for_their_owner_alone(journal: FileJournal, directory: Path) -> None:
    journal.append(progress(1))
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}


def test_a_segment_ends_with_its_size(journal: FileJournal, directory: Path) -> None:
    for number in range(30):
        journal.append(sized(number, 200_000))
    assert len(segments(directory)) == 2
    assert all(path.stat().st_size < 4.3 * 1024**2 for path in segments(directory))
    assert drain(FileReader(directory)) == [f"job-{number}" for number in range(30)]


def test_a_segment_ends_with_its_age(journal: FileJournal, directory: Path, clock: Clock) -> None:
    journal.append(progress(1))
    clock.now += 59
    journal.append(progress(2))
    assert len(segments(directory)) == 1
    clock.now += 2
    journal.append(progress(3))
    assert len(segments(directory)) == 2


def test_an_empty_segment_does_not_age(journal: FileJournal, directory: Path, clock: Clock) -> None:
    journal.open()
    clock.now += 3600
    journal.append(progress(1))
    assert len(segments(directory)) == 1


def test_where_no_new_segment_can_be_made_the_old_one_serves_on(
    journal: FileJournal, directory: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.append(progress(1))
    clock.now += 61

    def fail(path: Path) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("xpander_celery.journal.segment_writer.create_locked", fail)
    assert journal.append(progress(2)) is Appended.DURABLE
    assert len(segments(directory)) == 1


def test_after_a_short_write_the_record_is_written_again_on_a_line_of_its_own(
    journal: FileJournal, directory: Path, disk: Disk
) -> None:
    journal.append(progress(1))
    disk.limit = 20
    assert journal.append(progress(2)) is Appended.BUFFERED
    disk.limit = None
    journal._retry_at = 0.0
    assert journal.append(progress(3)) is Appended.DURABLE
    journal.close()
    reader = FileReader(directory)
    batch = reader.poll(10)
    assert [event.job_id for event in batch.events] == ["job-1", "job-3", "job-2"]
    assert batch.corrupt == 3


def test_a_write_that_is_short_once_costs_nothing(
    journal: FileJournal, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.append(progress(1))
    write, cuts = os.write, [5]
    monkeypatch.setattr("os.write", lambda descriptor, data: write(descriptor, data[: cuts.pop()] if cuts else data))
    assert journal.append(progress(2)) is Appended.DURABLE
    assert drain(FileReader(directory)) == ["job-1", "job-2"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_what_cannot_be_written_is_held_and_written_later(
    journal: FileJournal, directory: Path, clock: Clock, disk: Disk, error: int
) -> None:
    journal.append(progress(0))
    disk.error = error
    assert [journal.append(progress(number)) for number in (1, 2)] == [Appended.BUFFERED, Appended.BUFFERED]
    assert journal.counters.buffered == 2
    disk.error = None
    clock.now += 1.5
    assert journal.append(progress(3)) is Appended.DURABLE
    assert (journal.counters.durable, journal.counters.buffered, journal.counters.dropped) == (4, 0, 0)
    assert sorted(drain(FileReader(directory))) == ["job-0", "job-1", "job-2", "job-3"]


def test_while_writing_fails_it_is_tried_once_a_second(journal: FileJournal, clock: Clock, disk: Disk) -> None:
    journal.open()
    disk.error = errno.ENOSPC
    for number in range(50):
        journal.append(progress(number))
    assert len(disk.sizes) == 1
    clock.now += 1.5
    journal.append(progress(51))
    assert len(disk.sizes) == 2


def test_memory_holds_a_thousand_events_and_then_drops_the_newest(
    journal: FileJournal, directory: Path, clock: Clock, disk: Disk
) -> None:
    journal.open()
    disk.error = errno.ENOSPC
    answers = [journal.append(progress(number)) for number in range(HELD_EVENTS + 5)]
    assert answers == [Appended.BUFFERED] * HELD_EVENTS + [Appended.DROPPED] * 5
    assert journal.counters.dropped == 5
    disk.error = None
    clock.now += 1.5
    journal.append(progress("late"))
    reader = FileReader(directory)
    batch = reader.poll(5000)
    expected = {f"job-{number}" for number in range(HELD_EVENTS)} | {"job-late"}
    assert {event.job_id for event in batch.events} == expected
    assert batch.dropped == 5


def test_memory_holds_eight_mebibytes(journal: FileJournal, disk: Disk) -> None:
    journal.open()
    disk.error = errno.ENOSPC
    answers = [journal.append(sized(number, 200_000)) for number in range(60)]
    assert answers.count(Appended.BUFFERED) == HELD_BYTES // 200_100
    assert set(answers[-10:]) == {Appended.DROPPED}


def test_what_is_held_is_written_in_portions(journal: FileJournal, clock: Clock, disk: Disk) -> None:
    journal.open()
    disk.error = errno.ENOSPC
    for number in range(20):
        journal.append(sized(number, 200_000))
    disk.error = None
    disk.sizes.clear()
    clock.now += 1.5
    journal.append(progress("late"))
    assert len(disk.sizes) == 3
    assert journal.counters.buffered == 18


def test_a_timer_writes_what_a_quiet_process_holds(
    journal: FileJournal, directory: Path, clock: Clock, disk: Disk
) -> None:
    journal.open()
    disk.error = errno.ENOSPC
    journal.append(progress(1))
    disk.error = None
    journal.tend()
    assert drain(FileReader(directory)) == []
    clock.now += 1.5
    journal.tend()
    assert drain(FileReader(directory)) == ["job-1"]


def test_closing_writes_what_is_held(journal: FileJournal, directory: Path, disk: Disk) -> None:
    journal.open()
    disk.error = errno.ENOSPC
    for number in range(HELD_EVENTS + 2):
        journal.append(sized(number, 2000))
    disk.error = None
    journal.close()
    reader = FileReader(directory)
    batch = reader.poll(5000)
    assert len(batch.events) == HELD_EVENTS
    assert batch.dropped == 2


def test_what_is_lost_at_closing_is_said(journal: FileJournal, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    journal.open()
    disk.error = errno.ENOSPC
    journal.append(progress(1))
    journal.close()
    assert messages(caplog, "journal_lost") == ["1 events were lost with this process"]


def test_a_lasting_trouble_is_logged_once_a_minute(
    journal: FileJournal, clock: Clock, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    journal.open()
    disk.error = errno.ENOSPC
    for second in range(125):
        clock.now += 1.1
        for number in range(20):
            journal.append(progress(f"{second}-{number}"))
    assert len(messages(caplog, "journal_trouble")) == 3
    assert len(messages(caplog, "journal_dropped")) in (1, 2)
    assert "No space left" in messages(caplog, "journal_trouble")[0]


def test_the_journal_takes_no_more_than_its_cap(directory: Path, clock: Clock) -> None:
    journal = FileJournal(directory, max_bytes=1024**2, clock=clock)
    answers = [journal.append(sized(number, 50_000)) for number in range(40)]
    assert answers.index(Appended.BUFFERED) in range(19, 24)
    assert sum(path.stat().st_size for path in segments(directory)) < 1.25 * 1024**2


def test_a_journal_at_its_cap_goes_on_when_the_relay_has_read(directory: Path, clock: Clock) -> None:
    journal, reader = FileJournal(directory, max_bytes=1024**2, clock=clock), FileReader(directory)
    found: list[str] = []
    for number in range(200):
        journal.append(sized(number, 50_000))
        clock.now += 0.1
        if number % 20 == 19:
            found += drain(reader)
            (directory / "journal.size").unlink()  # its second of validity is one of the real clock
    journal.close()
    found += drain(reader)
    assert sorted(found) == sorted(f"job-{number}" for number in range(200))
    assert journal.counters.dropped == 0


def test_a_disk_that_is_nearly_full_is_left_to_others(
    journal: FileJournal, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    statvfs = os.statvfs

    def nearly_full(path: Any) -> os.statvfs_result:
        values = list(statvfs(path))
        values[1], values[2], values[3], values[4] = 4096, 1000, 95, 95  # frsize, blocks, bfree, bavail
        return os.statvfs_result(values)

    directory.mkdir(parents=True)
    monkeypatch.setattr("os.statvfs", nearly_full)
    assert journal.append(progress(1)) is Appended.BUFFERED
    assert "90%" in messages(caplog, "journal_trouble")[0]
    monkeypatch.setattr("os.statvfs", statvfs)
    journal._retry_at = 0.0
    assert journal.append(progress(2)) is Appended.DURABLE


def test_a_named_directory_that_cannot_be_used_is_an_error_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    journal = FileJournal(tmp_path / "file" / "destination")
    with pytest.raises(JournalError, match=str(tmp_path)):
        journal.open()


def test_without_a_start_such_a_directory_does_not_hurt_a_job(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    journal = FileJournal(tmp_path / "file" / "destination")
    assert journal.append(progress(1)) is Appended.BUFFERED


@pytest.mark.parametrize("begin", [lambda journal: journal.open(), lambda journal: journal.append(progress(0))])
def test_a_default_directory_that_cannot_be_used_switches_off_with_one_warning(
    tmp_path: Path, begin: Callable[[FileJournal], Any], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    journal = FileJournal(tmp_path / "file" / "destination", required=False)
    begin(journal)
    assert journal.is_off
    assert [journal.append(progress(number)) for number in range(3)] == [Appended.DROPPED] * 3
    journal.tend()
    journal.close()
    assert journal.is_off
    assert len(caplog.records) == 1
    assert "XPANDER_CELERY_JOURNAL" in caplog.text


def test_a_removed_directory_is_made_again(journal: FileJournal, directory: Path, clock: Clock, tmp_path: Path) -> None:
    journal.append(progress(1))
    directory.rename(tmp_path / "gone")
    clock.now += 61
    assert journal.append(progress(2)) is Appended.DURABLE
    reader = FileReader(directory)
    assert reader.is_alive(journal.process_id)
    assert drain(reader) == ["job-2"]


def test_a_timer_keeps_a_process_alive_whose_file_was_removed(journal: FileJournal, directory: Path) -> None:
    journal.open()
    (directory / f"{journal.process_id}.alive").unlink()
    assert not FileReader(directory).is_alive(journal.process_id)
    journal.tend()
    assert FileReader(directory).is_alive(journal.process_id)


def test_a_forked_child_is_another_process(journal: FileJournal, directory: Path) -> None:
    journal.append(progress("parent"))
    parent_id = journal.process_id
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = journal.append(progress("child"))
            os.write(writing, f"{journal.process_id} {answer} {journal.counters.durable}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        child_id, answer, durable = pipe.read().split()
    reader = FileReader(directory)
    assert journal.process_id == parent_id != child_id
    assert (answer, durable) == ("durable", "1")
    assert reader.is_alive(parent_id)
    assert not reader.is_alive(child_id)
    assert sorted(drain(reader)) == ["job-child", "job-parent"]


def test_a_forked_child_does_not_write_what_its_parent_holds(
    journal: FileJournal, directory: Path, clock: Clock, disk: Disk
) -> None:
    journal.open()
    disk.error = errno.ENOSPC
    journal.append(progress("held"))
    child = os.fork()
    if child == 0:
        try:
            disk.error = None
            journal.append(progress("child"))
            journal.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert drain(FileReader(directory)) == ["job-child"]


def test_descriptors_that_were_closed_behind_its_back_are_opened_again(journal: FileJournal, directory: Path) -> None:
    journal.append(progress(1))
    for descriptor in (*journal._segments._descriptor.values(), *journal._segments._liveness):
        os.close(descriptor)
    assert journal.append(progress(2)) is Appended.DURABLE
    reader = FileReader(directory)
    assert reader.is_alive(journal.process_id)
    assert drain(reader) == ["job-1", "job-2"]


def test_a_file_of_the_users_that_got_the_number_of_a_descriptor_is_left_alone(
    journal: FileJournal, directory: Path, tmp_path: Path
) -> None:
    journal.append(progress(1))
    numbers = [*journal._segments._descriptor.values(), *journal._segments._liveness]
    own = tmp_path / "own"
    with own.open("wb") as file:
        for number in numbers:  # as if all were closed, and then files opened
            os.dup2(file.fileno(), number)
        journal._segments._trusted_until = 0.0
        assert journal.append(progress(2)) is Appended.DURABLE
        journal._segments._rotate_at = 0.0
        assert journal.append(progress(3)) is Appended.DURABLE
        assert FileReader(directory).is_alive(journal.process_id)
        journal.close()
        for number in numbers:
            os.write(number, b"x")
            os.close(number)
    assert own.read_bytes() == b"xx"
    assert drain(FileReader(directory)) == ["job-1", "job-2", "job-3"]


def test_a_program_that_is_executed_inherits_nothing(journal: FileJournal) -> None:
    journal.append(progress(1))
    for descriptor in (*journal._segments._descriptor.values(), *journal._segments._liveness):
        assert not os.get_inheritable(descriptor)
    journal._segments._rotate_at = 0.0
    journal.append(progress(2))
    assert not any(os.get_inheritable(descriptor) for descriptor in journal._segments._descriptor.values())


def test_threads_append_at_once_and_lose_nothing(directory: Path) -> None:
    journal = FileJournal(directory)
    barrier = threading.Barrier(8)
    refused: list[Appended] = []

    def work(thread: int) -> None:
        barrier.wait()
        for number in range(200):
            answer = journal.append(sized(f"{thread}-{number}", 6000))  # 9.6 MB in all: they rotate together
            if answer is not Appended.DURABLE:
                refused.append(answer)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    found = drain(FileReader(directory))
    assert refused == []
    assert sorted(found) == sorted(f"job-{thread}-{number}" for thread in range(8) for number in range(200))


def test_threads_that_append_while_the_journal_closes_lose_nothing(directory: Path) -> None:
    journal = FileJournal(directory)
    kept: list[str] = []
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            if journal.append(progress(number)) is Appended.DURABLE:
                kept.append(f"job-{number}")
            number += 1

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 30
    while len(kept) < 2000 and time.monotonic() < deadline:
        journal.close()
    stop.set()
    thread.join()
    journal.close()
    assert len(kept) >= 2000
    assert sorted(drain(FileReader(directory), limit=100_000)) == sorted(kept)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a scandir dies where it raises
def test_a_signal_handler_may_raise_inside_and_the_journal_stays_whole(directory: Path) -> None:
    class SoftLimitError(Exception):
        pass

    def handler(number: int, frame: object) -> None:
        raise SoftLimitError

    journal = FileJournal(directory)
    kept: list[str] = []
    previous = signal.signal(signal.SIGALRM, handler)

    def append_until_interrupted(number: int) -> None:  # CPython lets an error at the jump of a loop pass by its `try`
        signal.setitimer(signal.ITIMER_REAL, 0.00005 + (number % 40) * 0.00001)
        while True:
            if journal.append(sized(number, 3000)) is Appended.DURABLE:
                kept.append(f"job-{number}")

    try:
        for number in range(200):
            with pytest.raises(SoftLimitError):
                append_until_interrupted(number)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert journal.append(progress("last")) is Appended.DURABLE
    journal.close()
    found = drain(FileReader(directory), limit=100_000)
    assert found[-1] == "job-last"
    for name in set(kept):
        assert found.count(name) >= kept.count(name)


def test_every_event_is_synced_before_append_returns_where_that_is_asked(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    write, sync = os.write, os.fdatasync
    monkeypatch.setattr("os.write", lambda *arguments: (calls.append("write"), write(*arguments))[1])
    monkeypatch.setattr(
        "xpander_celery.journal.segment_writer._fdatasync", lambda fd: (calls.append("sync"), sync(fd))[1]
    )
    journal = FileJournal(directory, fsync="always")
    journal.open()
    for number in range(3):
        journal.append(progress(number))
        calls.append("returned")
    assert calls[-9:] == ["write", "sync", "returned"] * 3


def test_an_event_that_could_not_be_synced_is_kept_to_be_written_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    journal = FileJournal(directory, fsync="always")
    journal.open()
    monkeypatch.setattr("xpander_celery.journal.segment_writer._fdatasync", fail)
    assert journal.append(progress(1)) is Appended.BUFFERED


def test_a_journal_leaves_no_descriptor_open(directory: Path) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to count descriptors")
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    for number in range(20):
        journal = FileJournal(directory)
        journal.append(progress(number))
        journal.close()
        del journal
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before


def test_the_logger_is_the_modules_own() -> None:
    assert files._logger is logging.getLogger("xpander_celery.journal.files")
