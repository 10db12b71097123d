"""The proxy: every request goes to its upstream and every answer comes back as it is, byte for byte.

Only requests of `apis.APIS` with pictures are changed, by `Tagger`. Under /tuna are /health and /metrics.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tagstore.errors import InvalidInput, TagstoreError
from tuna_model.proxy.apis import APIS
from tuna_model.proxy.metrics import Metrics
from tuna_model.proxy.settings import ProxySettings
from tuna_model.proxy.tagger import UNTOUCHED, Tagged, Tagger
from tuna_model.serving.bodies import BODY_SECONDS, MAX_BODY, Bodies
from tuna_model.serving.callers import unless_gone
from tuna_model.serving.refusals import Refused, error_response

CONNECT_SECONDS = 10.0
"""Seconds in which an upstream must accept a connection."""
MAX_TAGS_HEADER = 4000
"""Characters of the header with the tags; those that do not fit are left out of it."""
_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te",
     "trailer", "transfer-encoding", "upgrade")
)  # fmt: skip
"""Headers that speak of one connection (RFC 9110, 7.6.1)."""
_OURS = ("x-tuna-store", "x-tuna-fields")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def app(settings: ProxySettings, *, body_seconds: float = BODY_SECONDS) -> Starlette:
    """The ASGI application. Raises `InvalidInput` for a store's URL that means nothing."""
    proxy = Proxy(settings, body_seconds)
    served = Starlette(
        routes=[
            Route("/tuna/health", proxy.health),
            Route("/tuna/metrics", proxy.metrics_text),
            Route("/{path:path}", proxy.forward, methods=list(_METHODS)),
        ],
        lifespan=lambda _: proxy.running(),
    )
    served.state.proxy = proxy
    return served


