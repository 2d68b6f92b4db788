"""The task history in one SQLite database. Knows records and filters, and neither HTTP nor HTML.

One connection, used from one thread. Losing the last writes in a power cut is fine here, so nothing waits for the disk.
"""

from __future__ import annotations

import json
import sqlite3
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from xpander_celery.sandbox.contract import InvocationBody, ReportBody, UpdateBody

INVOCATION_RUNS_S = 0.3
_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    agent_id TEXT NOT NULL,
    organization_id TEXT NOT NULL,
    user_id TEXT,
    source TEXT NOT NULL,
    status TEXT NOT NULL,
    total_tokens INTEGER NOT NULL DEFAULT 0,
    title TEXT,
    input TEXT,
    result TEXT,
    is_success INTEGER,
    duration REAL,
    tokens TEXT,
    used_tools TEXT NOT NULL DEFAULT '[]',
    llm_response TEXT,
    extra TEXT NOT NULL DEFAULT '{}',
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    reports INTEGER NOT NULL DEFAULT 0,
    due_at REAL
);
CREATE INDEX IF NOT EXISTS records_by_agent ON records (agent_id, seq);
CREATE INDEX IF NOT EXISTS records_by_status ON records (status, seq);
CREATE INDEX IF NOT EXISTS records_due ON records (due_at) WHERE due_at IS NOT NULL;
"""
_UPSERT = """
INSERT INTO records (id, agent_id, organization_id, source, status, total_tokens, title, input, result, is_success,
                     duration, tokens, used_tools, llm_response, created_at, updated_at, reports)
VALUES (:id, :agent_id, :organization_id, 'external', :status, :total_tokens, :title, :input, :result, :is_success,
        :duration, :tokens, :used_tools, :llm_response, :now, :now, 1)
ON CONFLICT (id) DO UPDATE SET
    agent_id = excluded.agent_id, organization_id = excluded.organization_id, status = excluded.status,
    total_tokens = excluded.total_tokens, title = excluded.title, input = excluded.input, result = excluded.result,
    is_success = excluded.is_success, duration = excluded.duration, tokens = excluded.tokens,
    used_tools = excluded.used_tools, llm_response = excluded.llm_response, updated_at = excluded.updated_at,
    reports = reports + 1, due_at = NULL
RETURNING *
"""


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the task history. Times are seconds since the epoch; `reports` counts how often it was reported."""

    seq: int
    id: str
    agent_id: str
    organization_id: str
    user_id: str | None
    source: str
    status: str
    title: str | None
    input: str | None
    result: str | None
    is_success: bool | None
    duration: float | None
    tokens: dict[str, int] | None
    used_tools: list[str]
    llm_response: Any
    extra: dict[str, Any]
    created_at: float
    updated_at: float
    reports: int

    def as_task(self) -> dict[str, Any]:
        """The record as the platform's Task, with what was reported beside the Task's own keys."""
        ended = self.status in ("completed", "error", "failed", "stopped")
        return {
            **self.extra,
            "id": self.id,
            "agent_id": self.agent_id,
            "organization_id": self.organization_id,
            "input": {**self.extra.get("input", {}), "text": self.input},
            "status": self.status,
            "created_at": _timestamp(self.created_at),
            "updated_at": _timestamp(self.updated_at),
            "finished_at": _timestamp(self.updated_at) if ended else None,
            "title": self.title,
            "source": self.source,
            "result": self.result,
            "llm_response": self.llm_response,
            "tokens": self.tokens,
            "is_success": self.is_success,
            "duration": self.duration,
            "used_tools": self.used_tools,
            "reports": self.reports,
        }


class Summary(NamedTuple):
    """Sums over records: how many, how many of them failed, and their tokens (prompt and completion)."""

    records: int
    failed: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Filter:
    """Which records are meant; None means any. `text` is looked for in id, title, input and result."""

    agent_id: str | None = None
    user_id: str | None = None
    statuses: tuple[str, ...] = ()
    text: str | None = None

    def condition(self) -> tuple[str, list[Any]]:
        """As an SQL condition with its parameters."""
        parts: list[str] = []
        values: list[Any] = []
        if self.agent_id is not None:
            parts.append("agent_id = ?")
            values.append(self.agent_id)
        if self.user_id is not None:
            parts.append("user_id = ?")
            values.append(self.user_id)
        if self.statuses:
            parts.append(f"status IN ({', '.join('?' * len(self.statuses))})")
            values.extend(self.statuses)
        if self.text:
            columns = " || char(10) || ".join(f"coalesce({name}, '')" for name in ("id", "title", "input", "result"))
            parts.append(f"instr(lower({columns}), lower(?)) > 0")
            values.append(self.text)
        return " AND ".join(parts) or "1", values


