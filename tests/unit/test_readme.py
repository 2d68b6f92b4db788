"""The README tells the truth about settings and commands."""

from __future__ import annotations

import re
from pathlib import Path

from tests.matrix.table import documented
from xpander_celery.settings import Settings, variable_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def settings_rows() -> list[str]:
    rows = []
    for name, field in Settings.model_fields.items():
        default = field.default
        shown = "" if default in (None, (), {}) else ",".join(default) if isinstance(default, tuple) else str(default)
        meaning = str(field.description).replace("|", r"\|")
        rows.append(f"| `{name}` | `{variable_of(name)}` | {f'`{shown}`' if shown else ''} | {meaning} |")
    return rows


def test_every_setting_is_in_the_table_as_it_is_in_the_code() -> None:
    section = README.split("## Settings", 1)[1].split("\n## ", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("| `")]
    assert table == settings_rows()


def test_the_table_of_ends_is_what_the_matrix_asks_for() -> None:
    assert (ROOT / "docs" / "ends.md").read_text() == documented()


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets


def test_every_file_that_is_linked_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
