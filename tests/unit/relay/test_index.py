from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from xpander_celery.relay import schema
from xpander_celery.relay.index import Index
from xpander_celery.relay.policy import Fate
from xpander_celery.relay.rows import Change, Job, Phase, Result

CAP = 64 * 1024**2


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = Index.open(tmp_path, max_bytes=CAP)
    yield index
    index.close()


_REOPENED: list[Index] = []


@pytest.fixture(autouse=True)
def _no_index_stays_open() -> Iterator[None]:
    yield
    while _REOPENED:
        _REOPENED.pop().close()


def reopened(index: Index) -> Index:
    index.close()
    _REOPENED.append(Index.open(index.path.parent, max_bytes=CAP))
    return _REOPENED[-1]


def due(job_id: str, at: float = 1.0, **more: Any) -> Change:
    return Change(job_id, Phase.DUE, at, **{"state": f"state of {job_id}", "agent_id": "agent", **more})


def result(job: Job, fate: Fate, **more: Any) -> Result:
    return Result(job.row, job.revision, job.phase, job.size, fate, **more)


def only(index: Index, job_id: str) -> Job:
    return index.find([job_id])[job_id]


def counts(index: Index) -> dict[str, int]:
    return {phase.name: index.count(phase) for phase in Phase if index.count(phase)}


def counted_by_sql(index: Index) -> dict[str, int]:
    rows = index._db.execute("SELECT phase, count(*) FROM jobs GROUP BY phase")
    return {Phase(phase).name: count for phase, count in rows}


def test_what_is_recorded_is_found_again_also_after_a_restart(index: Index) -> None:
    index.record([due("a"), due("b", at=2.0)], 5.0, positions={"s-1": 10}, gone={"p": 4.0}, counters={"appended": 2})
    index = reopened(index)
    assert set(index.find(["a", "b", "c"])) == {"a", "b"}
    job = only(index, "a")
    assert (job.state, job.revision, job.phase, job.at, job.since) == ("state of a", 1, Phase.DUE, 1.0, 5.0)
    assert index.positions == {"s-1": 10}
    assert index.gone == {"p": 4.0}
    assert index.counters == {"appended": 2}
    assert counts(index) == {"DUE": 2}
    index.close()


def test_a_transaction_that_fails_leaves_nothing_behind(index: Index) -> None:
    index.record([due("a")], 1.0, positions={"s-1": 10})
    with pytest.raises(schema.JournalError):
        index.record([due("b", state="x"), due("c", at=None)], 2.0, positions={"s-1": 99})
    for _ in range(2):
        assert set(index.find(["a", "b", "c"])) == {"a"}
        assert index.positions == {"s-1": 10}
        assert counts(index) == {"DUE": 1}
        index = reopened(index)
    index.record([due("b")], 2.0)
    assert counts(index) == counted_by_sql(index) == {"DUE": 2}
    index.close()


def test_positions_are_replaced(index: Index) -> None:
    index.record([], 1.0, positions={"s-1": 10, "s-2": 20})
    index.record([], 2.0, positions={"s-2": 25, "s-3": 1})
    assert index.positions == {"s-2": 25, "s-3": 1}
    index = reopened(index)
    assert index.positions == {"s-2": 25, "s-3": 1}
    index.close()


def test_an_event_makes_a_new_revision_and_a_look_does_not(index: Index) -> None:
    index.record([due("a")], 1.0)
    index.record([due("a", state="more", before=only(index, "a"))], 2.0)
    assert (only(index, "a").revision, only(index, "a").state) == (2, "more")
    index.record([due("a", state=None, before=only(index, "a"))], 3.0)
    job = only(index, "a")
    assert (job.revision, job.state, job.size) == (2, "more", 4)