class Store:
    """The records of one sandbox, in a file or in memory (`:memory:`)."""

    def __init__(self, path: str) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.executescript(_SCHEMA)

    def close(self) -> None:
        self._connection.close()

    def report(self, agent_id: str, organization_id: str, body: ReportBody) -> Record:
        """Record what was reported; an id that is known updates its record."""
        row = self._connection.execute(
            _UPSERT,
            {
                "id": body.id or str(uuid.uuid4()),
                "agent_id": agent_id,
                "organization_id": organization_id,
                "status": "completed" if body.is_success else "error",
                "total_tokens": 0 if body.tokens is None else body.tokens.total_tokens,
                "title": _task_name(body.llm_response),
                "input": body.input,
                "result": body.result,
                "is_success": body.is_success,
                "duration": body.duration,
                "tokens": None if body.tokens is None else body.tokens.model_dump_json(),
                "used_tools": json.dumps(body.used_tools),
                "llm_response": None if body.llm_response is None else json.dumps(body.llm_response),
                "now": time.time(),
            },
        ).fetchone()
        return _record(row)

    def invoke(self, agent_id: str, organization_id: str, body: InvocationBody) -> Record:
        """A new task for an agent. Unless it runs locally, the sandbox ends it `INVOCATION_RUNS_S` later."""
        now = time.time()
        user_id = (body.input.user or {}).get("id")
        row = self._connection.execute(
            "INSERT INTO records (id, agent_id, organization_id, user_id, source, status, title, input, extra,"
            " created_at, updated_at, due_at) VALUES (?, ?, ?, ?, ?, 'pending', ?, ?, ?, ?, ?, ?) RETURNING *",
            (
                body.id or str(uuid.uuid4()),
                agent_id,
                organization_id,
                None if user_id is None else str(user_id),
                body.source or "api",
                body.title,
                body.input.text,
                body.model_dump_json(),
                now,
                now,
                None if body.run_locally else now + INVOCATION_RUNS_S,
            ),
        ).fetchone()
        return _record(row)

    def update(self, record_id: str, body: UpdateBody) -> Record | None:
        """The record with the given fields replaced, None if there is no such record."""
        known = self.get(record_id)
        if known is None:
            return None
        extra = {**known.extra, **body.model_dump(mode="json", exclude_unset=True)}
        row = self._connection.execute(
            "UPDATE records SET status = coalesce(?, status), result = coalesce(?, result), title = coalesce(?, title),"
            " input = coalesce(?, input), extra = ?, updated_at = ?, due_at = NULL WHERE id = ? RETURNING *",
            (
                body.status,
                body.result,
                body.title,
                body.input.text if body.input else None,
                json.dumps(extra),
                time.time(),
                record_id,
            ),
        ).fetchone()
        return _record(row)

    def stop(self, record_id: str) -> Record | None:
        """The record with status `stopped`, None if there is no such record."""
        return self.update(record_id, UpdateBody(status="stopped"))

    def get(self, record_id: str) -> Record | None:
        self._end_invocations()
        row = self._connection.execute("SELECT * FROM records WHERE id = ?", (record_id,)).fetchone()
        return None if row is None else _record(row)

    def newest(self, wanted: Filter, *, limit: int, before: int | None = None) -> list[Record]:
        """Up to `limit` records, newest first, older than the sequence number `before` if one is given."""
        condition, values = wanted.condition()
        return self._select(f"{condition} AND seq < ?", [*values, before or 2**62], "DESC", limit)

    def just_newer(self, wanted: Filter, *, limit: int, after: int) -> list[Record]:
        """Up to `limit` records, newest first, that follow directly on the sequence number `after`."""
        condition, values = wanted.condition()
        return self._select(f"{condition} AND seq > ?", [*values, after], "ASC", limit)[::-1]

    def summary(self, wanted: Filter) -> Summary:
        """The sums over all records that are meant."""
        condition, values = wanted.condition()
        row = self._connection.execute(
            "SELECT count(*), coalesce(sum(status IN ('error', 'failed')), 0), coalesce(sum(total_tokens), 0)"
            f" FROM records WHERE {condition}",
            values,
        ).fetchone()
        return Summary(*row)

    @property
    def version(self) -> int:
        """A number that grows with every change made through this store."""
        self._end_invocations()
        return self._connection.total_changes

    def agents(self) -> list[str]:
        """The agents that have records, by name."""
        rows = self._connection.execute("SELECT DISTINCT agent_id FROM records ORDER BY agent_id")
        return [row[0] for row in rows]

    def clear(self) -> None:
        self._connection.execute("DELETE FROM records")

    def _select(self, condition: str, values: Sequence[Any], order: str, limit: int) -> list[Record]:
        self._end_invocations()
        rows: Iterable[sqlite3.Row] = self._connection.execute(
            f"SELECT * FROM records WHERE {condition} ORDER BY seq {order} LIMIT ?", [*values, limit]
        )
        return [_record(row) for row in rows]

    def _end_invocations(self) -> None:
        """End the invoked tasks whose time has come: a prompt with the word `fail` fails, any other is answered."""
        now = time.time()
        self._connection.execute(
            "UPDATE records SET due_at = NULL, updated_at = due_at,"
            " status = CASE WHEN instr(lower(coalesce(input, '')), 'fail') THEN 'error' ELSE 'completed' END,"
            " result = CASE WHEN instr(lower(coalesce(input, '')), 'fail') THEN 'The sandbox was asked to fail.'"
            " ELSE 'The sandbox heard: ' || coalesce(input, '') END WHERE due_at <= ?",
            (now,),
        )
        self._connection.execute(
            "UPDATE records SET status = 'executing' WHERE due_at IS NOT NULL AND status = 'pending' AND due_at < ?",
            (now + INVOCATION_RUNS_S * 2 / 3,),
        )


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _task_name(llm_response: Any) -> str | None:
    """The job's task, where the reporter put it into `llm_response`."""
    celery = llm_response.get("celery") if isinstance(llm_response, dict) else None
    task = celery.get("task") if isinstance(celery, dict) else None
    return task if isinstance(task, str) else None


def _record(row: sqlite3.Row) -> Record:
    return Record(
        seq=row["seq"],
        id=row["id"],
        agent_id=row["agent_id"],
        organization_id=row["organization_id"],
        user_id=row["user_id"],
        source=row["source"],
        status=row["status"],
        title=row["title"],
        input=row["input"],
        result=row["result"],
        is_success=None if row["is_success"] is None else bool(row["is_success"]),
        duration=row["duration"],
        tokens=None if row["tokens"] is None else json.loads(row["tokens"]),
        used_tools=json.loads(row["used_tools"]),
        llm_response=None if row["llm_response"] is None else json.loads(row["llm_response"]),
        extra=json.loads(row["extra"]),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        reports=row["reports"],
    )
