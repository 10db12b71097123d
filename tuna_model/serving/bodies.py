"""Bodies of requests, read within bounds of size, time and memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request

from tagstore.errors import InvalidInput, Overloaded, TimedOut

MAX_BODY = 32 << 20
"""Bytes of a request's body, at most."""
MAX_BODIES = 256 << 20
"""Bytes of all bodies that are being read, at most."""
BODY_SECONDS = 30.0
"""Seconds in which a body must arrive."""


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
