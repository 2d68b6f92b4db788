"""What importing and constructing loads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xpander_celery import backend


def loaded_after(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_exports_are_exactly_the_public_names() -> None:
    assert dir(backend) == ["Backend", "Configuration", "Task"]
    for name in backend.__all__:
        assert getattr(backend, name).__name__ == name
    with pytest.raises(AttributeError, match="Nothing"):
        _ = backend.Nothing


@pytest.mark.parametrize(
    "code",
    [
        "import xpander_celery.backend",
        "from xpander_celery.backend import Backend, Configuration, Task; Backend(Configuration('k'))",
    ],
)
def test_a_backend_is_built_without_loading_what_it_may_never_need(code: str) -> None:
    assert not loaded_after(code) & {"celery", "opentelemetry", "pydantic_settings", "xpander_sdk", "agno", "httpx"}


def test_a_report_loads_nothing_of_the_worker_side() -> None:
    code = """
from xpander_celery.backend import Backend, Configuration
from xpander_celery.errors import NetworkError
try:
    Backend(Configuration('k', base_url='http://127.0.0.1:1')).report_external_task('a')
except NetworkError:
    pass
"""
    assert not loaded_after(code) & {"celery", "opentelemetry", "pydantic_settings", "xpander_sdk", "agno"}
