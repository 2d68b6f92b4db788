"""The environments of the suite: libraries, layers of instrumentation, and their set-up. Data, but for the last."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Where the instrumentor of a layer is, and the package that brings it.
LAYERS = {
    "openinference-agno": ("openinference.instrumentation.agno", "AgnoInstrumentor"),
    "openinference-anthropic": ("openinference.instrumentation.anthropic", "AnthropicInstrumentor"),
    "openinference-langchain": ("openinference.instrumentation.langchain", "LangChainInstrumentor"),
    "openinference-litellm": ("openinference.instrumentation.litellm", "LiteLLMInstrumentor"),
    "openinference-openai-agents": ("openinference.instrumentation.openai_agents", "OpenAIAgentsInstrumentor"),
    "openinference-openai": ("openinference.instrumentation.openai", "OpenAIInstrumentor"),
    "genai-anthropic": ("opentelemetry.instrumentation.genai.anthropic", "AnthropicInstrumentor"),
    "genai-openai": ("opentelemetry.instrumentation.genai.openai", "OpenAIInstrumentor"),
    "openllmetry-agno": ("opentelemetry.instrumentation.agno", "AgnoInstrumentor"),
    "openllmetry-anthropic": ("opentelemetry.instrumentation.anthropic", "AnthropicInstrumentor"),
    "openllmetry-openai": ("opentelemetry.instrumentation.openai", "OpenAIInstrumentor"),
}
PACKAGES = {
    **{layer: f"openinference-instrumentation-{layer.removeprefix('openinference-')}" for layer in LAYERS},
    **{layer: f"opentelemetry-instrumentation-{layer}" for layer in LAYERS if layer.startswith("genai-")},
    **{
        layer: f"opentelemetry-instrumentation-{layer.removeprefix('openllmetry-')}"
        for layer in LAYERS
        if layer.startswith("openllmetry-")
    },
}
# LiteLLM 1.110 posts by itself, past the functions that some layers wrap.
_PAST: dict[str, tuple[str, ...] | None] = {"completion": (), "two": (), "stream": ()}
# Streamed as the OpenAI Agents SDK reads it.
_STREAMED: dict[str, tuple[str, ...] | None] = {"stream": ()}
# What a layer alone does not write, so that no record can have it: by job, which counts remain. None: of some calls.
LIMITS: dict[tuple[str, tuple[str, ...]], dict[str, tuple[str, ...] | None]] = {
    ("agno", ("openllmetry-agno",)): {
        "run": ("prompt_tokens", "completion_tokens"),
        "one by one": ("prompt_tokens", "completion_tokens"),
        "arun": ("prompt_tokens", "completion_tokens"),
        "gather": ("prompt_tokens", "completion_tokens"),
        "continued": None,
        "stream": (),
        "team": (),
    },
    ("openai-agents", ("openinference-openai-agents",)): {"chat": ("prompt_tokens", "completion_tokens")},
    ("openai-agents", ("openinference-openai",)): _STREAMED,
    ("openai-agents", ("openllmetry-openai",)): _STREAMED,
    ("openai-agents", ("openinference-openai", "openllmetry-openai")): _STREAMED,
    ("litellm", ("genai-openai",)): _PAST,
    ("litellm", ("openllmetry-openai",)): _PAST,
    ("litellm", ("genai-openai", "openllmetry-openai")): _PAST,
}
_OPENAI_LAYERS = ("openinference-openai", "genai-openai", "openllmetry-openai")


@dataclass(frozen=True)
class Environment:
    """One virtual environment. `builtin` layers come with the library and need no instrumentor."""

    name: str
    requirements: tuple[str, ...]
    layers: tuple[str, ...]
    builtin: tuple[str, ...] = ()

    @property
    def directory(self) -> Path:
        return ROOT / ".venvs" / f"instr-{self.name}"

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    def combinations(self) -> list[tuple[str, ...]]:
        """No layer, each alone, and each pair."""
        every = (*self.builtin, *self.layers)
        return [combination for size in range(3) for combination in itertools.combinations(every, size)]


ENVIRONMENTS = (
    Environment("openai", ("openai>=1.99",), _OPENAI_LAYERS),
    Environment(
        "anthropic",
        ("anthropic>=0.60",),
        ("openinference-anthropic", "genai-anthropic", "openllmetry-anthropic"),
    ),
    Environment(
        "agno",
        ("agno>=2.5", "openai>=1.99", "anthropic>=0.60"),
        ("openinference-agno", "openllmetry-agno", "openinference-openai", "genai-openai", "openllmetry-openai"),
    ),
    Environment(
        "langchain",
        ("langchain>=1.0", "langchain-openai>=1.0"),
        ("openinference-langchain", *_OPENAI_LAYERS),
    ),
    Environment("openai-agents", ("openai-agents>=0.2",), ("openinference-openai-agents", *_OPENAI_LAYERS)),
    Environment("pydantic-ai", ("pydantic-ai-slim[openai]>=1.0",), _OPENAI_LAYERS, builtin=("pydantic-ai",)),
    Environment("strands", ("strands-agents[openai,otel]>=1.0",), _OPENAI_LAYERS, builtin=("strands",)),
    Environment("litellm", ("litellm>=1.110",), ("openinference-litellm", *_OPENAI_LAYERS), builtin=("litellm-otel",)),
    Environment("logfire", ("logfire>=4", "openai>=1.99"), ("openinference-openai",), builtin=("logfire",)),
)


def set_up(environment: Environment) -> str | None:
    """Create the environment where it is missing or was made for other requirements; what went wrong, if something."""
    wanted = [*environment.requirements, *(PACKAGES[layer] for layer in environment.layers)]
    project = (ROOT / "pyproject.toml").read_bytes()
    stamp = hashlib.sha256(repr((wanted, sys.version_info[:2], project)).encode()).hexdigest()
    marker = environment.directory / ".installed"
    if marker.is_file() and marker.read_text() == stamp:
        return None
    if not environment.python.is_file():
        venv.create(environment.directory, with_pip=True)
    command = [str(environment.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--editable", str(ROOT), *wanted], capture_output=True, text=True, timeout=1800, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
        return lines[-1] if lines else f"pip ended with {done.returncode}"
    marker.write_text(stamp)
    return None
