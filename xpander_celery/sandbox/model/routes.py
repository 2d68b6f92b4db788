"""The HTTP routes of the scripted model. Any key is let in; everything served is counted."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from xpander_celery.sandbox.model import anthropic, openai_chat, openai_responses
from xpander_celery.sandbox.model.script import Conversation, Turn, Usage, next_turn, orders
from xpander_celery.sandbox.model.served import Call, Counts, Served

_MODELS = ("gpt-4.1", "gpt-4.1-mini", "claude-sandbox")
_RETRY_AFTER_S = 1


class _Api(Protocol):
    """A provider's wire form: what the modules of this package have in common."""

    ID_PREFIX: str

    def read(self, body: dict[str, Any], seed: int) -> Conversation: ...

    def counted(self, usage: Usage) -> Counts: ...

    def answer(self, turn: Turn, conversation: Conversation, response_id: str) -> dict[str, Any]: ...

    def chunks(
        self, turn: Turn, conversation: Conversation, response_id: str, body: dict[str, Any]
    ) -> Iterator[str]: ...

    def error(self, status: int) -> dict[str, Any]: ...


def model_routes(served: Served, *, seed: int = 0) -> list[BaseRoute]:
    """The routes. `seed` varies the counts where a request names no seed of its own."""

    def route(path: str, api: _Api) -> Route:
        async def complete(request: Request) -> Response:
            return await _complete(api, request, served, seed)

        return Route(path, complete, methods=["POST"])

    return [
        route("/v1/chat/completions", openai_chat),
        route("/v1/responses", openai_responses),
        route("/v1/messages", anthropic),
        Route("/v1/models", _models, methods=["GET"]),
        Route("/v1/models/{name:path}", _model, methods=["GET"]),
    ]


async def _complete(api: _Api, request: Request, served: Served, seed: int) -> Response:
    try:
        body = json.loads(await request.body())
        conversation = api.read(body, seed)
    except (ValueError, TypeError, KeyError, AttributeError):
        return JSONResponse(api.error(400), status_code=400)
    api_path = request.url.path
    wanted = orders(conversation)
    stream = bool(body.get("stream"))
    response_id = f"{api.ID_PREFIX}{uuid.uuid4().hex[:24]}"
    await asyncio.sleep(wanted.delay_s)
    if wanted.error_status is not None:
        served.add(Call(api_path, response_id, conversation.model, stream, wanted.error_status))
        headers = {"retry-after": str(_RETRY_AFTER_S)} if wanted.error_status == 429 else None
        return JSONResponse(api.error(wanted.error_status), status_code=wanted.error_status, headers=headers)
    turn = next_turn(conversation)
    tools = tuple(call.name for call in turn.calls)
    served.add(Call(api_path, response_id, conversation.model, stream, 200, tools, api.counted(turn.usage)))
    if stream:
        return StreamingResponse(
            _slowly(api.chunks(turn, conversation, response_id, body)), media_type="text/event-stream"
        )
    return JSONResponse(api.answer(turn, conversation, response_id))


async def _slowly(events: Iterator[str]) -> Any:
    """One event at a time, so that a client sees a stream and may abandon it."""
    for event in events:
        yield event
        await asyncio.sleep(0)


async def _models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_described(name) for name in _MODELS]})


async def _model(request: Request) -> Response:
    return JSONResponse(_described(request.path_params["name"]))


def _described(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sandbox"}
