"""Messages that cannot be parsed are the caller's mistake, and told so by us.

gRPC would answer them with INTERNAL, and of a stream it would send two statuses, of which the second never ends: the call would be in hand
for ever, and the server could not drain (grpcio 1.85, found by `benchmarks/fuzz.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from google.protobuf.message import DecodeError

from tagstore.errors import InvalidInput


class Malformed:
    """In the place of a request."""

    store = ""

    def __init__(self, error: DecodeError) -> None:
        self.error = InvalidInput(f"the message cannot be parsed: {error}")


def parsed(request: Any) -> Any:
    """The request itself. Raises `InvalidInput` for one that could not be parsed."""
    if isinstance(request, Malformed):
        raise request.error
    return request


class Registrar:
    """Stands in for a server where generated code adds its handlers, which get parsers that do not fail.

    Args:
        server: the real one.
        pool: threads for methods that stream.
        long: whether all methods take long, and are for that pool.
    """

    def __init__(self, server: Any, pool: Any, *, long: bool = False) -> None:
        self._server, self._pool, self._long = server, pool, long

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Not needed: methods are registered by name."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        safe = {name: self._prepared(handler) for name, handler in handlers.items()}
        self._server.add_registered_method_handlers(service, safe)

    def _prepared(self, handler: Any) -> Any:
        handler = handler._replace(request_deserializer=_safe(handler.request_deserializer))
        if not (self._long or handler.response_streaming):
            return handler
        kind = next(name for name in ("unary_unary", "unary_stream", "stream_unary", "stream_stream") if getattr(handler, name))
        behaviour = partial(getattr(handler, kind))
        behaviour.experimental_thread_pool = self._pool  # type: ignore[attr-defined]  # gRPC's own name for it
        return handler._replace(**{kind: behaviour})


def _safe(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse_or_tell(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            return Malformed(error)

    return parse_or_tell
