"""The keywords of an `agno.agent.Agent` for an agent stored at the platform, resolved by the official SDK.

The SDK is an optional extra and slow to load (seconds, over a hundred megabytes), so the first call imports it. Two
defects of xpander-sdk 2.0.537 are worked around from outside, each only where it shows, so that a mended SDK is used as
it is (both in `modules/backend/frameworks/agno.py`, `build_agent_args`):

- Without a task it fails, asking None for `instructions_override`.
- Its result holds `_xpander_hidden_mcp_toolkits`, which Agno's constructors refuse.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from xpander_celery.backend.arguments import agent_of, segment
from xpander_celery.backend.blocking import run_blocking
from xpander_celery.backend.calls import Answer, Call, refusal
from xpander_celery.backend.configuration import Configuration
from xpander_celery.backend.task import Task
from xpander_celery.errors import BackendError, ConfigurationError, NetworkError, XpanderCeleryError

if TYPE_CHECKING:
    from types import ModuleType

_INTERNAL = "_xpander_"


async def resolve(
    configuration: Configuration, *, agent_id: Any, agent: Any, task: Any, **arguments: Any
) -> dict[str, Any]:
    """The keywords for `Agent(**keywords)`. What the SDK raises is the cause of what this raises."""
    sdk = _sdk()
    official = _official(sdk, configuration)
    if agent is None:
        arguments["agent_id"] = segment("agent_id", agent_of(agent_id, default=configuration.agent_id))
    else:
        arguments["agent"] = agent
    try:
        if isinstance(task, Task):  # ours has fewer fields than the SDK's
            task = await sdk.Tasks(configuration=official).aget(task_id=segment("task.id", task.id))
        keywords = await _resolved(sdk.Backend(configuration=official), task, arguments)
    except XpanderCeleryError:
        raise
    except Exception as error:
        raise _failure(error) from error
    return _acceptable(keywords)


def resolve_blocking(configuration: Configuration, **arguments: Any) -> dict[str, Any]:
    """As `resolve`, for a caller that cannot await."""
    _sdk()  # in this thread: another one could meet an import that this one is in the middle of
    return run_blocking(lambda: resolve(configuration, is_async=False, **arguments))


class _NoTask:
    """The task that is not there: false, like None, but its fields can be asked for, and are None."""

    def __bool__(self) -> bool:
        return False

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


async def _resolved(backend: Any, task: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        return await backend.aget_args(task=task, **arguments)  # type: ignore[no-any-return]
    except AttributeError as error:
        if task is not None or error.name is None or error.obj is not None:
            raise
    return await backend.aget_args(task=_NoTask(), **arguments)  # type: ignore[no-any-return]


def _acceptable(keywords: dict[str, Any]) -> dict[str, Any]:
    """Without the SDK's own keys, where the constructor that they are meant for does not know them."""
    from agno.agent import Agent
    from agno.team import Team

    known = inspect.signature(Team if "members" in keywords else Agent).parameters
    return {name: value for name, value in keywords.items() if name in known or not name.startswith(_INTERNAL)}


def _sdk() -> ModuleType:
    try:
        import xpander_sdk
    except ImportError as error:  # not there, or there without its agno extra
        raise ConfigurationError(
            "aget_args", f"needs the official SDK ({error})", "Install it: pip install 'xpander-celery[sdk]'."
        ) from error
    return xpander_sdk  # type: ignore[no-any-return]


def _official(sdk: ModuleType, configuration: Configuration) -> Any:
    configuration.get_full_url()  # raises where the organization is needed and missing
    return sdk.Configuration(
        api_key=configuration.require_key(),
        organization_id=configuration.organization_id,
        base_url=configuration.base_url,
        agent_id=configuration.agent_id,
    )


def _failure(error: Exception) -> BackendError:
    """Ours for what the SDK raised, which hides the HTTP error in the context of its own."""
    import httpx

    hidden: BaseException | None = error
    while hidden is not None and not isinstance(hidden, httpx.HTTPError):
        hidden = hidden.__cause__ or hidden.__context__
    if isinstance(hidden, httpx.HTTPStatusError):
        response, request = hidden.response, hidden.request
        return refusal(
            Call(request.method, request.url.raw_path.decode()),
            Answer(response.status_code, response.content, response.headers),
        )
    if hidden is not None:
        return NetworkError(f"aget_args: no answer ({type(hidden).__name__}: {hidden})")
    return BackendError(f"aget_args: the official SDK failed ({type(error).__name__}: {error})")
