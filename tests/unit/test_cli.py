import subprocess
import sys
from typing import Any

import pytest

from xpander_celery import cli
from xpander_celery.errors import ConfigurationError
from xpander_celery.relay.config import RelayConfig

_LOADED = """
import sys
from xpander_celery.cli import build_parser
build_parser()
heavy = ("celery", "httpx", "opentelemetry", "pydantic", "rich", "sqlite3", "starlette", "uvicorn")
print([name for name in heavy if name in sys.modules])
"""


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A room with one command that does what the test says."""

    class Room:
        run: Any = None
        run_with_config: Any = None

        def add_parsers(self, subparsers: Any) -> None:
            for name in ("run", "run_with_config"):
                if getattr(self, name) is not None:
                    subparsers.add_parser("play").set_defaults(**{name: getattr(self, name)})

    room = Room()
    monkeypatch.setattr(cli, "_ROOMS", ("room",))
    monkeypatch.setattr(cli, "import_module", lambda name: room)
    return room


def test_every_command_is_listed_and_can_be_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "doctor", "journal", "relay", "sandbox"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
        assert f"xpander-celery {command}" in capsys.readouterr().out


def test_listing_the_commands_loads_nothing_that_they_need() -> None:
    done = subprocess.run([sys.executable, "-c", _LOADED], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_without_a_command_the_usage_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_the_exit_code_is_the_commands(room: Any) -> None:
    room.run = lambda arguments: 7
    assert cli.main(["play"]) == 7


def test_a_command_of_the_relay_gets_its_configuration(room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPANDER_CELERY_CONCURRENCY", "3")
    given: list[RelayConfig] = []
    room.run_with_config = lambda arguments, config: given.append(config) or 0
    assert cli.main(["play"]) == 0
    assert given[0].concurrency == 3


def test_a_wrong_setting_is_one_line_and_no_traceback(room: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(arguments: Any) -> int:
        raise ConfigurationError("XPANDER_X", "is wrong", "Mend it.")

    room.run = run
    assert cli.main(["play"]) == 2
    assert capsys.readouterr().err == "xpander-celery: XPANDER_X: is wrong. Mend it.\n"


def test_a_missing_extra_is_named(room: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(arguments: Any) -> int:
        raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn.config")

    room.run = run
    assert cli.main(["play"]) == 2
    assert "pip install 'xpander-celery[sandbox]'" in capsys.readouterr().err


def test_another_missing_module_is_a_defect_and_not_hidden(room: Any) -> None:
    def run(arguments: Any) -> int:
        raise ModuleNotFoundError("No module named 'of_the_user'", name="of_the_user")

    room.run = run
    with pytest.raises(ModuleNotFoundError):
        cli.main(["play"])


def test_ctrl_c_ends_a_command_quietly(room: Any) -> None:
    def run(arguments: Any) -> int:
        raise KeyboardInterrupt

    room.run = run
    assert cli.main(["play"]) == 130
