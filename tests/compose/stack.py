"""The stack of `docker-compose.yml` as a project of its own: start it, ask it, kill parts of it, remove it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.support.waiting import until

ROOT = Path(__file__).parents[2]
PROJECT = "xpander-celery-test"
IMAGE = "xpander-celery-stack"
AGENT = "stack"
WORKERS = 3
WORKER_CONCURRENCY = 2

_VARIABLES = {"SANDBOX_PORT": "0", "PACE": "5"}  # a free port
_STARTS_WITHIN_S = 600
_COMES_BACK_WITHIN_S = 300
_KILL = "import os, signal; os.kill({}, signal.SIGKILL)"


def compose(
    *arguments: str,
    timeout_s: float = 60,
    env_file: str = os.devnull,
    variables: Mapping[str, str] | None = None,
) -> str:
    """What `docker compose` prints. Neither a `.env` nor variables of this shell reach it, only what is given here."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME") or name.startswith("DOCKER_")}
    command = ["docker", "compose", "--env-file", env_file, *arguments]
    return _run(command, timeout_s=timeout_s, env={**kept, **(variables or {})})


def docker(*arguments: str) -> str:
    """What `docker` prints."""
    return _run(["docker", *arguments], timeout_s=60)


def _run(command: list[str], *, timeout_s: float, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Stack:
    """The running stack, and what can be asked of it from outside."""

    def __init__(self) -> None:
        self._client: httpx.Client | None = None

    def up(self) -> None:
        """Build and start all of it, and wait until each container is healthy."""
        services = ["redis", "sandbox", "worker", "beat", "relay"]
        options = ["--build", "--wait", "--scale", f"worker={WORKERS}"]
        self._compose("up", *options, *services, timeout_s=_STARTS_WITHIN_S)
        port = self._compose("port", "sandbox", "8765").strip().rpartition(":")[2]
        headers = {"x-api-key": "any"}
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, trust_env=False, timeout=30)

    def down(self) -> None:
        """Stop it and remove its containers, network and volumes."""
        if self._client is not None:
            self._client.close()
        self._compose("down", "--volumes", "--timeout", "10", timeout_s=180)

    def left_overs(self) -> list[str]:
        """Containers, volumes and networks that still are there."""
        mine = ("--filter", f"label=com.docker.compose.project={PROJECT}", "--quiet")
        return [
            *self._listed("ps", "--all", *mine),
            *self._listed("volume", "ls", *mine),
            *self._listed("network", "ls", *mine),
        ]

    def logs(self) -> str:
        """What the containers said last."""
        return self._compose("logs", "--no-color", "--tail", "60")

    def records(self) -> dict[str, dict[str, Any]]:
        """The task history by job id, from the published port."""
        assert self._client is not None
        response = self._client.get(f"/agent-execution/executions/history/{AGENT}", params={"limit": 1_000_000})
        response.raise_for_status()
        return {record["id"]: record for record in response.json()}

    def page(self) -> httpx.Response:
        """The page that a browser gets."""
        assert self._client is not None
        return self._client.get("/", follow_redirects=True)

    def begun(self) -> dict[str, str]:
        """Which jobs began, by the jobs' own ledger: task name by job id."""
        return {job_id: name for name, job_id in map(str.split, self._ledger("begun"))}

    def ended(self) -> dict[str, str]:
        """Which jobs ended, by the same: Celery's state by job id."""
        return dict(entry.split() for entry in self._ledger("ended"))

    def stop_sending(self) -> None:
        """No new jobs from now on, but for those that jobs send."""
        self._compose("stop", "beat")

    def containers(self, service: str) -> list[str]:
        """The ids of the containers of a service."""
        return self._compose("ps", "--quiet", service).split()

    def crash(self, container: str) -> None:
        """Kill the main process of a container and so all of it, as a failing machine would: it is to be restarted.

        `docker kill` would count as the wish that it stays away.
        """
        before = self._state(container)
        kill = _KILL.format(before["State"]["Pid"])
        docker("run", "--rm", "--pid", "host", "--user", "0", "--network", "none", IMAGE, "python", "-c", kill)

        def is_back() -> bool:
            now = self._state(container)
            return bool(now["RestartCount"] > before["RestartCount"] and now["State"]["Health"]["Status"] == "healthy")

        until(is_back, timeout_s=_COMES_BACK_WITHIN_S, what="the killed container")

    def _state(self, container: str) -> dict[str, Any]:
        (state,) = json.loads(docker("inspect", container))
        return dict(state)

    def _ledger(self, name: str) -> list[str]:
        key = f"ledger:{name}"
        return self._compose("exec", "-T", "redis", "redis-cli", "-n", "2", "zrange", key, "0", "-1").splitlines()

    def _listed(self, *arguments: str) -> list[str]:
        return docker(*arguments).split()

    def _compose(self, *arguments: str, timeout_s: float = 60) -> str:
        return compose("--project-name", PROJECT, *arguments, timeout_s=timeout_s, variables=_VARIABLES)
