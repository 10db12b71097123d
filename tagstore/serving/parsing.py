"""Messages that cannot be parsed are the caller's mistake, and told so by us.

gRPC would answer them with INTERNAL, and of a stream it would send two statuses, of which the second never ends: the call would be in hand
for ever, and the server could not drain (grpcio 1.85, found by `benchmarks/fuzz.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """Stands in for a server where generated code adds its handlers, which get parsers that do not fail."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Not needed: methods are registered by name."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        safe = {name: handler._replace(request_deserializer=_safe(handler.request_deserializer)) for name, handler in handlers.items()}
        self._server.add_registered_method_handlers(service, safe)


def _safe(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse_or_tell(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            return Malformed(error)

    return parse_or_tell
