"""`tuna serve`: OpenAI's chat completions over a pipeline, with the tags beside the answer.

    POST /v1/chat/completions  messages with text and images (data: URLs); "stream": true streams
    GET  /v1/models            the model
    GET  /v1/models/NAME       the same, by its name
    GET  /health               counts of waiting and answered requests, and whether the store answers

One request after the other reaches the model (`serving.worker`); those that wait and want the same settings
share a batch, a stream is answered alone. When the store is down the model answers without tags and says so
("degraded": true).
"""

from __future__ import annotations

import hmac
import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tuna_model.inference.answers import PreparedBatch
from tuna_model.inference.pipeline import Pipeline
from tuna_model.serving.bodies import BODY_SECONDS, Bodies
from tuna_model.serving.callers import unless_gone
from tuna_model.serving.refusals import Refused, error_response
from tuna_model.serving.replies import Reply
from tuna_model.serving.worker import Worker


def app(
    tuna: Pipeline,
    *,
    name: str = "tuna",
    batch: int = 8,
    wait: float = 0.01,
    waiting: int = 256,
    body_seconds: float = BODY_SECONDS,
    api_key: str = "",
) -> Starlette:
    """The ASGI application; `app.state.worker` is its worker, which runs as long as the application is
    served.

    Args:
        name: of the model. Requests that name another one are refused.
        batch, wait, waiting: as for `Worker`.
        body_seconds: seconds in which a body must arrive.
        api_key: what callers of /v1 must give as bearer token; empty for none.
    """
    worker = Worker(tuna, name=name, batch=batch, wait=wait, waiting=waiting)
    bodies = Bodies(body_seconds)
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "tuna"}

    async def completions(request: Request) -> Response:
        _check_key(request, api_key)
        try:
            async with bodies.read(request) as body:
                job = await unless_gone(request, worker.read(body))
            result = await unless_gone(request, worker.first_result(job))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        reply = Reply(name)
        if isinstance(result, PreparedBatch):
            return StreamingResponse(
                reply.events(job, result),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store"},
            )
        return JSONResponse(reply.completion(result))

    async def models(request: Request) -> Response:
        _check_key(request, api_key)
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        _check_key(request, api_key)
        asked = request.path_params["name"]
        if asked != name:
            raise Refused(
                f"The model `{asked}` does not exist: this server has `{name}`",
                param="model", code="model_not_found", status=404,
            )  # fmt: skip
        return JSONResponse(model)

    async def health(_: Request) -> Response:
        return JSONResponse(
            {
                "model": name,
                "waiting": worker.waiting,
                "answered": worker.answered,
                "batches": worker.batches,
                "degraded": tuna.lookup.degraded,
                "dropped_tags": tuna.lookup.dropped,
                "last_store_error": tuna.lookup.last_error,
            }
        )

    served = Starlette(
        routes=[
            Route("/v1/chat/completions", _answering_errors(completions), methods=["POST"]),
            Route("/v1/models", _answering_errors(models)),
            Route("/v1/models/{name:path}", _answering_errors(one_model)),
            Route("/health", health),
        ],
        exception_handlers={HTTPException: _no_route},
        lifespan=lambda _: worker.running(),
    )
    served.state.worker = worker
    return served


def _answering_errors(endpoint: Any) -> Any:
    async def answered(request: Request) -> Response:
        try:
            response: Response = await endpoint(request)
        except Exception as error:  # noqa: BLE001  answered
            return error_response(error)
        return response

    return answered


async def _no_route(request: Request, error: Exception) -> Response:
    """Starlette's 404 and 405, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}. There are POST /v1/chat/completions, "
    refused = Refused(message + "GET /v1/models and GET /health", status=error.status_code)
    response = error_response(refused)
    response.headers.update(error.headers or {})
    return response


def _check_key(request: Request, api_key: str) -> None:
    """Raise `Refused` unless the caller has the key."""
    if not api_key:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), api_key.encode()):
        raise Refused(
            "the API key is missing or wrong: send the one that this server was started with as "
            "'Authorization: Bearer KEY'",
            code="invalid_api_key", status=401,
        )  # fmt: skip
