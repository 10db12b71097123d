"""The port for machines that watch a server: `/metrics`, `/healthz` and `/readyz`, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from socket import AF_INET, AF_INET6
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app
from prometheus_client.multiprocess import MultiProcessCollector

from tagstore.errors import Unavailable

REQUEST_SECONDS = 10.0
"""Seconds after which a connection that sends nothing is closed."""
JSON = ("Content-Type", "application/json")


@dataclass(frozen=True, slots=True)
class State:
    """How far a server is."""

    ready: bool
    """Whether its stores are open and their encoders loaded."""
    phase: str
    """"opening stores", "loading encoders", "serving" or "stopping"."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """What is wrong with each store that is left out."""


def serve(address: str, state: Callable[[], State], directory: str = "") -> tuple[Callable[[], None], int]:
    """Answer probes at `HOST:PORT` in threads, with the metrics of this process, or of all in a directory.

    `/healthz` answers 200 while the process lives, `/readyz` and `/ready` 200 or 503 with the state as JSON,
    any other path 404.

    Returns a function that stops it, and the port. Raises `Unavailable` if the address is taken.
    """
    host, _, port = address.rpartition(":")
    registry: Any = REGISTRY
    if directory:
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=directory)
    prometheus: Any = make_wsgi_app(registry)

    def answer(environ: Mapping[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return prometheus(environ, start)  # type: ignore[no-any-return]
        if path == "/healthz":
            start("200 OK", [JSON])
            return [b'{"alive": true}\n']
        if path in ("/readyz", "/ready"):
            now = state()
            start("200 OK" if now.ready else "503 Service Unavailable", [JSON])
            details = {"ready": now.ready, "phase": now.phase, "damaged": dict(now.damaged)}
            return [json.dumps(details, ensure_ascii=False).encode() + b"\n"]
        start("404 Not Found", [JSON])
        return [b'{"error": "there are /metrics, /healthz and /readyz"}\n']

    try:
        server = make_server(host.strip("[]"), int(port), answer, _server(host), _Handler)
    except OSError as error:
        raise Unavailable(f"cannot serve metrics at {address}: {error.strerror}") from error
    thread = Thread(target=server.serve_forever, name="rpc-probes", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop, server.server_port


def _server(host: str) -> type[WSGIServer]:
    class Threads(ThreadingMixIn, WSGIServer):
        daemon_threads = True
        address_family = AF_INET6 if ":" in host else AF_INET

    return Threads


class _Handler(WSGIRequestHandler):
    """Requests without a line in the log."""

    timeout = REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Do nothing."""