def test_due_reports_come_in_their_order_and_within_bounds(index: Index) -> None:
    index.record([due("late", at=3.0), due("first", at=1.0), due("second", at=2.0), due("future", at=9.0)], 0.0)

    def ids(**bounds: Any) -> list[str]:
        return [job.job_id for job in index.due(5.0, **{"limit": 10, "max_bytes": 10_000, **bounds})]

    assert ids() == ["first", "second", "late"]
    assert ids(limit=2) == ["first", "second"]
    assert ids(without={only(index, "first").row}, limit=2) == ["second", "late"]
    assert ids(max_bytes=1) == ["first"]


def test_an_acknowledgement_settles_only_the_revision_that_was_sent(index: Index) -> None:
    index.record([due("a"), due("b")], 1.0)
    sent_a, sent_b = only(index, "a"), only(index, "b")
    index.record([due("b", state="newer", before=sent_b)], 2.0)
    index.finish([result(sent_a, Fate.SETTLED, digest=b"A"), result(sent_b, Fate.SETTLED, digest=b"B")], 3.0)
    assert (only(index, "a").phase, only(index, "a").digest) == (Phase.SETTLED, b"A")
    assert (only(index, "b").phase, only(index, "b").digest) == (Phase.DUE, b"B")
    assert [job.job_id for job in index.due(5.0, limit=5, max_bytes=999)] == ["b"]
    assert counts(index) == counted_by_sql(index) == {"DUE": 1, "SETTLED": 1}


def test_where_room_is_tight_what_is_delivered_is_forgotten_and_reasons_are(index: Index) -> None:
    index.record([due("a"), due("b"), due("c"), due("d")], 1.0)
    newer = only(index, "d")
    index.record([due("d", before=newer)], 2.0)
    results = [
        result(only(index, "a"), Fate.SETTLED, digest=b"1"),
        result(only(index, "b"), Fate.DEAD, reason="why"),
        result(only(index, "c"), Fate.RETRY, reason="why"),
        result(newer, Fate.SETTLED, digest=b"2"),
    ]
    index.finish(results, 3.0, is_tight=True)
    assert index.find(["a"]) == {}
    assert (only(index, "b").phase, only(index, "b").reason) == (Phase.DEAD, None)
    assert (only(index, "c").phase, only(index, "c").tries, only(index, "c").reason) == (Phase.DUE, 1, None)
    assert (only(index, "d").phase, only(index, "d").digest) == (Phase.DUE, b"2")
    assert counts(index) == counted_by_sql(index)


def test_a_job_that_runs_again_is_not_settled_by_the_report_of_its_earlier_end(index: Index) -> None:
    index.record([due("a")], 1.0)
    sent = only(index, "a")
    index.record([Change("a", Phase.OPEN, 99.0, before=sent, state="runs again", watch=frozenset({"p"}))], 2.0)
    index.finish([result(sent, Fate.SETTLED, digest=b"A")], 3.0)
    assert (only(index, "a").phase, only(index, "a").digest) == (Phase.OPEN, b"A")
    assert counts(index) == counted_by_sql(index) == {"OPEN": 1}


def test_a_retry_counts_and_waits(index: Index) -> None:
    index.record([due("a")], 1.0)
    index.finish([result(only(index, "a"), Fate.RETRY, at=60.0, counts=True, reason="HTTP 500")], 2.0)
    index.finish([result(only(index, "a"), Fate.RETRY, at=70.0, counts=False, reason="HTTP 503")], 3.0)
    job = only(index, "a")
    assert (job.tries, job.attempts, job.at, job.reason, job.since) == (2, 1, 70.0, "HTTP 503", 1.0)
    assert index.due(69.0, limit=5, max_bytes=999) == []
    index.finish([result(job, Fate.SETTLED, digest=b"A")], 80.0)
    assert (only(index, "a").tries, only(index, "a").attempts, only(index, "a").reason) == (0, 0, None)


