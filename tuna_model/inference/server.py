"""`tuna serve`: OpenAI's chat completions over a pipeline, with the tags beside the answer.

    POST /v1/chat/completions  messages with text and images (data: URLs); "stream": true streams
    GET  /v1/models            the model
    GET  /health               counts of waiting and answered requests, and whether the store answers

One request after the other reaches the model; those that wait and want the same settings share a batch, a
stream is answered alone. When the store is down the model answers without tags and says so ("degraded":
true).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tagstore.errors import InvalidInput, Overloaded, TagstoreError
from tuna_model.inference.chat_request import ChatRequest, read_request
from tuna_model.inference.pipeline import Pipeline, PreparedBatch, WeighedTag

log = logging.getLogger(__name__)

MAX_BODY = 32 << 20
"""Bytes of a request's body, at most."""
INTERNAL_ERROR = "the model failed on this request; the server's log says why"
_END = object()
"""Follows the last piece of a stream."""


@dataclass(slots=True)
class Job:
    """A request that waits for the model."""

    request: ChatRequest
    results: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    """Gets the `Answer`; or of a stream its `PreparedBatch`, its pieces and `_END`; or the error."""
    abandoned: bool = False
    """Whether the client went away."""


class Worker:
    """Brings requests to the model, one batch after the other. Used in one event loop; the model runs in a
    thread."""

    def __init__(self, tuna: Pipeline, *, batch: int = 8, wait: float = 0.01, waiting: int = 256) -> None:
        """
        Args:
            batch: requests answered together, at most.
            wait: seconds that the first request of a batch waits for others.
            waiting: requests that may wait; further ones are refused.
        """
        self.tuna, self._batch_size, self._wait = tuna, batch, wait
        self._queue: asyncio.Queue[Job | None] = asyncio.Queue(waiting)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tuna")
        self.batches = 0
        """Batches answered so far."""
        self.answered = 0
        """Requests answered so far."""

    def submit(self, job: Job) -> None:
        """Let a request wait for the model. Raises `Overloaded` if too many wait."""
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull:
            raise Overloaded("too many requests are waiting: try again later", retry_after=1.0) from None

    @property
    def waiting(self) -> int:
        """Requests that wait now."""
        return self._queue.qsize()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer requests within the context; at its end answer those that wait, then stop."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            await self._queue.put(None)
            await task
            self._thread.shutdown()

    async def _run(self) -> None:
        held: list[Job | None] = []  # the request that did not fit into the batch before
        while (first := held.pop() if held else await self._queue.get()) is not None:
            batch = [first]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait):
                    while not first.request.stream and len(batch) < self._batch_size and not held:
                        job = await self._queue.get()
                        same = job and not job.request.stream and job.request.options == first.request.options
                        (batch if job and same else held).append(job)  # type: ignore[arg-type]
            await self._answer([job for job in batch if not job.abandoned])

    async def _answer(self, batch: list[Job]) -> None:
        if not batch:
            return
        self.batches += 1
        self.answered += len(batch)
        requests = [job.request for job in batch]
        try:
            if requests[0].stream:
                await self._stream(batch[0])
                return
            answers = await self._in_thread(
                lambda: self.tuna.answers(
                    [request.images for request in requests],
                    [request.conversation for request in requests],
                    **requests[0].options,
                )
            )
            for job, answer in zip(batch, answers, strict=True):
                job.results.put_nowait(answer)
        except Exception as error:
            if not isinstance(error, TagstoreError):
                log.exception("a request failed")
            for job in batch:
                job.results.put_nowait(error)

    async def _stream(self, job: Job) -> None:
        images, messages = job.request.images, job.request.conversation
        prepared = await self._in_thread(lambda: self.tuna.prepare([images], [messages]))
        job.results.put_nowait(prepared)
        pieces: Any = self.tuna.stream(images, messages, prepared=prepared, **job.request.options)
        try:
            while (
                not job.abandoned and (piece := await self._in_thread(lambda: next(pieces, _END))) is not _END
            ):
                job.results.put_nowait(piece)
        finally:
            await self._in_thread(pieces.close)
        job.results.put_nowait(_END)

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)


def app(
    tuna: Pipeline, *, name: str = "tuna", batch: int = 8, wait: float = 0.01, waiting: int = 256
) -> Starlette:
    """The ASGI application; `app.state.worker` is its worker, which runs as long as the application is
    served."""
    worker = Worker(tuna, batch=batch, wait=wait, waiting=waiting)

    async def completions(request: Request) -> Response:
        try:
            job = Job(read_request(await _body(request)))
            worker.submit(job)
            result = await job.results.get()
        except Exception as error:  # noqa: BLE001  answered
            result = error
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if isinstance(result, Exception):
            return _error(result)
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
        while (piece := await job.results.get()) is not _END:
            if isinstance(piece, Exception):
                message = str(piece) if isinstance(piece, TagstoreError) else INTERNAL_ERROR
                yield _event({"error": {"message": message, "type": "internal_error"}})
                return
            if piece:
                yield event({"content": piece})
        yield event({}, "stop")
        yield "data: [DONE]\n\n"
    finally:
        job.abandoned = True


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _body(request: Request) -> bytes:
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise InvalidInput(f"the body is larger than {MAX_BODY >> 20} MiB: send smaller pictures")
    return data


def _sources(tags: tuple[WeighedTag, ...], store: str, version: int, degraded: bool) -> dict[str, Any]:
    """The fields beside OpenAI's: tags, and the store that they come from."""
    named = f"{store}@{version}" if store else ""
    return {"tags": [tag.to_dict() for tag in tags], "store": named, "degraded": degraded}


def _error(error: Exception) -> JSONResponse:
    """An error as OpenAI's API writes it; what is not ours is logged where it happened."""
    status, kind, message, headers = 503, "unavailable", str(error), None
    if isinstance(error, Overloaded):
        status, kind, headers = 429, "overloaded", {"Retry-After": str(int(error.retry_after) or 1)}
    elif isinstance(error, InvalidInput):
        status, kind = 400, "invalid_request_error"
    elif not isinstance(error, TagstoreError):
        status, kind, message = 500, "internal_error", INTERNAL_ERROR
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)
