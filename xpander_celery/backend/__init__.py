"""The platform as Python calls: report a run, invoke an agent, resolve an agent's arguments.

Loading this package loads neither httpx nor any of its own modules: each export comes on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xpander_celery.backend.client import Backend
    from xpander_celery.backend.configuration import Configuration
    from xpander_celery.backend.task import Task

_HOME = {"Backend": "client", "Configuration": "configuration", "Task": "task"}

__all__ = ["Backend", "Configuration", "Task"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
