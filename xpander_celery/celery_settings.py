"""The `xpander_*` keys of a Celery app's configuration, without making Celery load it. Layer 3.

Loading the configuration (`app.conf.anything`) sends `on_after_configure`, and whoever connects to that later is never
called (the usual place of `add_periodic_task`). So as long as it is not loaded, its source is looked at directly.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

_OURS = "xpander_"


def configured(app: Any) -> dict[str, Any]:
    """The keys by the names that `Settings.load(conf=...)` takes: `xpander_*`, or `CELERY_XPANDER_*` by namespace.

    A source that cannot be read yet gives nothing: Celery says so itself when it loads it.
    """
    found: dict[str, Any] = {}
    for source in _sources(app):
        for key, value in _of_ours(source, app.namespace):
            found[key] = value
    return found


def _sources(app: Any) -> Sequence[Any]:
    """The weakest first."""
    if app.configured:
        maps: list[Any] = app.conf.maps
        return maps[-2::-1]  # the last one holds Celery's defaults
    return _unloaded(app), app._preconf


def _unloaded(app: Any) -> Any:
    source = app._config_source
    if not isinstance(source, str):
        return source
    try:
        return app.loader._smart_import(source, imp=app.loader.import_from_cwd)
    except Exception:  # it is the user's own module, which may raise anything; the app meets it again when it needs it
        logger.debug("the configuration %s cannot be read yet", source, exc_info=True)
        return None


def _of_ours(source: Any, namespace: str | None) -> Iterator[tuple[str, Any]]:
    prefix = f"{namespace.rstrip('_').lower()}_{_OURS}" if namespace else None
    try:
        names = list(source) if isinstance(source, Mapping) else dir(source)
    except Exception:  # noqa: BLE001 - Django's settings raise where they are not set up
        return
    for name in names:
        if not isinstance(name, str):
            continue
        if name.startswith(_OURS):
            key = name
        elif prefix is not None and name.lower().startswith(prefix):
            key = _OURS + name[len(prefix) :].lower()
        else:
            continue
        value = source[name] if isinstance(source, Mapping) else getattr(source, name)
        if not isinstance(value, ModuleType):  # `import xpander_celery` in a configuration module
            yield key, value
