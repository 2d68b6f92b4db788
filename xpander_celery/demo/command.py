"""The command line of the demo. Light: what the demo needs is imported only when it is to run."""

from __future__ import annotations

import argparse
from typing import Any

_DESCRIPTION = (
    "Starts a local platform, a broker and a real worker, runs ten jobs that end in all sorts of ways, and shows "
    "their task history as the platform's API gives it. Nothing leaves this machine, unless you say --live."
)


def add_parsers(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command `demo`."""
    parser = subparsers.add_parser(
        "demo", help="real jobs on a real worker, and their task history", description=_DESCRIPTION
    )
    parser.add_argument("--once", action="store_true", help="exit when the history is shown (also without a terminal)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per record, and nothing else")
    parser.add_argument("--broker", metavar="URL", help="a broker of yours, redis://… or amqp://…")
    parser.add_argument("--port", type=int, default=0, help="port of the history page (default: any that is free)")
    parser.add_argument(
        "--live", action="store_true", help="let the agent call the real model; needs OPENAI_API_KEY, and costs"
    )
    parser.add_argument("--model", default="gpt-4.1-mini", help="the agent's model (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from xpander_celery.demo.run import Options, run

    options = Options(
        once=arguments.once,
        json=arguments.json,
        broker=arguments.broker,
        port=arguments.port,
        live=arguments.live,
        model=arguments.model,
    )
    return run(options)
