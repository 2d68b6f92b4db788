"""What the settings mean: which journal, recorder and relay they ask for. Layer 4, below the runtime.

Nothing here opens anything or keeps a state; the runtime decides when something is built, and once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpander_celery.backend.configuration import Configuration
from xpander_celery.celery_settings import configured
from xpander_celery.journal import Journal
from xpander_celery.journal.files import FileJournal
from xpander_celery.journal.location import destination_directory, root_beside
from xpander_celery.recording.recording import Recorder
from xpander_celery.redaction import spellings
from xpander_celery.redis_address import Address, is_url
from xpander_celery.relay.config import RelayConfig
from xpander_celery.rendering import Renderer

if TYPE_CHECKING:
    from xpander_celery.settings import Settings


def settings_class() -> type[Settings]:
    """Loaded where settings are first asked for: pydantic-settings takes as long to import as all else here."""
    from xpander_celery.settings import Settings

    return Settings


def load_settings(app: Any, keywords: Mapping[str, Any]) -> Settings:
    """The settings as they are by now; raises `ConfigurationError` for what is malformed."""
    settings = settings_class().load(conf=configured(app) if app is not None else None, **keywords)
    _platform_of(settings)
    return settings


def _platform_of(settings: Settings) -> Configuration:
    key = settings.api_key
    return Configuration(
        api_key=key.get_secret_value() if key is not None else None,
        organization_id=settings.organization_id,
        base_url=settings.base_url,
        agent_id=settings.agent_id,
    )


def relay_config(settings: Settings) -> RelayConfig:
    """What a relay for these settings has to know, and where the journal of their destination lies, or, with one in
    Redis, what this machine keeps of it.
    """
    platform = _platform_of(settings)
    url = settings.journal if is_url(settings.journal) else None
    root = settings.journal if url is None else str(root_beside(Address.parse(url)))
    directory = destination_directory(root, base_url=platform.base_url, organization_id=platform.organization_id)
    values = {
        **settings.model_dump(),
        "journal": url,
        "api_key": platform.api_key,
        "organization_id": platform.organization_id,
        "base_url": platform.base_url,
    }
    imports = _search_path() if settings.backend or settings.before_send else ()
    return RelayConfig.from_values(directory, values, search_path=imports, loaded_at=time.time())


def _search_path() -> tuple[str, ...]:
    """`sys.path` for a process that has another working directory."""
    try:
        here = str(Path.cwd())
    except OSError:  # it was removed: nothing can be imported from there
        here = ""
    return tuple(str(path) or here for path in sys.path if str(path) or here)  # somebody may have added a `Path`


def journal_of(settings: Settings, directory: Path) -> Journal:
    """The journal, of which nothing is open yet; `directory` is that of the destination on this machine."""
    if settings.journal is not None and is_url(settings.journal):
        from xpander_celery.journal.redis.spool import Spill  # 6 ms that a journal of files is spared
        from xpander_celery.journal.redis.writer import RedisJournal

        spill = Spill(directory, fsync=settings.fsync, max_bytes=settings.max_journal_bytes, required=False)
        return RedisJournal(settings.journal, directory.name, spill=spill, max_bytes=settings.max_journal_bytes)
    return FileJournal(
        directory, fsync=settings.fsync, max_bytes=settings.max_journal_bytes, required=settings.journal is not None
    )


def recorder_of(settings: Settings, emit: Callable[[dict[str, Any]], object]) -> Recorder:
    """What all recordings share, with the caps and the secret names that are set."""
    renderer = Renderer(
        max_input_bytes=settings.max_input_bytes,
        max_result_bytes=settings.max_result_bytes,
        max_traceback_bytes=settings.max_traceback_bytes,
        max_llm_response_bytes=settings.max_llm_response_bytes,
        redact_keys=spellings(settings.redact_keys),
    )
    return Recorder(emit=emit, renderer=renderer, sends_traceback=settings.capture_traceback)


def visibility_timeout_s(app: Any) -> float | None:
    """After which time the broker delivers an unacknowledged message again; None where it does so at once."""
    options = app.conf.broker_transport_options or {}
    channel = getattr(app.connection_for_read().transport_cls, "Channel", None)
    timeout_s = options.get("visibility_timeout") or getattr(channel, "visibility_timeout", None)
    return float(timeout_s) if isinstance(timeout_s, (int, float)) else None
