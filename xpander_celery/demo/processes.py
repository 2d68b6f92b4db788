"""Processes of the demo: each on a leash, with an environment that nothing of the user's reaches, and a log file."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_GOODBYE = b"."
_LEASH = Path(__file__).with_name("leash.py")
_NOT_OURS = ("XPANDER_", "OTEL_", "CELERY_", "IS_STG", "AGNO_", "OPENAI_")
_MARGIN_S = 5.0
_LOOK_EVERY_S = 0.05


class ProcessError(RuntimeError):
    """A process of the demo did not start or did not stay; the message says which and ends with its last words."""


class Leashed:
    """A running command that ends with this process, even if this process is killed.

    `grace_s` is how long the command may take to end by itself. `relays` is a journal whose relays go with it, `remove`
    a directory that is removed if this process is killed.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environ: Mapping[str, str],
        grace_s: float = 5.0,
        relays: Path | None = None,
        remove: Path | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self._grace_s = grace_s
        options = {"--grace": str(grace_s), "--relays": relays, "--remove": remove}
        given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_LEASH), *given, "--", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=dict(environ),
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> int:
        """Let it go and wait for its end; the exit code. May be called again."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(_GOODBYE)
                self._process.stdin.flush()
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            return self._process.wait(self._grace_s + _MARGIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def wait_for(self, word: str, within_s: float) -> str:
        """The first line of its log that holds `word`; raises `ProcessError` if none comes."""
        deadline = time.monotonic() + within_s
        while True:
            was_running = self.is_running
            for line in self.log.read_text(errors="replace").splitlines():
                if word in line:
                    return line
            if not was_running:
                raise self.failure("did not start")
            if time.monotonic() > deadline:
                raise self.failure(f"did not start within {within_s:.0f} s")
            time.sleep(_LOOK_EVERY_S)

    def failure(self, what: str) -> ProcessError:
        """An error that says what went wrong with this process, with the end of its log."""
        words = self.log.read_text(errors="replace").strip().splitlines()[-15:]
        return ProcessError("\n  ".join([f"{self.name} {what}; its log ends with:", *words]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def clean_environ(**more: str) -> dict[str, str]:
    """This process's environment without settings of this package, of tracing and of proxies, and with `more`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_NOT_OURS) and not name.lower().endswith("_proxy")
    }
    return {**kept, **more}
