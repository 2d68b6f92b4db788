"""Run a job's body so that a context it leaks stays behind. It must know nothing of jobs.

An abandoned stream (`for chunk in agent.run(stream=True): break`) leaves its OpenTelemetry context attached, and
closing it later, whenever it is collected, attaches an older one. In a copied context neither reaches what runs next.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from typing import Any, ParamSpec, TypeVar

from opentelemetry import context as otel_context

P = ParamSpec("P")
R = TypeVar("R")

_UNSET = object()


def run_body(body: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`body(*args, **kwargs)` in a copy of the current context; what it raises or returns passes through.

    Context variables that the body changed are copied back, also when it raises, since frameworks keep connections in
    them (Django, asgiref). OpenTelemetry's own is not.
    """
    context = copy_context()
    try:
        return context.run(body, *args, **kwargs)
    finally:
        _copy_back(context)


def _copy_back(context: Context) -> None:
    current = copy_context()
    for variable, value in context.items():
        if current.get(variable, _UNSET) is not value and variable not in _OPENTELEMETRY:
            variable.set(value)


def _opentelemetry_variables() -> frozenset[ContextVar[Any]]:
    """The variables behind OpenTelemetry's current context, found by what attaching one changes.

    The runtime context is a plug-in (OTEL_PYTHON_CONTEXT) and keeps its variable private.
    """
    probe = copy_context()
    before = dict(probe.items())
    probe.run(otel_context.attach, otel_context.Context({"xpander_celery.probe": True}))
    return frozenset(variable for variable, value in probe.items() if before.get(variable, _UNSET) is not value)


_OPENTELEMETRY = _opentelemetry_variables()
