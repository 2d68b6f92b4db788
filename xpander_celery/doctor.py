"""The command `doctor`: says what is configured, what is missing, and what to do about it. Layer 5. Changes nothing."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpander_celery.errors import (
    AuthenticationError,
    BackendError,
    ConfigurationError,
    JournalError,
    NotFoundError,
    XpanderCeleryError,
)

if TYPE_CHECKING:
    from xpander_celery.backend import Backend
    from xpander_celery.relay.config import RelayConfig
    from xpander_celery.settings import Settings

_DESCRIPTION = (
    "Checks settings, key, journal, relay, platform and broker library. As `celery -A proj xpander doctor` it reads "
    "the settings of that app. Ends with 1 if something keeps jobs from being reported."
)
_LITTLE_SPACE_BYTES = 256 * 1024**2
_LONG_WAIT_S = 300.0
_REDIS_TIMEOUT_S = 2.0


class Level(StrEnum):
    """How bad a finding is. Only a problem keeps jobs from being reported."""

    GOOD = "✓"
    NOTE = "!"
    PROBLEM = "✗"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at, and what to do about it, empty where nothing is to be done."""

    level: Level
    text: str
    remedy: str = ""


def add_parsers(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command `doctor`."""
    parser = subparsers.add_parser("doctor", help="what is missing, and what to do about it", description=_DESCRIPTION)
    parser.add_argument("--offline", action="store_true", help="do not ask the platform")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    findings = list(examine(arguments.app, offline=arguments.offline))
    for finding in findings:
        print(f"{finding.level} {finding.text}")
        if finding.remedy:
            print(f"    → {finding.remedy}")
    return int(any(finding.level is Level.PROBLEM for finding in findings))


def examine(app: Any = None, *, offline: bool = False) -> Iterator[Finding]:
    """Every finding, in the order in which things depend on each other. Never raises for what it finds."""
    from xpander_celery.assembly import relay_config
    from xpander_celery.runtime import settings_of

    yield from _versions()
    if app is not None:
        yield _broker(app)
    try:
        settings = settings_of(app)
        config = relay_config(settings)
    except ConfigurationError as error:
        yield Finding(Level.PROBLEM, f"{error.setting}: {error.problem}", error.remedy)
        return
    except XpanderCeleryError as error:
        yield Finding(Level.PROBLEM, str(error))
        return
    yield from _switches(settings)
    yield from _identity(settings)
    journal = _journal(config.directory) if config.journal is None else _redis_journal(config.journal)
    yield journal
    if journal.level is not Level.PROBLEM:
        yield from _relay(config, settings)
    if settings.api_key is not None and not offline:
        yield _platform(_backend(config), str(config.base_url))


def _versions() -> Iterator[Finding]:
    names = ("xpander-celery", "celery", "opentelemetry-sdk", "httpx")
    yield Finding(Level.GOOD, ", ".join(f"{name} {_version(name)}" for name in names))


def _broker(app: Any) -> Finding:
    """Whether the library of the app's broker is there; the broker itself is not asked."""
    from kombu.exceptions import VersionMismatch

    try:
        driver = app.connection_for_write().transport.driver_name
    except (ImportError, VersionMismatch, KeyError) as error:
        return Finding(
            Level.PROBLEM,
            f"the library of the app's broker is missing: {error}",
            "For a redis:// broker: pip install 'xpander-celery[redis]'.",
        )
    return Finding(Level.GOOD, f"the app's broker is spoken to by {driver}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def _switches(settings: Settings) -> Iterator[Finding]:
    if settings.disabled:
        yield Finding(Level.PROBLEM, "reporting is switched off", "Unset XPANDER_CELERY_DISABLED (xpander_disabled).")
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        yield Finding(
            Level.NOTE,
            "OTEL_SDK_DISABLED is true: tokens and tools come only from current_job() and from returned objects",
            "Unset it to take them from spans.",
        )


def _identity(settings: Settings) -> Iterator[Finding]:
    if settings.backend is not None:
        yield Finding(Level.GOOD, f"reports go to your own backend, {settings.backend}")
    elif settings.api_key is None:
        yield Finding(Level.PROBLEM, "there is no API key, so nothing is reported", "Set XPANDER_API_KEY.")
    else:
        yield Finding(Level.GOOD, "an API key is set")
    if settings.agent_id is not None:
        yield Finding(Level.GOOD, f"jobs go to the agent {settings.agent_id}")
    elif settings.agents:
        yield Finding(Level.GOOD, f"jobs go to agents by {len(settings.agents)} patterns")
    else:
        yield Finding(
            Level.NOTE,
            "no agent is set: only tasks that name one are reported",
            "Set XPANDER_AGENT_ID, or xpander={'agent_id': …} on each task.",
        )


def _journal(directory: Path) -> Finding:
    place = next(parent for parent in (directory, *directory.parents) if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        remedy = "Set XPANDER_CELERY_JOURNAL to a directory."
        return Finding(Level.PROBLEM, f"the journal {directory} cannot be written", remedy)
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < _LITTLE_SPACE_BYTES:
        text = f"the journal is {directory}, where only {free_bytes // 1024**2} MiB are free"
        return Finding(Level.NOTE, text, "Free some space.")
    there = "" if place == directory else ", not there yet: workers make it"
    return Finding(Level.GOOD, f"the journal is {directory}{there}")


def _redis_journal(url: str) -> Finding:
    from xpander_celery.journal.redis import checks
    from xpander_celery.journal.redis.client import Client, RefusedError
    from xpander_celery.redis_address import Address

    address = Address.parse(url)
    client = Client(address, timeout_s=_REDIS_TIMEOUT_S)
    try:
        client.resolve()
        troubles = checks.troubles(client)
    except JournalError as error:
        return Finding(Level.PROBLEM, f"the journal cannot be used: {error}")
    except PermissionError as error:
        return Finding(Level.PROBLEM, f"the journal's Redis at {address}: {error}", "Check the journal's URL.")
    except (OSError, RefusedError) as error:
        text = f"the journal's Redis at {address} does not answer ({error}): events wait in files until it does"
        return Finding(Level.PROBLEM, text, "Check the journal's URL, and the network.")
    finally:
        client.forget()
    for what, remedy in troubles:
        return Finding(Level.NOTE, f"the journal is in Redis at {address}, which {what}", f"{remedy.capitalize()}.")
    return Finding(Level.GOOD, f"the journal is in Redis at {address}")


def _relay(config: RelayConfig, settings: Settings) -> Iterator[Finding]:
    from xpander_celery.relay.journals import leader
    from xpander_celery.relay.status import Status, is_running

    leading = leader(config)
    status = leading or Status.read(config.directory)
    runs = is_running(config.directory)
    if config.journal is not None and leading is not None:
        yield Finding(Level.GOOD, f"a relay leads: {leading.host} (process {leading.pid})")
    elif runs:
        yield Finding(Level.GOOD, f"the relay runs{f' (process {status.pid})' if status else ''}")
    elif settings.relay == "external":
        yield Finding(Level.PROBLEM, "no relay runs, and workers start none", "Run `xpander-celery relay`.")
    else:
        yield Finding(Level.GOOD, "no relay runs: the next worker starts one")
    if status is None:
        return
    if status.reason:
        yield Finding(Level.PROBLEM, f"delivery is {status.flow}: {status.reason}")
    for agent_id, reason in status.held_agents.items():
        yield Finding(Level.PROBLEM, f"reports for the agent {agent_id} wait: {reason}")
    waits = status.waiting + status.held
    late = status.oldest_waiting_s > _LONG_WAIT_S
    yield Finding(
        Level.NOTE if late else Level.GOOD,
        f"{waits} reports wait" + (f", the oldest for {status.oldest_waiting_s:.0f} s" if waits else ""),
        "`xpander-celery journal list` shows them." if late else "",
    )
    if status.dead:
        yield Finding(
            Level.NOTE,
            f"{status.dead} reports were given up",
            "`xpander-celery journal list` says why, `xpander-celery journal requeue` tries them again.",
        )


def _backend(config: RelayConfig) -> Backend:
    from xpander_celery.backend import Backend, Configuration

    return Backend(Configuration(config.api_key, config.organization_id, config.base_url))


def _platform(backend: Backend, base_url: str) -> Finding:
    """Asks for a task that does not exist: nothing is written, and a good key is told that there is none."""
    try:
        backend.load_task("xpander-celery-doctor")
    except NotFoundError:
        pass
    except AuthenticationError as error:
        return Finding(Level.PROBLEM, f"{base_url} refuses the API key: {error}", "Check XPANDER_API_KEY.")
    except BackendError as error:
        return Finding(Level.PROBLEM, f"{base_url} gives no good answer: {error}", "Check XPANDER_BASE_URL, network.")
    except ConfigurationError as error:
        return Finding(Level.PROBLEM, f"{error.setting}: {error.problem}", error.remedy)
    finally:
        backend.close()
    return Finding(Level.GOOD, f"{base_url} answers, and takes the key")
