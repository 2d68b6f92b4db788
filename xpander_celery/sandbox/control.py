"""The sandbox's own routes below `/_sandbox/`, for tests: what arrived, what the model served, faults, clearing."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from xpander_celery.sandbox.arrivals import Arrivals, Fault
from xpander_celery.sandbox.contract import BodyError
from xpander_celery.sandbox.model.served import Served
from xpander_celery.sandbox.platform import JsonText
from xpander_celery.sandbox.store import Store

_FAULTS = TypeAdapter(list[Fault])


def control_routes(arrivals: Arrivals, store: Store, served: Served) -> list[BaseRoute]:
    """`requests` (counted by reported id in `posts`), `faults`, `records`, `usage`. Asking is never written down."""

    async def read_requests(request: Request) -> Response:
        return JsonText([arrival.as_json() for arrival in arrivals.requests])

    async def clear_requests(request: Request) -> Response:
        arrivals.clear()
        return Response(status_code=204)

    async def read_posts(request: Request) -> Response:
        return JsonText(arrivals.posts_by_id)

    async def read_faults(request: Request) -> Response:
        return JsonText([fault.model_dump() for fault in arrivals.faults])

    async def set_faults(request: Request) -> Response:
        try:
            arrivals.faults = _FAULTS.validate_json(await request.body())
        except ValidationError as error:
            return JsonText({"detail": BodyError.of(error).detail}, status_code=422)
        return await read_faults(request)

    async def clear_records(request: Request) -> Response:
        store.clear()
        return Response(status_code=204)

    async def read_usage(request: Request) -> Response:
        return JsonText(served.as_json())

    async def clear_usage(request: Request) -> Response:
        served.clear()
        return Response(status_code=204)

    return [
        Route("/_sandbox/requests", read_requests, methods=["GET"]),
        Route("/_sandbox/requests", clear_requests, methods=["DELETE"]),
        Route("/_sandbox/posts", read_posts, methods=["GET"]),
        Route("/_sandbox/faults", read_faults, methods=["GET"]),
        Route("/_sandbox/faults", set_faults, methods=["PUT"]),
        Route("/_sandbox/records", clear_records, methods=["DELETE"]),
        Route("/_sandbox/usage", read_usage, methods=["GET"]),
        Route("/_sandbox/usage", clear_usage, methods=["DELETE"]),
    ]