class Proxy:
    """Forwards requests, with tags where there are pictures."""

    def __init__(self, settings: ProxySettings, body_seconds: float) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.tagger = Tagger(settings)
        self._bodies = Bodies(body_seconds)
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(settings.upstream_timeout, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            follow_redirects=False,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self._client.aclose()
            await self.tagger.close()

    async def health(self, _: Request) -> Response:
        settings = self.settings
        return JSONResponse(
            {"upstreams": [upstream.url for upstream in settings.upstreams], "stores": list(settings.stores)}
        )

    async def metrics_text(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def forward(self, request: Request) -> Response:
        """Answer one request."""
        self.metrics.open.inc()
        streams = False
        try:
            response = await self._answered(request)
            streams = isinstance(response, StreamingResponse)
            return response
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        except httpx.HTTPError as error:
            self.metrics.failures.inc()
            return _upstream_failed(error)
        except TagstoreError as error:
            return error_response(error)
        finally:
            if not streams:
                self.metrics.open.dec()

    async def _answered(self, request: Request) -> Response:
        path = request.url.path.removeprefix("/v1")
        api = APIS.get(path) if request.method == "POST" else None
        if api is None:
            return await self._sent(request, request.stream(), self.settings.upstreams[0].url, UNTOUCHED)
        store = request.headers.get("x-tuna-store", "")
        if store and store not in self.settings.stores:
            raise Refused(
                f"X-Tuna-Store: there is no store '{store[:100]}' here: there are "
                f"{', '.join(self.settings.stores)}"
            )
        async with self._bodies.read(request) as body:
            start = time.perf_counter()
            model, new, tagged = await unless_gone(request, self._tagged(body, api, store))
            self.metrics.tagging.observe(time.perf_counter() - start)
            upstream = self.settings.upstream_of(model).url
            return await unless_gone(request, self._sent(request, new, upstream, tagged))

    async def _tagged(self, body: bytes, api: Any, store: str) -> tuple[str, bytes, Tagged]:
        """The model that a body names, the body to forward, and what was done to it."""
        new, tagged = await self.tagger.tag_body(body, api, store)
        outcome = "degraded" if tagged.degraded else "tagged" if tagged.fields is not None else "untouched"
        self.metrics.requests.labels(outcome).inc()
        if tagged.degraded:
            self.metrics.degraded.labels(tagged.degraded).inc()
        return _model_of(body) if len(self.settings.upstreams) > 1 else "", new, tagged

    async def _sent(self, request: Request, content: Any, upstream: str, tagged: Tagged) -> Response:
        """Send a request on; the answer comes as the upstream gives it, with our headers."""
        path = request.scope.get("raw_path", request.url.path.encode()).partition(b"?")[0].decode("ascii")
        query = f"?{request.url.query}" if request.url.query else ""
        url = httpx.URL(upstream + path.removeprefix("/v1") + query)
        given = [(name, value) for name, value in request.headers.items() if name not in ("host", *_OURS)]
        if isinstance(content, bytes):
            given = [(name, value) for name, value in given if name != "content-length"]
        elif "content-length" not in request.headers and "transfer-encoding" not in request.headers:
            content = b""
        headers = _end_to_end(given)
        sent = httpx.Request(request.method, url, headers=headers, content=content)
        start = time.perf_counter()
        answer = await self._client.send(sent, stream=True)
        self.metrics.upstream.observe(time.perf_counter() - start)
        ours = _about(tagged)
        if request.headers.get("x-tuna-fields") and _is_json(answer):
            return await _with_fields(answer, tagged, ours)
        response = StreamingResponse(_pieces(answer, self.metrics.open.dec), answer.status_code)
        response.raw_headers = [
            (name, value)
            for name, value in answer.headers.raw
            if name.lower().decode("latin-1") not in _HOP_BY_HOP
        ] + [(name.encode(), value.encode("latin-1")) for name, value in ours.items()]
        return response


async def _pieces(answer: httpx.Response, ended: Callable[[], object]) -> AsyncIterator[bytes]:
    """The body of an answer as it comes; the upstream learns when nobody reads on."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        ended()
        await answer.aclose()


async def _with_fields(answer: httpx.Response, tagged: Tagged, ours: dict[str, str]) -> Response:
    """An answer with tags, store and whether it is degraded as fields of its JSON."""
    try:
        body = bytearray()
        async for piece in answer.aiter_bytes():
            body += piece
            if len(body) > MAX_BODY:
                raise InvalidInput(f"the answer is larger than {MAX_BODY >> 20} MiB: leave X-Tuna-Fields out")
    finally:
        await answer.aclose()
    fields = json.loads(body)
    if isinstance(fields, dict):
        fields |= {"tags": list(tagged.tags), "store": tagged.store, "degraded": bool(tagged.degraded)}
    return JSONResponse(fields, answer.status_code, ours)


def _is_json(answer: httpx.Response) -> bool:
    kind: str = answer.headers.get("content-type", "")
    return answer.status_code == 200 and kind.startswith("application/json")


def _about(tagged: Tagged) -> dict[str, str]:
    """The headers that say what was done."""
    headers = {}
    if tagged.fields is not None:
        tags = list(tagged.tags)
        while len(text := json.dumps(tags)) > MAX_TAGS_HEADER:
            tags.pop()
        headers = {"x-tuna-tags": text, "x-tuna-store": tagged.store.encode("ascii", "replace").decode()}
    if tagged.degraded:
        headers["x-tuna-degraded"] = tagged.degraded
    return headers


def _end_to_end(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Headers that are not about one connection."""
    given = list(headers)
    named = {
        part.strip().lower() for name, value in given if name == "connection" for part in value.split(",")
    }
    return [(name, value) for name, value in given if name not in _HOP_BY_HOP | named]


def _model_of(body: bytes) -> str:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    return str(fields.get("model", "")) if isinstance(fields, dict) else ""


def _upstream_failed(error: httpx.HTTPError) -> Response:
    late = isinstance(error, httpx.TimeoutException)
    message = f"the upstream {'did not answer in time' if late else 'cannot be reached'}"
    value = {"message": message, "type": "upstream_error", "param": None, "code": None}
    return JSONResponse({"error": value}, 504 if late else 502)
