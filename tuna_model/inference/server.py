"""`tuna serve`: OpenAI's chat completions over a pipeline, with the tags beside the answer.

    POST /v1/chat/completions    messages with text and images (data: URLs); "stream": true for server-sent events
    GET  /v1/models              the model
    GET  /health                 what is served, what waits, and whether the store answers

One thread owns the model. Requests that wait and want the same settings are answered in one batch; a stream is answered alone. When the
store is away the model answers without tags and says so ("degraded": true).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tagstore.encoding.images import decode
from tagstore.errors import BadImage, InvalidInput, Overloaded, TagstoreError
from tuna_model.inference.pipeline import Message, Pipeline, Prepared

log = logging.getLogger(__name__)

MAX_BODY = 32 << 20
MAX_TOKENS = 1024
_DONE = object()


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, read and checked."""

    images: tuple[Any, ...]
    messages: tuple[Message, ...]
    options: tuple[tuple[str, Any], ...]
    """Of `generate`, sorted: equal ones may share a batch."""
    stream: bool


@dataclass(slots=True)
class _Job:
    ask: Ask
    put: Callable[[Any], None]
    """Takes answers, pieces, an error, and at last `_DONE`; may be called from any thread."""
    gone: threading.Event = field(default_factory=threading.Event)
    """The client went away."""


