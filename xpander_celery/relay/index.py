"""The index: one row a job, with what is known of it and when it is due. SQLite, one owner, one connection.

It stores what others decide: it neither folds events nor knows the platform. Every method that changes anything is
one transaction, durable on return. Times are the relay's, in seconds since the epoch.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Self

from xpander_celery.relay.policy import MAX_CRASHES, Fate
from xpander_celery.relay.rows import Change, Job, Phase, Result
from xpander_celery.relay.schema import FILE, IndexDamagedError, connect, translated

_SELECT = (
    "SELECT jobs.row, job_id, revision, phase, at, since, agent_id, tries, attempts, crashes, trimmed, size, digest, "
    "reason, state FROM jobs JOIN states ON states.row = jobs.row"
)
_ROOM_PAGES = 512  # 4 MiB: a batch of events may take half of that before it is noticed
_ORDER = dict.fromkeys(Phase, ("at", "jobs.row")) | {Phase.HELD: ("agent_id", "since", "jobs.row")}


class Index:
    """Open it with `Index.open`. Not thread-safe. Raises what `schema.py` describes."""

    def __init__(self, database: sqlite3.Connection, path: Path) -> None:
        self.path = path
        self._db = database
        self.positions: Mapping[str, int] = dict(database.execute("SELECT segment, position FROM positions"))
        self.gone: Mapping[str, float] = dict(database.execute("SELECT process_id, at FROM gone"))
        notes = dict(database.execute("SELECT name, value FROM notes"))
        self.gate: Mapping[str, Any] | None = json.loads(notes["gate"]) if "gate" in notes else None
        self.identity: str = notes.get("identity") or self._new_identity()
        totals = json.loads(notes.get("totals", "{}"))
        self.counters: Counter[str] = Counter(totals.get("counters"))
        self._phases: Counter[Phase] = Counter({Phase[name]: n for name, n in totals.get("phases", {}).items()})
        self._settled_bytes = int(totals.get("settled_bytes", 0))
        self._has_receipts = database.execute("SELECT 1 FROM receipts LIMIT 1").fetchone() is not None
        self._watch: dict[int, frozenset[str]] = {}
        self._watchers: dict[str, set[int]] = {}
        for row, watch in database.execute("SELECT row, watch FROM jobs WHERE watch IS NOT NULL"):
            self._set_watch(row, frozenset(watch.split()))
        self._next_row = int(database.execute("SELECT coalesce(max(row), 0) + 1 FROM jobs").fetchone()[0])

    @classmethod
    def open(cls, directory: Path, *, max_bytes: int) -> Self:
        """The index of `directory`, created or migrated if need be."""
        path = directory / FILE
        database = connect(path, max_bytes=max_bytes)
        try:
            with translated(path):
                return cls(database, path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # a page may be damaged that SQLite reads
            database.close()
            raise IndexDamagedError(f"{path}: notes that no release wrote: {error!r}") from error
        except BaseException:
            database.close()
            raise

    def close(self) -> None:
        self._db.close()

    # What it holds

    def newest(self, phase: Phase) -> float:
        """The time of the last one that stands there, or minus infinity."""
        with translated(self.path):
            found = self._db.execute(f"SELECT max(at) FROM jobs WHERE phase = {phase:d}").fetchone()
        return float("-inf") if found[0] is None else float(found[0])

    def count(self, phase: Phase) -> int:
        """How many jobs stand there."""
        return self._phases[phase]

    def watched(self) -> Collection[str]:
        """The processes at whose death some job must be looked at."""
        return self._watchers.keys()

    def watchers(self, process_id: str) -> Collection[int]:
        """The rows of those jobs."""
        return self._watchers.get(process_id, ())

    def find(self, job_ids: Iterable[str]) -> dict[str, Job]:
        """The known ones of these jobs."""
        query = f"{_SELECT} WHERE job_key = ? AND job_id = ?"
        return {job_id: job for job_id in job_ids for job in self._rows(query, _key(job_id), job_id)}

    def load(self, rows: Iterable[int]) -> list[Job]:
        """These rows, as far as they exist."""
        return [job for row in rows for job in self._rows(f"{_SELECT} WHERE jobs.row = ?", row)]

    def to_look_at(self, now: float, limit: int) -> list[Job]:
        """Open jobs that may be over by now, because time went by."""
        return list(self._rows(f"{_SELECT} WHERE phase = 0 AND at <= ? ORDER BY at LIMIT ?", now, limit))

    def next_look(self) -> float:
        """When the first of the open jobs is to be looked at; infinite where none is."""
        with translated(self.path):
            found = self._db.execute("SELECT at FROM jobs WHERE phase = 0 ORDER BY at LIMIT 1").fetchone()
        return found[0] if found else float("inf")

    def due(self, now: float, *, limit: int, max_bytes: int, without: Collection[int] = ()) -> list[Job]:
        """Reports to send, the longest due first: at most `limit`, and at most `max_bytes` but for the first."""
        query = f"{_SELECT} WHERE phase = 1 AND at <= ? ORDER BY at LIMIT ?"
        found: list[Job] = []
        for job in self._rows(query, now, limit + len(without)):
            if job.row in without:
                continue
            max_bytes -= job.size
            if len(found) == limit or (found and max_bytes < 0):
                break
            found.append(job)
        return found

    def held_agents(self) -> dict[str, str]:
        """The agents whose reports are held, and why."""
        query = "SELECT agent_id, reason FROM jobs WHERE phase = 2 AND agent_id > ? ORDER BY agent_id LIMIT 1"
        agents: dict[str, str] = {}
        with translated(self.path):
            found = self._db.execute(query, ("",)).fetchone()
            while found:
                agents[found[0]] = found[1] or ""
                found = self._db.execute(query, found[:1]).fetchone()
        return agents

    def longest_held(self, agent_id: str, *, without: Collection[int] = ()) -> Job | None:
        """The report that shall probe its agent."""
        query = f"{_SELECT} WHERE phase = 2 AND agent_id = ? ORDER BY since LIMIT ?"
        return next((job for job in self._rows(query, agent_id, len(without) + 1) if job.row not in without), None)

    def waiting_since(self) -> float | None:
        """About since when the oldest report waits; exact for those that were never tried."""
        queries = (
            "SELECT min(since) FROM (SELECT since FROM jobs WHERE phase = 1 ORDER BY at LIMIT 100)",
            "SELECT since FROM jobs WHERE phase = 2 ORDER BY agent_id, since LIMIT 1",
        )
        with translated(self.path):
            found = [row[0] for query in queries for row in self._db.execute(query)]
        return min((since for since in found if since is not None), default=None)

    def listing(self, phase: Phase, *, limit: int, after: Sequence[Any] = ()) -> tuple[list[Job], list[Any]]:
        """Some jobs in the order of their index, and what to pass as `after` for the next ones."""
        order = _ORDER[phase]
        beyond = f"AND ({', '.join(order)}) > ({', '.join('?' * len(order))})" if after else ""
        query = f"{_SELECT} WHERE phase = {phase:d} {beyond} ORDER BY {', '.join(order)} LIMIT ?"
        jobs = list(self._rows(query, *after, limit))
        return jobs, [getattr(jobs[-1], name.removeprefix("jobs.")) for name in order] if jobs else []

    def released(self, limit: int) -> list[str]:
        """Receipts of events that the journal need not keep any longer."""
        if not self._has_receipts:
            return []
        with translated(self.path):
            found = self._db.execute("SELECT receipt FROM receipts WHERE row = 0 LIMIT ?", (limit,)).fetchall()
        return [receipt for (receipt,) in found]

    def free_bytes(self) -> int:
        """The room inside the file that deleted rows left."""
        with translated(self.path):
            pages, size = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("freelist_count", "page_size"))
        return int(pages * size)

    def is_nearly_full(self) -> bool:
        """Whether no more room is left, of the size that the file may have, than what becomes of reports may need.

        To acknowledge one takes no row, but a digest or a reason in it, and places in other indexes.
        """
        names = ("page_count", "freelist_count", "max_page_count")
        with translated(self.path):
            used, free, most = (int(self._db.execute(f"PRAGMA {name}").fetchone()[0]) for name in names)
        return most - used + free < max(most // 8, min(_ROOM_PAGES, most // 4))

    # What changes it

    def record(
        self,
        changes: Sequence[Change],
        now: float,
        *,
        positions: Mapping[str, int] | None = None,
        gone: Mapping[str, float] | None = None,
        counters: Mapping[str, int] | None = None,
        released: Sequence[str] = (),
    ) -> None:
        """Store what events or a look at the clock changed, together with how far events were read.

        `positions` replace what was stored, `gone` is added to it. `released` are receipts of no job.
        """
        added: list[tuple[Any, ...]] = []
        updated: list[tuple[Any, ...]] = []
        texts: list[tuple[int, str]] = []
        moved: list[tuple[Job | Result | None, Phase | None, int]] = []
        rows: list[int] = []
        row_of_next = self._next_row
        for change in changes:
            before, size = change.before, len(change.state or "")
            standing = (change.phase, change.at, change.agent_id, " ".join(sorted(change.watch)) or None, change.reason)
            if before is None:
                row, row_of_next = row_of_next, row_of_next + 1
                added.append((row, _key(change.job_id), change.job_id, now, size, *standing))
            else:
                row, is_new = before.row, change.state is not None
                size = size if is_new else before.size
                still_waits = before.phase.is_waiting and change.phase.is_waiting
                waiting = (before.since, before.tries, before.attempts) if still_waits else (now, 0, 0)
                updated.append((is_new, size, *waiting, *standing, row))
            rows.append(row)
            moved.append((before, change.phase, size))
            if change.state is not None:
                texts.append((row, change.state))
        with self._transaction(moved, counters=counters):
            self._db.executemany(
                "INSERT INTO jobs (row, job_key, job_id, since, size, phase, at, agent_id, watch, reason, revision) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1)",
                added,
            )
            self._db.executemany(
                "UPDATE jobs SET revision = revision + ?, size = ?, since = ?, tries = ?, attempts = ?, "
                "phase = ?, at = ?, agent_id = ?, watch = ?, reason = ? WHERE row = ?",
                updated,
            )
            self._db.executemany("INSERT OR REPLACE INTO states VALUES (?, ?)", texts)
            self._keep_receipts(rows, changes, released)
            if positions is not None:
                self._store_positions(positions)
            self._db.executemany("INSERT OR IGNORE INTO gone VALUES (?, ?)", (gone or {}).items())
        self._next_row = row_of_next
        self.positions = dict(positions) if positions is not None else self.positions
        if gone:
            self.gone = {**gone, **self.gone}
        for row, change in zip(rows, changes, strict=True):
            self._set_watch(row, change.watch)

    def finish(
        self,
        results: Sequence[Result],
        now: float,
        *,
        counters: Mapping[str, int] | None = None,
        is_tight: bool = False,
    ) -> None:
        """Store what became of reports; of a job that has a newer revision by now, only what holds for that too.

        `is_tight`: where there is no room for more, forget what is delivered at once, and why the rest is not.
        """
        moved: list[tuple[Job | Result | None, Phase | None, int]] = []
        if is_tight:
            results = [replace(result, reason=None) for result in results]
            results.sort(key=lambda result: result.fate is not Fate.SETTLED)  # what makes room comes first
        with self._transaction(moved, counters=counters):
            for result in results:
                is_forgotten = is_tight and result.fate is Fate.SETTLED and self._forget_one(result)
                phase = None if is_forgotten else self._finish_one(result, now)
                if phase is not result.phase:
                    moved.append((result, phase, result.size))

    def _forget_one(self, result: Result) -> bool:
        """Delete what is delivered; False where the job has a newer revision."""
        this = (result.row, result.revision)
        if not self._db.execute("DELETE FROM jobs WHERE row = ? AND revision = ? AND phase IN (1, 2)", this).rowcount:
            return False
        self._db.execute("DELETE FROM states WHERE row = ?", (result.row,))
        self._release([result.row])
        return True

    def _finish_one(self, result: Result, now: float) -> Phase:
        """Returns the phase that the row is in now, as far as this revision decides."""
        this = "WHERE row = :row AND revision = :revision AND phase IN (1, 2)"
        values = {
            "row": result.row, "revision": result.revision, "now": now, "at": result.at, "reason": result.reason,
            "digest": result.digest, "counts": result.counts,
        }  # fmt: skip
        match result.fate:
            case Fate.RETRY:
                self._db.execute(
                    "UPDATE jobs SET at = :at, tries = tries + 1, attempts = attempts + :counts, crashes = 0, "
                    "reason = :reason WHERE row = :row AND phase IN (1, 2)",
                    values,
                )
                return result.phase
            case Fate.TRIM:
                self._db.execute("UPDATE jobs SET trimmed = 1, crashes = 0 WHERE row = :row", values)
                return result.phase
            case Fate.SETTLED:
                done = "digest = coalesce(:digest, digest), tries = 0, attempts = 0, crashes = 0"
                settle = f"UPDATE jobs SET phase = 3, at = :now, reason = NULL, {done} {this}"
                if self._db.execute(settle, values).rowcount:
                    self._release([result.row])
                    return Phase.SETTLED
                self._db.execute(f"UPDATE jobs SET {done} WHERE row = :row", values)
                return result.phase
            case Fate.HELD | Fate.DEAD:
                phase = Phase.HELD if result.fate is Fate.HELD else Phase.DEAD
                change = f"UPDATE jobs SET phase = {phase:d}, at = :now, crashes = 0, reason = :reason {this}"
                return phase if self._db.execute(change, values).rowcount else result.phase

    def doubt(self, row: int) -> None:
        """The platform may have another report of this job from now on than the last one that was delivered."""
        with self._transaction([]):
            self._db.execute("UPDATE jobs SET digest = x'' WHERE row = ?", (row,))

    def note_crashes(self, rows: Sequence[int], now: float) -> list[int]:
        """Count a death of the relay for each report it was at work on; returns those that are dead by that."""
        reason = f"the relay died {MAX_CRASHES} times in a row while it was at work on this report"
        victims = [job for job in self.load(rows) if job.phase.is_waiting]
        dead = [job for job in victims if job.crashes + 1 >= MAX_CRASHES]
        with self._transaction([(job, Phase.DEAD, job.size) for job in dead], counters={"crashes": bool(rows)}):
            self._db.executemany("UPDATE jobs SET crashes = crashes + 1 WHERE row = ?", [(job.row,) for job in victims])
            self._db.executemany(
                "UPDATE jobs SET phase = 4, at = ?, reason = ? WHERE row = ?", [(now, reason, job.row) for job in dead]
            )
        return [job.row for job in dead]

    def put_last(self, rows: Sequence[int], now: float) -> None:
        """Let these wait until what is due by now was sent: whatever happened while they were, the others flow."""
        with self._transaction([]):
            self._db.executemany(
                "UPDATE jobs SET at = ? WHERE row = ? AND phase = 1 AND at < ?", [(now, row, now) for row in rows]
            )

    def requeue(self, jobs: Sequence[Job], now: float) -> None:
        """Let dead and held reports be tried as if for the first time."""
        jobs = [job for job in jobs if job.phase in (Phase.DEAD, Phase.HELD)]
        with self._transaction([(job, Phase.DUE, job.size) for job in jobs]):
            self._db.executemany(
                "UPDATE jobs SET phase = 1, at = ?, since = ?, tries = 0, attempts = 0, crashes = 0, trimmed = 0, "
                "reason = NULL WHERE row = ?",
                [(now, now, job.row) for job in jobs],
            )

    def release_held(self, agent_id: str, now: float, *, limit: int, without: Collection[int] = ()) -> int:
        """Make held reports of an agent due; returns how many there were."""
        query = f"{_SELECT} WHERE phase = 2 AND agent_id = ? ORDER BY since LIMIT ?"
        found = self._rows(query, agent_id, limit + len(without))
        jobs = list(islice((job for job in found if job.row not in without), limit))
        with self._transaction([(job, Phase.DUE, job.size) for job in jobs]):
            self._db.executemany(
                "UPDATE jobs SET phase = 1, at = ?, reason = NULL WHERE row = ?", [(now, job.row) for job in jobs]
            )
        return len(jobs)

    def delete(self, jobs: Sequence[Job]) -> None:
        """Forget these jobs."""
        with self._transaction([(job, None, 0) for job in jobs]):
            self._release([job.row for job in jobs])
            self._delete([job.row for job in jobs])
        for job in jobs:
            self._set_watch(job.row, frozenset())

    def prune(self, *, before: float, max_rows: int, max_bytes: int, limit: int) -> int:
        """Forget settled jobs, oldest first: those settled `before`, and those beyond the bounds."""
        surplus_rows, surplus_bytes = self._phases[Phase.SETTLED] - max_rows, self._settled_bytes - max_bytes
        query = "SELECT row, at, size FROM jobs WHERE phase = 3 ORDER BY at LIMIT ?"
        rows: list[int] = []
        freed = 0
        with translated(self.path):
            for row, at, size in self._db.execute(query, (limit,)):
                if at >= before and len(rows) >= surplus_rows and freed >= surplus_bytes:
                    break
                rows.append(row)
                freed += size
        if rows:
            with self._transaction([]):
                self._delete(rows)
                self._phases[Phase.SETTLED] -= len(rows)
                self._settled_bytes -= freed
        return len(rows)

    def forget_receipts(self, receipts: Sequence[str]) -> None:
        """The journal has forgotten these events."""
        with self._transaction([]):
            self._db.executemany("DELETE FROM receipts WHERE receipt = ?", [(receipt,) for receipt in receipts])

    def hand_over(self, now: float) -> None:
        """Another relay went on with everything that is not settled here; what is left of that, the journal gives
        again. What is known stays, so that it counts if more is heard of a job.
        """
        reason = f"CASE WHEN crashes >= {MAX_CRASHES} THEN reason END"
        with translated(self.path):
            settled = "SELECT coalesce(sum(size), 0) FROM jobs WHERE phase != 3"
            moved_bytes = int(self._db.execute(settled).fetchone()[0])
        with self._transaction([]):
            self._db.execute(
                f"UPDATE jobs SET phase = 3, at = ?, watch = NULL, reason = {reason} WHERE phase != 3", (now,)
            )
            # what the platform has by now is the other's doing: nothing is unchanged, and nobody's end is our own
            self._db.execute("UPDATE jobs SET digest = NULL WHERE digest IS NOT NULL")
            self._db.execute("DELETE FROM receipts WHERE row != 0")
            self._db.execute("DELETE FROM positions")
            self._phases = Counter({Phase.SETTLED: self._phases.total()})
            self._settled_bytes += moved_bytes
        self.positions = {}
        self._watch.clear()
        self._watchers.clear()

    def clamp_waits(self, now: float, *, longest_s: float) -> None:
        """No report waits longer than that: the clock may have jumped while no relay ran."""
        with self._transaction([]):
            self._db.execute("UPDATE jobs SET at = :limit WHERE phase = 1 AND at > :limit", {"limit": now + longest_s})

    def forget_gone(self, before: float) -> None:
        """Forget processes that were seen dead before that time."""
        with self._transaction([]):
            self._db.execute("DELETE FROM gone WHERE at < ?", (before,))
        self.gone = {process_id: at for process_id, at in self.gone.items() if at >= before}

    def store_gate(self, gate: Mapping[str, Any]) -> None:
        """Keep what the next relay must know of the destination."""
        with self._transaction([]):
            self._db.execute("INSERT OR REPLACE INTO notes VALUES ('gate', ?)", (json.dumps(gate),))
        self.gate = gate

    # How

    def _rows(self, query: str, *parameters: Any) -> Iterator[Job]:
        with translated(self.path):
            found = self._db.execute(query, parameters)
            while values := found.fetchone():
                try:
                    row, job_id, revision, phase, *others = values
                    job = Job(row, job_id, revision, Phase(phase), *others)
                except ValueError as error:
                    raise IndexDamagedError(f"{self.path}: a row that no release wrote: {error}") from error
                yield job

    @contextlib.contextmanager
    def _transaction(
        self,
        moved: Iterable[tuple[Job | Result | None, Phase | None, int]],
        *,
        counters: Mapping[str, int] | None = None,
    ) -> Iterator[None]:
        """All or nothing, the totals included. `moved`: a row as it was, its phase now (None: deleted), its size."""
        phases, settled_bytes, counted = self._phases.copy(), self._settled_bytes, self.counters.copy()
        try:
            with translated(self.path):
                self._db.execute("BEGIN IMMEDIATE")
                yield
                for before, phase, size in moved:
                    self._move(before, phase, size)
                self.counters.update(counters or {})
                totals = {
                    "phases": {phase.name: count for phase, count in self._phases.items()},
                    "settled_bytes": self._settled_bytes,
                    "counters": self.counters,
                }
                self._db.execute("INSERT OR REPLACE INTO notes VALUES ('totals', ?)", (json.dumps(totals),))
                self._db.execute("COMMIT")
        except BaseException:
            self._phases, self._settled_bytes, self.counters = phases, settled_bytes, counted
            with contextlib.suppress(sqlite3.Error):  # of a full disk, SQLite has rolled back by itself
                self._db.execute("ROLLBACK")
            raise

    def _move(self, before: Job | Result | None, phase: Phase | None, size: int) -> None:
        if before is not None:
            self._phases[before.phase] -= 1
            self._settled_bytes -= before.size if before.phase is Phase.SETTLED else 0
        if phase is not None:
            self._phases[phase] += 1
            self._settled_bytes += size if phase is Phase.SETTLED else 0

    def _store_positions(self, positions: Mapping[str, int]) -> None:
        changed = [item for item in positions.items() if self.positions.get(item[0]) != item[1]]
        self._db.executemany("INSERT OR REPLACE INTO positions VALUES (?, ?)", changed)
        forgotten = [(segment,) for segment in self.positions if segment not in positions]
        self._db.executemany("DELETE FROM positions WHERE segment = ?", forgotten)

    def _keep_receipts(self, rows: Sequence[int], changes: Sequence[Change], released: Sequence[str]) -> None:
        kept = [
            (receipt, 0 if change.phase is Phase.SETTLED else row)
            for row, change in zip(rows, changes, strict=True)
            for receipt in change.receipts
        ]
        kept += [(receipt, 0) for receipt in released]
        self._has_receipts = self._has_receipts or bool(kept)
        self._db.executemany("INSERT OR REPLACE INTO receipts VALUES (?, ?)", kept)
        self._release([row for row, change in zip(rows, changes, strict=True) if change.phase is Phase.SETTLED])

    def _release(self, rows: Iterable[int]) -> None:
        """The journal need not keep the events of these jobs any longer."""
        if self._has_receipts:
            self._db.executemany("UPDATE receipts SET row = 0 WHERE row = ?", [(row,) for row in rows])

    def _new_identity(self) -> str:
        """By which other relays know whether it was this index that was written to last."""
        identity = secrets.token_hex(8)
        self._db.execute("INSERT OR REPLACE INTO notes VALUES ('identity', ?)", (identity,))
        return identity

    def _delete(self, rows: Iterable[int]) -> None:
        keys = [(row,) for row in rows]
        self._db.executemany("DELETE FROM jobs WHERE row = ?", keys)
        self._db.executemany("DELETE FROM states WHERE row = ?", keys)

    def _set_watch(self, row: int, watch: frozenset[str]) -> None:
        for process_id in self._watch.pop(row, ()):
            watchers = self._watchers[process_id]
            watchers.discard(row)
            if not watchers:
                del self._watchers[process_id]
        if watch:
            self._watch[row] = watch
        for process_id in watch:
            self._watchers.setdefault(process_id, set()).add(row)


def _key(job_id: str) -> int:
    """A number to find a job by: half the size of its id in the index, so twice as many in the cache."""
    digest = blake2b(job_id.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)
