"""Run the jobs of one library below one combination of layers, each as a Celery job, and compare. One process each.

    python -m tests.instrumentations.scenario ENVIRONMENT URL SEED [LAYER ...]

Prints one JSON object a job: what its record says, and what the endpoint counted.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
import urllib.request
from typing import Any

from celery import Celery

import xpander_celery as xc
from tests.instrumentations.environments import LAYERS
from tests.instrumentations.jobs import JOBS, TELLS_NOT_ALL, Job
from xpander_celery.testing import capture_reports

_WORDS = ("Paris", "Oslo", "weather", "tomorrow", "why", "how", "many", "people", "please", "compare", "and", "or")
_LATE_SPANS_S = 3.0  # litellm's callback and its kind write their spans from a thread


def main() -> None:
    environment, url, seed, *layers = sys.argv[1:]
    _without_builtin(environment, layers)
    for layer in layers:
        _instrument(layer)
    chance = random.Random(f"{seed}/{environment}/{layers}")
    app = Celery("instrumentations", set_as_current=False)
    for name, job in JOBS[environment](url).items():
        for added in (False, True):
            if not added and not layers:
                continue  # nobody tells
            if added and (environment, name) in TELLS_NOT_ALL:
                continue
            prompt = " ".join(chance.choices(_WORDS, k=chance.randrange(3, 60)))
            outcome = _run(app, f"{name}{' + add_usage' if added else ''}", job, prompt, url, added=added)
            print("RESULT", json.dumps(outcome), flush=True)


def _run(app: Celery, name: str, job: Job, prompt: str, url: str, *, added: bool) -> dict[str, Any]:
    @app.task(name=name)
    def task() -> str:
        value = job(prompt)
        if added:
            for each in value if isinstance(value, list) else [value]:
                xc.current_job().add_usage(each)
        return "done"

    _ask(url, "DELETE")
    with capture_reports(app) as reports:
        result = task.apply()
        deadline = time.monotonic() + _LATE_SPANS_S
        served = _ask(url)
        while True:
            [report] = reports.wait_for(1)
            tokens = report.tokens.model_dump() if report.tokens is not None else {}
            if tokens == served["total"] or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    return {
        "job": name,
        "state": result.state,
        "error": None if result.successful() else str(result.result),
        "recorded": tokens,
        "served": served["total"],
        "calls": len([call for call in served["calls"] if call["status"] == 200]),
        "tools_recorded": sorted(report.used_tools),
        "tools_served": sorted({tool for call in served["calls"] for tool in call["tools"]}),
    }


def _ask(url: str, method: str = "GET") -> Any:
    request = urllib.request.Request(f"{url}/_sandbox/usage", method=method)
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.loads(response.read() or b"null")


def _instrument(layer: str) -> None:
    if layer in LAYERS:
        module, name = LAYERS[layer]
        getattr(importlib.import_module(module), name)().instrument()
    elif layer == "pydantic-ai":
        from pydantic_ai import Agent

        Agent.instrument_all()
    elif layer == "litellm-otel":
        import litellm

        litellm.callbacks = ["otel"]
    elif layer == "logfire":
        import logfire

        logfire.configure(send_to_logfire=False, console=False)
        logfire.instrument_openai()


def _without_builtin(environment: str, layers: list[str]) -> None:
    """Strands traces by itself: to run without, it is given a tracer that does not record. The OpenAI Agents SDK traces
    to its maker, unless a layer takes that over.
    """
    if environment == "openai-agents" and "openinference-openai-agents" not in layers:
        import agents

        agents.set_tracing_disabled(True)
    if environment == "strands" and "strands" not in layers:
        import strands.telemetry.tracer as strands_tracer
        from opentelemetry.trace import NoOpTracerProvider

        strands_tracer.trace_api.get_tracer_provider  # noqa: B018  fails here if Strands finds its provider elsewhere
        tracer = strands_tracer.get_tracer()
        tracer.tracer_provider = NoOpTracerProvider()
        tracer.tracer = tracer.tracer_provider.get_tracer("strands")


if __name__ == "__main__":
    main()