def test_a_newer_revision_waits_with_the_failure_of_the_older_one(index: Index) -> None:
    index.record([due("a")], 1.0)
    sent = only(index, "a")
    index.record([due("a", state="newer", before=sent)], 2.0)
    index.finish([result(sent, Fate.RETRY, at=60.0)], 3.0)
    assert only(index, "a").at == 60.0


def test_dead_reports_keep_their_reason_and_come_back_when_requeued(index: Index) -> None:
    index.record([due("a"), due("b")], 1.0)
    index.finish([result(only(index, "a"), Fate.DEAD, reason="HTTP 422")], 2.0)
    dead = only(index, "a")
    assert (dead.phase, dead.reason, dead.at) == (Phase.DEAD, "HTTP 422", 2.0)
    assert counts(index) == counted_by_sql(index) == {"DUE": 1, "DEAD": 1}
    index.requeue([dead, only(index, "b")], 9.0)
    job = only(index, "a")
    assert (job.phase, job.reason, job.at, job.tries, job.attempts) == (Phase.DUE, None, 9.0, 0, 0)
    assert counts(index) == counted_by_sql(index) == {"DUE": 2}


def test_a_trimmed_report_stays_due(index: Index) -> None:
    index.record([due("a")], 1.0)
    index.finish([result(only(index, "a"), Fate.TRIM)], 2.0)
    assert (only(index, "a").trimmed, only(index, "a").phase) == (True, Phase.DUE)


def test_held_reports_wait_by_agent_and_are_released_in_batches(index: Index) -> None:
    index.record([due(f"x{n}", agent_id="x") for n in range(5)] + [due("y", agent_id="y"), due("z")], 1.0)
    held = [only(index, job_id) for job_id in ["x0", "x1", "x2", "x3", "x4", "y"]]
    index.finish([result(job, Fate.HELD, reason="HTTP 404") for job in held], 2.0)
    index = reopened(index)
    assert index.held_agents() == {"x": "HTTP 404", "y": "HTTP 404"}
    assert [job.job_id for job in index.due(9.0, limit=9, max_bytes=999)] == ["z"]
    probe = index.longest_held("x")
    assert probe is not None
    assert probe.job_id == "x0"
    assert index.longest_held("x", without={probe.row}) != probe
    assert index.longest_held("nobody") is None
    assert index.release_held("x", 3.0, limit=3, without={probe.row}) == 3
    assert index.release_held("x", 3.0, limit=3, without={probe.row}) == 1
    assert index.release_held("x", 3.0, limit=3, without={probe.row}) == 0
    assert counts(index) == counted_by_sql(index) == {"DUE": 5, "HELD": 2}
    index.close()


def test_the_watch_of_open_jobs_survives_a_restart_and_ends_with_their_phase(index: Index) -> None:
    both, one = frozenset({"child", "owner"}), frozenset({"owner"})
    index.record([Change("a", Phase.OPEN, 9.0, state="s", watch=both)], 1.0)
    index.record([Change("b", Phase.OPEN, 9.0, state="s", watch=one)], 1.0)
    index = reopened(index)
    assert set(index.watched()) == {"child", "owner"}
    assert set(index.watchers("owner")) == {only(index, "a").row, only(index, "b").row}
    index.record([due("a", before=only(index, "a"))], 2.0)
    for _ in range(2):
        assert set(index.watched()) == {"owner"}
        assert set(index.watchers("owner")) == {only(index, "b").row}
        assert index.watchers("child") == ()
        index = reopened(index)
    index.close()


def test_open_jobs_are_looked_at_when_their_time_comes(index: Index) -> None:
    index.record([Change("a", Phase.OPEN, 5.0, state="s"), Change("b", Phase.OPEN, 7.0, state="s")], 1.0)
    assert index.to_look_at(4.0, 10) == []
    assert [job.job_id for job in index.to_look_at(6.0, 10)] == ["a"]
    assert [job.job_id for job in index.to_look_at(8.0, 1)] == ["a"]


