"""Start the sandbox as a process of its own, on a free port, and ask it what it saw."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

API_KEY = "sandbox-key-for-tests"


@dataclass(frozen=True)
class Sandbox:
    """A running sandbox. Its process ends with the test process, whatever way that ends."""

    url: str
    api_key: str
    client: httpx.Client
    process: subprocess.Popen[str]

    def records(self, agent_id: str) -> list[dict[str, Any]]:
        """The history of an agent, newest first, as the platform's API gives it."""
        response = self.client.get(f"/agent-execution/executions/history/{agent_id}", params={"limit": 1_000_000})
        response.raise_for_status()
        records: list[dict[str, Any]] = response.json()
        return records

    def record(self, task_id: str) -> dict[str, Any] | None:
        """One record, None if there is none."""
        response = self.client.get(f"/agent-execution/{task_id}/status")
        if response.status_code == 404:
            return None
        response.raise_for_status()
        record: dict[str, Any] = response.json()
        return record

    def requests(self) -> list[dict[str, Any]]:
        """Every request that arrived, oldest first, but for what this object itself asked under `/_sandbox/`."""
        requests: list[dict[str, Any]] = self._own("requests")
        return requests

    def clear_requests(self) -> None:
        self.client.delete("/_sandbox/requests").raise_for_status()

    def clear_records(self) -> None:
        self.client.delete("/_sandbox/records").raise_for_status()

    def posts_by_id(self) -> dict[str, int]:
        """How many reports arrived for each id, those that a fault turned away included."""
        posts: dict[str, int] = self._own("posts")
        return posts

    def set_faults(self, *rules: dict[str, Any]) -> None:
        """Order faults in place of earlier ones; none turns them off. Rules: `xpander_celery/sandbox/arrivals.py`."""
        self.client.put("/_sandbox/faults", json=list(rules)).raise_for_status()

    def faults(self) -> list[dict[str, Any]]:
        """The ordered faults, with how often each fitted (`seen`) and was `applied`."""
        faults: list[dict[str, Any]] = self._own("faults")
        return faults

    def served_usage(self) -> dict[str, Any]:
        """What the scripted model served: `calls`, one object each, and `total`."""
        usage: dict[str, Any] = self._own("usage")
        return usage

    def _own(self, what: str) -> Any:
        response = self.client.get(f"/_sandbox/{what}")
        response.raise_for_status()
        return response.json()


@contextlib.contextmanager
def start_sandbox(*options: str, port: int = 0) -> Iterator[Sandbox]:
    """A sandbox with further command line `options`, such as `"--db", path`."""
    command = [sys.executable, "-m", "xpander_celery.sandbox", "--port", str(port), "--api-key", API_KEY]
    process = subprocess.Popen(
        [*command, "--keep-requests", "1000000", "--stop-at-eof", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
    )
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        if words[:2] != ["sandbox", "ready"]:
            raise RuntimeError(f"the sandbox did not start: exit code {process.wait(10)}")
        url = words[2]
        with httpx.Client(base_url=url, headers={"x-api-key": API_KEY}, trust_env=False, timeout=30) as client:
            yield Sandbox(url=url, api_key=API_KEY, client=client, process=process)
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