class Worker:
    """The thread that owns the model."""

    def __init__(self, tuna: Pipeline, *, batch: int = 8, wait: float = 0.01, waiting: int = 256) -> None:
        """
        Args:
            batch: requests answered together.
            wait: seconds that the first of a batch waits for others.
            waiting: requests that may wait; the next one is turned away.
        """
        self.tuna, self._batch, self._wait = tuna, batch, wait
        self._jobs: queue.Queue[_Job | None] = queue.Queue(waiting)
        self.batches = 0
        """Forwards of `generate` so far."""
        self.answered = 0
        self._thread = threading.Thread(target=self._run, name="tuna", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Answer what waits, then end."""
        self._jobs.put(None)
        self._thread.join()

    def submit(self, job: _Job) -> None:
        """Raises `Overloaded` if too many wait."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Overloaded("too many requests are waiting: try again later", retry_after=1.0) from None

    @property
    def waiting(self) -> int:
        """Requests that wait now."""
        return self._jobs.qsize()

    def _run(self) -> None:
        held: _Job | None = None
        while True:
            job = held or self._jobs.get()
            held = None
            if job is None:
                return
            batch, stop = [job], False
            until = time.monotonic() + self._wait
            while not job.ask.stream and len(batch) < self._batch:
                try:
                    other = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if other is None:
                    stop = True
                    break
                if other.ask.stream or other.ask.options != job.ask.options:
                    held = other
                    break
                batch.append(other)
            self._answer(batch)
            if stop:
                return

    def _answer(self, batch: list[_Job]) -> None:
        batch = [job for job in batch if not job.gone.is_set()]
        if not batch:
            return
        self.batches += 1
        self.answered += len(batch)
        try:
            if batch[0].ask.stream:
                self._stream(batch[0])
                return
            asks = [job.ask for job in batch]
            answers = self.tuna.answers(
                [list(a.images) for a in asks], [list(a.messages) for a in asks], **dict(asks[0].options)
            )
            for job, answer in zip(batch, answers, strict=True):
                job.put(answer)
        except Exception as error:
            if not isinstance(error, TagstoreError):
                log.exception("a request failed")
            for job in batch:
                job.put(error)

    def _stream(self, job: _Job) -> None:
        prepared = self.tuna.prepare([list(job.ask.images)], [list(job.ask.messages)])
        job.put(prepared)
        with contextlib.closing(
            self.tuna.stream(
                list(job.ask.images), list(job.ask.messages), prepared=prepared, **dict(job.ask.options)
            )  # type: ignore[type-var]
        ) as pieces:
            for piece in pieces:
                if job.gone.is_set():
                    return
                job.put(piece)
        job.put(_DONE)


def app(
    tuna: Pipeline, *, name: str = "tuna", batch: int = 8, wait: float = 0.01, waiting: int = 256
) -> Starlette:
    """The ASGI application; `app.state.worker` is its worker, which lives as long as the application is served."""
    worker = Worker(tuna, batch=batch, wait=wait, waiting=waiting)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    async def completions(request: Request) -> Response:
        try:
            ask = read_request(await _body(request))
            feed: asyncio.Queue[Any] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            job = _Job(ask, partial(_pass, loop, feed))
            worker.submit(job)
            head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
            first = await feed.get()
            if isinstance(first, Exception):
                raise first
        except Overloaded as error:
            return _error(429, "overloaded", str(error), {"Retry-After": str(int(error.retry_after) or 1)})
        except InvalidInput as error:
            return _error(400, "invalid_request_error", str(error))
        except TagstoreError as error:
            return _error(503, "unavailable", str(error))
        except Exception:  # noqa: BLE001  logged where it happened
            return _error(
                500, "internal_error", "the model failed on this request; the server's log says why"
            )
        if ask.stream:
            return StreamingResponse(
                _events(feed, job, head, first),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-store"},
            )
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": first.text},
            "finish_reason": "stop" if first.finished else "length",
        }
        told = {
            "tags": [asdict(tag) for tag in first.tags],
            "store": _store(first.store, first.version),
            "degraded": first.degraded,
        }
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], **told})

    async def models(_: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "tuna"}]}
        )

    async def health(_: Request) -> Response:
        return JSONResponse(
            {
                "model": name,
                "waiting": worker.waiting,
                "answered": worker.answered,
                "batches": worker.batches,
                "degraded": tuna.lookup.degraded,
                "last_store_error": tuna.lookup.last_error,
            }
        )

    routes = [
        Route("/v1/chat/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    served = Starlette(routes=routes, lifespan=lifespan)
    served.state.worker = worker
    return served


def _pass(loop: asyncio.AbstractEventLoop, feed: asyncio.Queue[Any], item: Any) -> None:
    """From the worker's thread to a request's queue."""
    loop.call_soon_threadsafe(feed.put_nowait, item)


async def _events(
    feed: asyncio.Queue[Any], job: _Job, head: dict[str, Any], prepared: Prepared
) -> AsyncIterator[str]:
    """Server-sent events of a stream. The tags come with the first one."""
    answers = [one for one in prepared.retrievals[0] if one is not None]
    told: dict[str, Any] = {
        "tags": [asdict(tag) for tag in prepared.tags[0]],
        "store": _store(answers[0].store, answers[0].version) if answers else "",
        "degraded": prepared.degraded[0],
    }
    base = {**head, "object": "chat.completion.chunk"}

    def event(delta: dict[str, Any], finish: str | None = None, **extra: Any) -> str:
        return f"data: {json.dumps({**base, 'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish}], **extra})}\n\n"

    try:
        yield event({"role": "assistant", "content": ""}, **told)
        while (item := await feed.get()) is not _DONE:
            if isinstance(item, Exception):
                message = (
                    str(item)
                    if isinstance(item, TagstoreError)
                    else "the model failed; the server's log says why"
                )
                yield f"data: {json.dumps({'error': {'message': message, 'type': 'internal_error'}})}\n\n"
                return
            if item:
                yield event({"content": item})
        yield event({}, "stop")
        yield "data: [DONE]\n\n"
    finally:
        job.gone.set()


def read_request(body: bytes) -> Ask:
    """A chat completion's body. Raises `InvalidInput` with the field that is wrong."""
    try:
        value = json.loads(body)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the body is no JSON: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("messages"), list) or not value["messages"]:
        raise InvalidInput("messages is missing: a list of {role, content}")
    images: list[Any] = []
    messages = tuple(_message(number, message, images) for number, message in enumerate(value["messages"]))
    options: dict[str, Any] = {
        "max_new_tokens": _number(value, ("max_completion_tokens", "max_tokens"), 1, MAX_TOKENS, 64, int)
    }
    temperature = _number(value, ("temperature",), 0.0, 2.0, 0.0, float)
    if temperature > 0:
        options |= {
            "do_sample": True,
            "temperature": temperature,
            "top_p": _number(value, ("top_p",), 0.0, 1.0, 1.0, float),
        }
    if value.get("n", 1) != 1:
        raise InvalidInput("n must be 1: one answer a request")
    return Ask(tuple(images), messages, tuple(sorted(options.items())), bool(value.get("stream", False)))


def _message(number: int, message: Any, images: list[Any]) -> Message:
    where = f"messages[{number}]"
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise InvalidInput(f"{where}.role must be system, user or assistant")
    content = message.get("content")
    if isinstance(content, str):
        return {"role": message["role"], "content": [{"type": "text", "text": content}]}
    if not isinstance(content, list):
        raise InvalidInput(f"{where}.content must be a text or a list of parts")
    parts: list[dict[str, Any]] = []
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image_url":
            link = part.get("image_url")
            images.append(
                _image(link.get("url") if isinstance(link, dict) else link, f"{where}.content[{place}]")
            )
            parts.append({"type": "image"})
        else:
            raise InvalidInput(f"{where}.content[{place}] must be of type text or image_url")
    return {"role": message["role"], "content": parts}


def _image(url: Any, where: str) -> Any:
    """A picture of a data: URL. Others are refused: a server that fetches what strangers name reaches places that they cannot."""
    if not isinstance(url, str) or not url.startswith("data:"):
        raise InvalidInput(
            f"{where}: give the picture as data:image/jpeg;base64,...; addresses are not fetched"
        )
    try:
        return decode(base64.b64decode(url.partition(",")[2], validate=True))
    except binascii.Error as error:
        raise InvalidInput(f"{where}: what follows the comma is no base64") from error
    except BadImage as error:
        raise InvalidInput(f"{where}: {error}") from error


def _number(
    value: dict[str, Any], names: tuple[str, ...], low: float, high: float, default: Any, kind: type
) -> Any:
    for name in names:
        given = value.get(name)
        if given is None:
            continue
        if isinstance(given, bool) or not isinstance(given, int | float) or not low <= given <= high:
            raise InvalidInput(f"{name} is {given!r}: a number from {low:g} to {high:g}")
        return kind(given)
    return default


async def _body(request: Request) -> bytes:
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise InvalidInput(f"the body is larger than {MAX_BODY >> 20} MiB: send smaller pictures")
    return data


def _store(store: str, version: int) -> str:
    return f"{store}@{version}" if store else ""


def _error(status: int, kind: str, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)