def test_a_report_during_which_the_relay_died_three_times_in_a_row_is_dead(index: Index) -> None:
    index.record([due("a"), due("b")], 1.0)
    row = only(index, "a").row
    assert index.note_crashes([row], 2.0) == []
    assert index.note_crashes([row], 3.0) == []
    assert only(index, "a").crashes == 2
    assert index.note_crashes([row], 4.0) == [row]
    assert only(index, "a").phase is Phase.DEAD
    assert "died" in str(only(index, "a").reason)
    assert counts(index) == counted_by_sql(index) == {"DUE": 1, "DEAD": 1}
    assert index.counters["crashes"] == 3


@pytest.mark.parametrize("fate", [Fate.RETRY, Fate.SETTLED, Fate.HELD, Fate.DEAD, Fate.TRIM])
def test_any_answer_clears_the_suspicion_of_having_killed_the_relay(index: Index, fate: Fate) -> None:
    index.record([due("a")], 1.0)
    index.note_crashes([only(index, "a").row], 2.0)
    index.finish([result(only(index, "a"), fate)], 3.0)
    assert only(index, "a").crashes == 0


def test_what_is_put_last_is_due_after_the_rest_and_keeps_a_later_time(index: Index) -> None:
    index.record([due("a"), due("b")], 1.0)
    index.put_last([only(index, "a").row], 5.0)
    assert [job.job_id for job in index.due(9.0, limit=10, max_bytes=10**6)] == ["b", "a"]
    index.finish([result(only(index, "a"), Fate.RETRY)], 3.0)
    at = only(index, "a").at
    index.put_last([only(index, "a").row], at - 1)
    assert only(index, "a").at == at


def test_settled_jobs_are_forgotten_by_age_count_and_size(index: Index) -> None:
    changes = [Change(f"s{n}", Phase.SETTLED, float(n), state="x" * 100) for n in range(10)]
    index.record([*changes, due("waits")], 1.0)

    def left() -> list[str]:
        return sorted(index.find([f"s{n}" for n in range(10)]))

    unbounded = {"before": 0.0, "max_rows": 10**6, "max_bytes": 10**9, "limit": 100}
    assert index.prune(**unbounded) == 0
    assert index.prune(**unbounded | {"before": 2.0}) == 2
    assert left() == [f"s{n}" for n in range(2, 10)]
    assert index.prune(**unbounded | {"max_rows": 6}) == 2
    assert index.prune(**unbounded | {"max_bytes": 350}) == 3
    assert left() == ["s7", "s8", "s9"]
    assert index.prune(**unbounded | {"max_rows": 0, "limit": 2}) == 2
    assert counts(index) == counted_by_sql(index) == {"DUE": 1, "SETTLED": 1}


def test_deleted_jobs_are_gone(index: Index) -> None:
    index.record([due("a"), due("b")], 1.0)
    index.delete([only(index, "a")])
    assert set(index.find(["a", "b"])) == {"b"}
    assert counts(index) == counted_by_sql(index) == {"DUE": 1}
    assert index._db.execute("SELECT count(*) FROM states").fetchone()[0] == 1


@pytest.mark.parametrize("phase", Phase)
def test_listings_go_on_where_the_page_before_ended(index: Index, phase: Phase) -> None:
    changes = [Change(f"j{n}", phase, float(n % 3), state="s", agent_id=f"agent-{n % 2}") for n in range(10)]
    index.record([*changes, Change("other", Phase((phase + 1) % 5), 0.0, state="s")], 1.0)
    seen: list[str] = []
    after: list[Any] = []
    while True:
        page, after = index.listing(phase, limit=3, after=after)
        if not page:
            break
        seen += [job.job_id for job in page]
    assert sorted(seen) == sorted(f"j{n}" for n in range(10))


