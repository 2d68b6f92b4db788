"""A platform that takes every report and does nothing else, and how long the official client takes to report to it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

SERVER = """
import asyncio, json, sys, time
delay = float(sys.argv[1])
TASK = json.dumps({"id": "x", "agent_id": "agent-123", "organization_id": "o", "input": {}, "status": "completed",
                   "created_at": "2026-01-02T03:04:05Z"}).encode()
arrivals = []
class Platform(asyncio.Protocol):
    def connection_made(self, transport): self.transport, self.data = transport, b""
    def data_received(self, data):
        self.data += data
        while (end := self.data.find(b"\\r\\n\\r\\n")) >= 0:
            head = self.data[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15:].split(b"\\r\\n")[0]) if at >= 0 else 0
            if len(self.data) < end + 4 + size: return
            body, self.data = self.data[end + 4:end + 4 + size], self.data[end + 4 + size:]
            if head.startswith(b"get"): self.answer(json.dumps(arrivals).encode()); continue
            arrivals.append((body[7:43].decode(), time.monotonic()))
            if delay: asyncio.get_running_loop().call_later(delay, self.answer, TASK)
            else: self.answer(TASK)
    def answer(self, body):
        self.transport.write(b"HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\nContent-Length: %d\\r\\n\\r\\n%b" % (len(body), body))
async def main():
    server = await asyncio.get_running_loop().create_server(Platform, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""  # noqa: E501

# Reports one after the other, as the official client is documented; says the CPU seconds and the seconds of each.
OFFICIAL = """
import asyncio, sys, time
from xpander_sdk import Backend
method, count = sys.argv[1], int(sys.argv[2])
backend, text = Backend(), "All 1,204 invoices were read, and 17 of them need a second look. " * 12
def report(number):
    return getattr(backend, method)(agent_id="agent-123", id=f"job-{number}", input=text, result=text, duration=0.1,
                                    used_tools=["search"])
async def main(numbers):
    for number in numbers: await report(number)
def all_of(numbers):
    if method.startswith("a"): asyncio.run(main(numbers))
    else:
        for number in numbers: report(number)
all_of(range(3))
cpu_s, began = time.process_time(), time.perf_counter()
all_of(range(count))
print((time.process_time() - cpu_s) / count, (time.perf_counter() - began) / count)
"""
OFFICIAL_PYTHON = Path(__file__).parents[1] / ".venvs" / "contract" / "bin" / "python"


class Platform:
    """The bare server: takes everything, and notes when."""

    def __init__(self, url: str) -> None:
        self.url = url

    def arrivals(self) -> list[tuple[str, float]]:
        with urllib.request.urlopen(self.url) as answer:
            found: list[tuple[str, float]] = json.load(answer)
        return found


@contextlib.contextmanager
def platform(delay_s: float = 0.0) -> Iterator[Platform]:
    with subprocess.Popen([sys.executable, "-c", SERVER, str(delay_s)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            yield Platform(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()


def official_report_s(
    reports: int, method: Literal["areport_external_task", "report_external_task"]
) -> tuple[float, float] | None:
    """Seconds of CPU, and seconds, that the official client takes for one report; None where it is not installed."""
    if not OFFICIAL_PYTHON.exists():
        print("the official client is not measured: tests/contract/setup.sh installs it", file=sys.stderr)
        return None
    with platform() as target:
        settings = {"XPANDER_API_KEY": "key", "XPANDER_ORGANIZATION_ID": "o", "XPANDER_BASE_URL": target.url}
        command = [OFFICIAL_PYTHON, "-P", "-W", "ignore", "-c", OFFICIAL, method, str(reports)]
        done = subprocess.run(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True)
    cpu_s, elapsed_s = map(float, done.stdout.split()[-2:])
    return cpu_s, elapsed_s
