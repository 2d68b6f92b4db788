"""What the demo shows: a progress bar, the history as a table, or one JSON object per record."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from xpander_celery.demo.history import Record

_WIDE_ENOUGH = 120


class Screen:
    """The terminal, or wherever standard output goes. With `as_json` only records go there."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._console = Console(stderr=as_json, highlight=False)
        if not self._console.is_terminal and self._console.width < _WIDE_ENOUGH:
            self._console.width = _WIDE_ENOUGH

    @property
    def is_terminal(self) -> bool:
        """Whether somebody is there to press Ctrl-C."""
        return sys.stdout.isatty()

    def say(self, text: str) -> None:
        self._console.print(Text(text))

    def problem(self, text: str) -> None:
        print(f"demo: {text}", file=sys.stderr)  # noqa: T201

    @contextmanager
    def progress(self, what: str, *, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """A bar, or a spinner without `total`; gives a function that is told how much is done."""
        columns = [SpinnerColumn(), TextColumn("{task.description}")]
        counted = [BarColumn(), MofNCompleteColumn()] if total is not None else []
        with Progress(
            *columns, *counted, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)

    def records(self, records: Sequence[Record], url: str) -> None:
        """The history, and where it can be seen."""
        if self._as_json:
            for record in records:
                print(json.dumps(record.as_json(), ensure_ascii=False))  # noqa: T201
            return
        table = Table(
            title=f"Task history, read back from {url}",
            title_justify="left",
            box=SIMPLE_HEAD,
            expand=True,
            padding=(0, 1, 0, 0),
        )
        for name in ("Task", "Outcome"):
            table.add_column(name, no_wrap=True)
        for name in ("Duration", "Tokens"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("Tools")
        table.add_column("Result", no_wrap=True, ratio=1)
        for record in records:
            table.add_row(
                Text(record.task.removeprefix("demo.")),
                Text(record.outcome.replace("_", " "), style="green" if record.is_success else "red"),
                f"{record.duration:.2f} s",
                f"{record.tokens['total_tokens']:,}" if record.tokens else "",
                Text("\n".join(record.used_tools)),
                Text((record.result or "").partition("\n")[0]),
            )
        self._console.print(table)
        self.say(f"History page: {url}/")