def test_the_oldest_waiting_report_is_known(index: Index) -> None:
    assert index.waiting_since() is None
    index.record([due("a")], 10.0)
    index.record([due("b")], 20.0)
    index.finish([result(only(index, "a"), Fate.RETRY, at=500.0)], 21.0)
    assert index.waiting_since() == 10.0
    index.finish([result(only(index, job_id), Fate.HELD, reason="x") for job_id in "ab"], 22.0)
    assert index.waiting_since() == 10.0


def test_no_wait_is_longer_than_it_may_be_after_the_clock_jumped(index: Index) -> None:
    index.record([due("a", at=5000.0), due("b", at=10.0)], 1.0)
    index.clamp_waits(100.0, longest_s=300.0)
    assert (only(index, "a").at, only(index, "b").at) == (400.0, 10.0)


def test_dead_processes_are_forgotten_in_time(index: Index) -> None:
    index.record([], 1.0, gone={"old": 1.0, "new": 50.0})
    index.record([], 1.0, gone={"old": 99.0})
    assert index.gone == {"old": 1.0, "new": 50.0}
    index.forget_gone(before=10.0)
    assert index.gone == {"new": 50.0}
    index = reopened(index)
    assert index.gone == {"new": 50.0}
    index.close()


def test_the_state_of_the_gate_survives(index: Index) -> None:
    assert index.gate is None
    index.store_gate({"flow": "paused", "until": 5.0})
    index = reopened(index)
    assert index.gate == {"flow": "paused", "until": 5.0}
    index.close()


def test_ids_of_any_form_are_told_apart(index: Index) -> None:
    ids = ["a", "A", "a ", "ä", "", "a\0b", "a" * 5000, "ext-job-9921"]
    index.record([due(job_id) for job_id in ids], 1.0)
    assert set(index.find(ids)) == set(ids)


# The file


def test_the_files_are_the_owners_alone_and_no_other_process_gets_in(index: Index) -> None:
    index.record([due("a")], 1.0)
    old = os.umask(0)
    try:
        for path in index.path.parent.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    finally:
        os.umask(old)
    with (
        closing(sqlite3.connect(index.path, timeout=0)) as other,
        pytest.raises(sqlite3.OperationalError, match="locked"),
    ):
        other.execute("SELECT * FROM jobs")


def test_commits_are_synchronous(index: Index) -> None:
    assert index._db.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert index._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert index._db.execute("PRAGMA locking_mode").fetchone()[0] == "exclusive"


def test_at_its_cap_it_says_so_keeps_what_it_has_and_can_still_delete(tmp_path: Path) -> None:
    index = Index.open(tmp_path, max_bytes=1024**2)
    stored = 0

    def fill() -> None:
        nonlocal stored
        while True:
            index.record([due(f"j{stored}", state="x" * 5000)], 1.0)
            stored += 1

    with pytest.raises(schema.IndexFullError):
        fill()
    assert counts(index) == counted_by_sql(index) == {"DUE": stored}
    job = only(index, "j0")
    index.finish([result(job, Fate.SETTLED, digest=b"x" * 16)], 2.0)
    assert index.prune(before=9.0, max_rows=0, max_bytes=0, limit=10) == 1
    index.delete([only(index, f"j{n}") for n in range(1, 20)])
    assert index.free_bytes() > 50_000
    index.record([due("new", state="x" * 5000)], 3.0)
    assert only(index, "new").state == "x" * 5000
    index.close()


@pytest.mark.parametrize("garbage", [b"this is no database" * 1000, b""])
def test_a_file_that_is_no_index_is_damaged_and_an_empty_one_is_new(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / schema.FILE).write_bytes(garbage)
    if garbage:
        with pytest.raises(schema.IndexDamagedError):
            Index.open(tmp_path, max_bytes=CAP)
        kept = schema.quarantine(tmp_path)
        assert kept.read_bytes() == garbage
    Index.open(tmp_path, max_bytes=CAP).close()


