"""`python -m xpander_celery.sandbox`."""

from __future__ import annotations

import argparse
import sys

from xpander_celery.sandbox.command import DESCRIPTION, add_arguments, run


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m xpander_celery.sandbox", description=DESCRIPTION)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
