"""What the package exports is what it documents, and importing it starts and loads as little as it says."""

from __future__ import annotations

import subprocess
import sys

import pytest

import xpander_celery


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


CELERYS = loaded_by("import celery; celery.Celery")


def test_every_export_can_be_had() -> None:
    assert sorted(xpander_celery.__all__) == xpander_celery.__all__
    for name in xpander_celery.__all__:
        assert getattr(xpander_celery, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'instrumentt'"):
        xpander_celery.instrumentt  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import xpander_celery", {"celery", "opentelemetry", "pydantic", "httpx"}),
        ("import xpander_celery.relay.process", {"celery", "opentelemetry", "pydantic_settings"}),
        ("import xpander_celery.backend", {"celery", "opentelemetry", "pydantic_settings", "xpander_sdk"}),
        ("from xpander_celery import instrument", {"httpx", "sqlite3", "xpander_sdk", "agno"}),
        (
            "from xpander_celery import current_job, instrument, job, reported",
            {"opentelemetry.sdk", "pydantic_settings", "asyncio"} - CELERYS,
        ),
    ],
)
def test_an_import_does_not_load_what_it_does_not_need(statement: str, absent: set[str]) -> None:
    assert loaded_by(statement) & absent == set()


def test_importing_starts_no_thread() -> None:
    code = "import threading, xpander_celery as x; x.instrument; x.job; x.Backend; print(threading.active_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