def test_damage_inside_is_noticed_by_whoever_meets_it(tmp_path: Path) -> None:
    index = Index.open(tmp_path, max_bytes=CAP)
    index.record([due(f"j{n}", state="x" * 3000) for n in range(300)], 1.0)
    index.close()
    content = bytearray((tmp_path / schema.FILE).read_bytes())
    content[8192 * 4 :] = os.urandom(len(content) - 8192 * 4)
    (tmp_path / schema.FILE).write_bytes(content)

    def use() -> None:
        index = Index.open(tmp_path, max_bytes=CAP)
        try:
            index.find([f"j{n}" for n in range(300)])
            index.due(9.0, limit=1000, max_bytes=10**9)
        finally:
            index.close()

    with pytest.raises(schema.IndexDamagedError):
        use()


def test_only_the_last_two_damaged_files_are_kept(tmp_path: Path) -> None:
    for number in range(4):
        for suffix in ("", "-wal"):
            (tmp_path / f"{schema.FILE}{suffix}").write_text(str(number))
        schema.quarantine(tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert [path.read_text() for path in kept] == ["2", "2", "3", "3"]


def test_an_index_of_a_later_release_is_left_alone(tmp_path: Path) -> None:
    Index.open(tmp_path, max_bytes=CAP).close()
    with sqlite3.connect(tmp_path / schema.FILE) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    before = (tmp_path / schema.FILE).read_bytes()
    with pytest.raises(schema.IndexNewerError, match="later release"):
        Index.open(tmp_path, max_bytes=CAP)
    assert (tmp_path / schema.FILE).read_bytes() == before


def test_an_index_of_an_earlier_release_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index.open(tmp_path, max_bytes=CAP)
    index.record([due("a")], 1.0)
    index.close()
    script = "ALTER TABLE notes ADD COLUMN novelty TEXT;"
    monkeypatch.setattr(schema, "SCRIPTS", (*schema.SCRIPTS, script))
    index = Index.open(tmp_path, max_bytes=CAP)
    assert only(index, "a").state == "state of a"
    assert index._db.execute("PRAGMA user_version").fetchone()[0] == len(schema.SCRIPTS)
    assert index._db.execute("SELECT novelty FROM notes LIMIT 1") is not None
    index = reopened(index)
    index.close()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Index.open(tmp_path, max_bytes=CAP).close()
    script = "ALTER TABLE notes ADD COLUMN novelty TEXT; SELECT * FROM nowhere;"
    with monkeypatch.context() as patch:
        patch.setattr(schema, "SCRIPTS", (*schema.SCRIPTS, script))
        with pytest.raises(schema.JournalError):
            Index.open(tmp_path, max_bytes=CAP)
    index = Index.open(tmp_path, max_bytes=CAP)
    assert index._db.execute("PRAGMA user_version").fetchone()[0] == len(schema.SCRIPTS)
    index.close()


def test_the_reserve_takes_room_until_it_is_released(tmp_path: Path) -> None:
    reserve = schema.Reserve(tmp_path)
    assert reserve.restore()
    path = tmp_path / schema.RESERVE
    assert path.stat().st_blocks * 512 >= schema.RESERVE_BYTES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    reserve.release()
    assert list(tmp_path.iterdir()) == []
    assert reserve.restore()


# Receipts


def test_receipts_are_released_once_their_job_is_settled(index: Index) -> None:
    index.record([due("a", receipts=("1", "2")), due("b", receipts=("3",))], 1.0)
    index.record([Change("c", Phase.OPEN, 9.0, state="s", receipts=("4",))], 1.0)
    assert index.released(10) == []
    index.finish([result(only(index, "a"), Fate.SETTLED), result(only(index, "b"), Fate.DEAD, reason="x")], 2.0)
    assert sorted(index.released(10)) == ["1", "2"]
    index.delete([only(index, "b")])
    assert sorted(index.released(10)) == ["1", "2", "3"]
    index = reopened(index)
    assert sorted(index.released(10)) == ["1", "2", "3"]
    index.forget_receipts(["1", "3"])
    assert index.released(10) == ["2"]
    index.record([Change("c", Phase.SETTLED, 3.0, before=only(index, "c"), receipts=("5",))], 3.0)
    assert sorted(index.released(10)) == ["2", "4", "5"]
    assert len(index.released(1)) == 1
    index.close()


def test_receipts_of_a_newer_revision_are_kept_until_that_one_is_delivered(index: Index) -> None:
    index.record([due("a", receipts=("1",))], 1.0)
    sent = only(index, "a")
    index.record([due("a", before=sent, state="newer", receipts=("2",))], 2.0)
    index.finish([result(sent, Fate.SETTLED)], 3.0)
    assert index.released(10) == []
    index.finish([result(only(index, "a"), Fate.SETTLED)], 4.0)
    assert sorted(index.released(10)) == ["1", "2"]


def test_receipts_of_no_job_are_released_at_once(index: Index) -> None:
    index.record([], 1.0, released=["1"])
    assert index.released(10) == ["1"]


def test_what_is_handed_over_is_neither_sent_nor_looked_at_nor_forgotten(index: Index) -> None:
    index.record(
        [due("due", receipts=("1",)), Change("open", Phase.OPEN, 3.0, state="s", watch=frozenset({"p"}))],
        1.0,
        positions={"5": 1},
    )
    index.record([due("settled", receipts=("2",)), due("dead"), due("poison"), due("held")], 1.0)
    index.finish([result(only(index, "settled"), Fate.SETTLED)], 2.0)
    index.finish([result(only(index, "dead"), Fate.DEAD, reason="HTTP 422")], 2.0)
    index.finish([result(only(index, "held"), Fate.HELD, reason="HTTP 404")], 2.0)
    for _ in range(3):
        index.note_crashes([only(index, "poison").row], 2.0)
    index.hand_over(5.0)
    assert counts(index) == counted_by_sql(index) == {"SETTLED": 6}
    assert (index.due(99.0, limit=9, max_bytes=9999), index.to_look_at(99.0, 9), index.watched()) == ([], [], {}.keys())
    assert index.held_agents() == {}
    assert index.positions == {}
    assert index.released(10) == ["2"]
    assert (only(index, "due").state, only(index, "dead").reason) == ("state of due", None)
    assert "died 3 times" in str(only(index, "poison").reason)
    assert index.prune(before=9.0, max_rows=0, max_bytes=0, limit=99) == 6
    assert index._settled_bytes == 0


def test_a_result_that_comes_after_the_hand_over_changes_only_what_is_known(index: Index) -> None:
    index.record([due("a"), due("b"), due("c")], 1.0)
    sent = [only(index, job_id) for job_id in "abc"]
    index.hand_over(2.0)
    fates = (Fate.SETTLED, Fate.RETRY, Fate.DEAD)
    index.finish([result(job, fate, digest=b"d", reason="r") for job, fate in zip(sent, fates, strict=True)], 3.0)
    assert counts(index) == counted_by_sql(index) == {"SETTLED": 3}
    assert only(index, "a").digest == b"d"


def test_an_index_keeps_its_identity_and_each_has_its_own(index: Index, tmp_path: Path) -> None:
    identity = index.identity
    assert reopened(index).identity == identity
    (tmp_path / "other").mkdir()
    other = Index.open(tmp_path / "other", max_bytes=CAP)
    assert other.identity != identity
    other.close()


@pytest.mark.parametrize(("name", "value"), [("totals", '{"coun'), ("gate", "["), ("totals", '{"phases": 3}')])
def test_notes_that_no_release_wrote_are_damage(index: Index, name: str, value: str) -> None:
    index._db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, value))
    index.close()
    with pytest.raises(schema.IndexDamagedError, match="notes"):
        Index.open(index.path.parent, max_bytes=CAP)
