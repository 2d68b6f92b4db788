"""A platform that keeps what it was asked to the byte, and answers with the least that the clients accept."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMPARED_HEADERS = ("x-api-key", "x-agent-version", "content-type")


@dataclass(frozen=True)
class Request:
    """What both clients must send alike."""

    method: str
    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.body.decode(errors='replace')[:300]} {dict(self.headers)}"


@dataclass
class Capture:
    """The server's address and what reached it since the last `take`."""

    url: str
    requests: list[Request] = field(default_factory=list)

    def take(self) -> list[Request]:
        taken, self.requests = self.requests, []
        return taken


@contextlib.contextmanager
def serve() -> Iterator[Capture]:
    """A server on a free port of loopback, in a thread."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = tuple((name, value) for name in COMPARED_HEADERS if (value := self.headers.get(name)) is not None)
            capture.requests.append(Request(self.command, self.path, body, headers))
            answer = json.dumps(_answer_to(self.path)).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815 - the names of http.server

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of http.server
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    capture = Capture(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield capture
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _answer_to(path: str) -> dict[str, Any]:
    if match := re.search(r"/agents/([^/?]+)$", path):
        return {
            "id": match[1],
            "organization_id": "org-1",
            "name": "An agent",
            "unique_name": "an-agent",
            "framework": "agno",
            "model_provider": "openai",
            "model_name": "gpt-4.1",
            "agno_settings": {"session_storage": False},
        }
    if path.endswith("/metadata/default_llm_extra_headers"):
        return {}
    return {
        "id": "task-1",
        "agent_id": "agent-1",
        "organization_id": "org-1",
        "input": {},
        "created_at": "2026-01-02T03:04:05Z",
        "status": "completed",
    }
