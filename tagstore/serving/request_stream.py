"""The requests of a stream: read ahead, started at once, and answered in their order."""

from __future__ import annotations

import asyncio
from typing import Protocol

from tagstore.serving import metrics
from tagstore.serving.call import Call
from tagstore.serving.gate import public_error
from tagstore.wire.bounds import bounded
from tagstore.wire.status import error_to_proto
from tagstore_proto.v1 import tagstore_pb2 as pb

WINDOW = 64
"""Requests of a stream that are read before the first of them is answered."""
WINDOW_NEIGHBOURS = 1 << 14
"""Neighbours that they may ask for together, since their answers wait in memory for the client."""
parse_request = bounded("RetrieveStream", pb.RetrieveRequest.FromString)


class Answerer(Protocol):
    """Answers requests; `TagStoreService` does."""

    def start(self, request: pb.RetrieveRequest, call: Call, *, streamed: bool) -> asyncio.Future[bytes]:
        """Begin to answer a request. Raises the errors of the first checks."""


class StreamedRequest:
    """A request of a stream, which is answered also if it fails."""

    def __init__(self, data: bytes, call: Call) -> None:
        self._call, self._store = call, ""
        self._request: pb.RetrieveRequest | None = None
        self._future: asyncio.Future[bytes] | None = None
        self._error: Exception | None = None
        self.neighbours = 0
        """Neighbours that it asks for, at most."""
        try:
            self._request = request = parse_request(data)
            bytes_a_row = 2 * max(1, request.vectors.dimension)
            rows = len(request.images) + len(request.texts) + len(request.vectors.data) // bytes_a_row
            self.neighbours = rows * (request.k if request.HasField("k") else 1)
        except Exception as error:  # noqa: BLE001  `answer` reports it
            self._error = error

    def start(self, answerer: Answerer) -> None:
        """Begin to answer it."""
        if self._request is None:
            return
        try:
            self._call.caller.check("read", self._request.store)
            self._store = self._request.store
            self._future = answerer.start(self._request, self._call, streamed=True)
        except Exception as error:  # noqa: BLE001  `answer` reports it
            self._error = error
        self._request = None

    async def answer(self) -> bytes:
        code, store = "OK", self._store
        try:
            if self._error is not None:
                raise self._error
            assert self._future is not None
            return await self._future
        except Exception as error:  # noqa: BLE001  the answer reports it and the stream goes on
            failure = public_error(error, "RetrieveStream")
            code, store = type(failure).__name__, ""
            data: bytes = pb.RetrieveStreamResponse(error=error_to_proto(failure)).SerializeToString()
            return data
        finally:
            self._error = None
            metrics.child(metrics.REQUESTS, "RetrieveStream", store, code).inc()

    def cancel(self) -> None:
        if self._future is not None:
            self._future.cancel()


class Window:
    """Requests of a stream that were read and are not yet answered, in order."""

    def __init__(self) -> None:
        self._requests: asyncio.Queue[StreamedRequest | None] = asyncio.Queue()
        self._count = self._neighbours = 0
        self._room = asyncio.Event()

    async def enter(self, request: StreamedRequest) -> None:
        """Wait until there is room for a request, and add it."""
        while self._count and (
            self._count >= WINDOW or self._neighbours + request.neighbours > WINDOW_NEIGHBOURS
        ):
            self._room.clear()
            await self._room.wait()
        self._count += 1
        self._neighbours += request.neighbours
        self._requests.put_nowait(request)

    def end(self) -> None:
        """Note that no more requests come."""
        self._requests.put_nowait(None)

    async def next(self) -> StreamedRequest | None:
        """Wait for the next request; None after the last one."""
        return await self._requests.get()

    def answered(self, request: StreamedRequest) -> None:
        """Note that the client has taken the answer to a request."""
        self._count -= 1
        self._neighbours -= request.neighbours
        self._room.set()

    def cancel(self) -> None:
        """Cancel all requests."""
        while not self._requests.empty():
            request = self._requests.get_nowait()
            if request is not None:
                request.cancel()
