"""Report Celery jobs to the task history of an xpander.ai agent.

Exports are loaded on first use (PEP 562), so that the relay, which lives in this package, never loads Celery or
OpenTelemetry.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xpander_celery.backend import Backend, Configuration
    from xpander_celery.errors import ConfigurationError, XpanderCeleryError
    from xpander_celery.recording import current_job, tool_call
    from xpander_celery.report import Outcome, TaskReport, Tokens
    from xpander_celery.runtime import TaskOptions, XpanderTask, flush, instrument, job, reported, uninstrument
    from xpander_celery.settings import Settings

_HOME = {
    "Backend": "backend",
    "Configuration": "backend",
    "ConfigurationError": "errors",
    "Outcome": "report",
    "Settings": "settings",
    "TaskOptions": "runtime",
    "TaskReport": "report",
    "Tokens": "report",
    "XpanderCeleryError": "errors",
    "XpanderTask": "runtime",
    "current_job": "recording",
    "flush": "runtime",
    "instrument": "runtime",
    "job": "runtime",
    "reported": "runtime",
    "tool_call": "recording",
    "uninstrument": "runtime",
}

__all__ = [
    "Backend",
    "Configuration",
    "ConfigurationError",
    "Outcome",
    "Settings",
    "TaskOptions",
    "TaskReport",
    "Tokens",
    "XpanderCeleryError",
    "XpanderTask",
    "current_job",
    "flush",
    "instrument",
    "job",
    "reported",
    "tool_call",
    "uninstrument",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
