"""The sandbox as one ASGI application: routes over one store, behind the recorder. Starts nothing by itself."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.types import ASGIApp

from xpander_celery.sandbox.arrivals import Arrivals, Recorder
from xpander_celery.sandbox.control import control_routes
from xpander_celery.sandbox.model.routes import model_routes
from xpander_celery.sandbox.model.served import Served
from xpander_celery.sandbox.pages.routes import page_routes
from xpander_celery.sandbox.platform import platform_routes
from xpander_celery.sandbox.store import Store


def build_app(
    store: Store, *, api_keys: frozenset[str] = frozenset(), keep_requests: int = 10_000, model_seed: int = 0
) -> ASGIApp:
    """The application. `keep_requests` bounds what `/_sandbox/requests` and `/_sandbox/usage` remember."""
    arrivals = Arrivals(keep=keep_requests)
    served = Served(keep=keep_requests)
    routes = [
        *control_routes(arrivals, store, served),
        *model_routes(served, seed=model_seed),
        *platform_routes(store, api_keys),
        *page_routes(store),
    ]
    return Recorder(Starlette(routes=routes), arrivals)
