"""`celery -A proj xpander …`: our commands with the settings of that app. Layer 5; a plug-in of Celery's."""

from __future__ import annotations

import sys

import click

from xpander_celery.cli import main


@click.command(
    "xpander",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
    help="Task history at xpander.ai: doctor, relay, journal.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def xpander(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Hand everything to `cli.main`, with the `xpander_*` configuration of the app."""
    app = context.obj.app
    app.loader.import_default_modules()
    sys.exit(main(arguments, app=app, prog="celery xpander"))
