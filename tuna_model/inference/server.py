"""`tuna serve`: OpenAI's chat completions over a pipeline, with the tags beside the answer.

    POST /v1/chat/completions  messages with text and images (data: URLs); "stream": true streams
    GET  /v1/models            the model
    GET  /health               counts of waiting and answered requests, and whether the store answers

One request after the other reaches the model (`inference.worker`); those that wait and want the same settings
share a batch, a stream is answered alone. When the store is down the model answers without tags and says so
("degraded": true).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tagstore.errors import InvalidInput, Overloaded, TagstoreError, TimedOut
from tuna_model.inference.answers import PreparedBatch, WeighedTag
from tuna_model.inference.pipeline import Pipeline
from tuna_model.inference.worker import END, Job, Worker

log = logging.getLogger(__name__)

T = TypeVar("T")
MAX_BODY = 32 << 20
"""Bytes of a request's body, at most."""
MAX_BODIES = 256 << 20
"""Bytes of all bodies that are being read, at most."""
BODY_SECONDS = 30.0
"""Seconds in which a body must arrive."""
INTERNAL_ERROR = "the model failed on this request; the server's log says why"


class Bodies:
    """Reads bodies of requests: each within a size and a time, all together within a memory."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._bytes = seconds, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Give the body of a request. Raises `InvalidInput`, `TimedOut`, `Overloaded`."""
        data = bytearray()
        try:
            async with asyncio.timeout(self._seconds):
                async for chunk in request.stream():
                    data += chunk
                    self._bytes += len(chunk)
                    if len(data) > MAX_BODY:
                        raise InvalidInput(
                            f"the body is larger than {MAX_BODY >> 20} MiB: send smaller pictures"
                        )
                    if self._bytes > MAX_BODIES:
                        raise Overloaded("too many bodies are being read: try again later", retry_after=1.0)
            yield bytes(data)
        except TimeoutError:
            raise TimedOut(f"the body did not arrive within {self._seconds:g} s: send it again") from None
        finally:
            self._bytes -= len(data)


def app(
    tuna: Pipeline,
    *,
    name: str = "tuna",
    batch: int = 8,
    wait: float = 0.01,
    waiting: int = 256,
    body_seconds: float = BODY_SECONDS,
) -> Starlette:
    """The ASGI application; `app.state.worker` is its worker, which runs as long as the application is
    served."""
    worker = Worker(tuna, batch=batch, wait=wait, waiting=waiting)
    bodies = Bodies(body_seconds)

    async def completions(request: Request) -> Response:
        try:
            async with bodies.read(request) as body:
                job = await _unless_gone(request, worker.read(body))
            result = await _unless_gone(request, worker.first_result(job))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except Exception as error:  # noqa: BLE001  answered
            return _error(error)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if isinstance(result, PreparedBatch):
            events = _events(job, head, result)
            return StreamingResponse(
                events, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": result.text},
            "finish_reason": "stop" if result.finished else "length",
        }
        sources = _sources(result.tags, result.store, result.version, result.degraded)
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], **sources})

    async def models(_: Request) -> Response:
        model = {"id": name, "object": "model", "created": 0, "owned_by": "tuna"}
        return JSONResponse({"object": "list", "data": [model]})

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
            Route("/v1/chat/completions", completions, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        lifespan=lambda _: worker.running(),
    )
    served.state.worker = worker
    return served


async def _events(job: Job, head: dict[str, Any], prepared: PreparedBatch) -> AsyncIterator[str]:
    """Server-sent events of a stream. The tags come with the first one."""
    store, version = next(((r.store, r.version) for r in prepared.retrievals[0] if r is not None), ("", 0))

    def event(delta: dict[str, Any], finish: str | None = None, **extra: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return _event({**head, "object": "chat.completion.chunk", "choices": [choice], **extra})

    try:
        sources = _sources(prepared.tags[0], store, version, prepared.degraded[0])
        yield event({"role": "assistant", "content": ""}, **sources)
        while (piece := await job.results.get()) is not END:
            if isinstance(piece, Exception):
                yield _event({"error": {"message": _message(piece), "type": "internal_error"}})
                return
            if piece:
                yield event({"content": piece})
        yield event({}, "stop")
        yield "data: [DONE]\n\n"
    finally:
        job.gone.set()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await something for a caller; if the caller goes first, cancel it and raise `ClientDisconnect`."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    """Return when the caller of a request, whose body was read, has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sources(tags: tuple[WeighedTag, ...], store: str, version: int, degraded: bool) -> dict[str, Any]:
    """The fields beside OpenAI's: tags, and the store that they come from."""
    named = f"{store}@{version}" if store else ""
    return {"tags": [tag.to_dict() for tag in tags], "store": named, "degraded": degraded}


def _message(error: Exception) -> str:
    """What a caller is told of an error; one that is not ours is logged instead."""
    if isinstance(error, TagstoreError):
        return str(error)
    log.error("a request failed", exc_info=error)
    return INTERNAL_ERROR


def _error(error: Exception) -> JSONResponse:
    """An error as OpenAI's API writes it."""
    status, kind, message = 503, "unavailable", _message(error)
    headers = {}
    if isinstance(error, Overloaded):
        status, kind, headers = 429, "overloaded", {"Retry-After": str(int(error.retry_after) or 1)}
    elif isinstance(error, TimedOut):
        status, kind = 408, "request_timeout"
    elif isinstance(error, InvalidInput):
        status, kind = 400, "invalid_request_error"
    elif not isinstance(error, TagstoreError):
        status, kind = 500, "internal_error"
    headers["Connection"] = "close"  # the rest of a body is not read
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)
