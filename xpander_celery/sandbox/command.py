"""The command line of the sandbox. Light: the server is imported only when it is to run."""

from __future__ import annotations

import argparse
from typing import Any

DESCRIPTION = "A local platform: task history page, HTTP API, and a scripted model. Serves until SIGTERM or Ctrl-C."


def add_parsers(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command `sandbox`."""
    add_arguments(subparsers.add_parser("sandbox", help="a local platform to develop against", description=DESCRIPTION))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the sandbox."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8899, help="port; 0 lets the system choose (default: %(default)s)")
    parser.add_argument("--db", default=":memory:", help="SQLite file of the history (default: in memory)")
    parser.add_argument(
        "--api-key", action="append", default=[], help="a key that is let in, repeatable (default: any key)"
    )
    parser.add_argument(
        "--keep-requests", type=int, default=10_000, help="requests to remember for tests (default: %(default)s)"
    )
    parser.add_argument("--model-seed", type=int, default=0, help="varies what the scripted model counts")
    parser.add_argument(
        "--stop-at-eof", action="store_true", help="stop when standard input ends, so with the process that started it"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve as `arguments` say; the exit code."""
    from xpander_celery.sandbox.server import serve

    return serve(arguments)
