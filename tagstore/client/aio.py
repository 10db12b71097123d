"""The asyncio face: the same sources, options and answers, awaited.

    from tagstore.client import aio

    async with aio.connect("grpc://localhost:50051/flickr8k") as source:
        [answer] = await source.retrieve(["photo.jpg"])

Servers are asked over grpc.aio; everything else (directories, maps) answers in a thread.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from tagstore.client import connecting
from tagstore.client.forks import calling
from tagstore.client.options import ConnectOptions, SearchOptions
from tagstore.client.queries import Ask, Image
from tagstore.client.resilience import Attempt, Attempts
from tagstore.client.source import Flow, Flows, Pin, Source
from tagstore.client.sources.remote import RemoteBackend, Wire
from tagstore.errors import TagstoreError, Unavailable
from tagstore.types import Fingerprint, Identity, Retrieval, StoreInfo, TagInfo


def connect(url: str, **options: Unpack[ConnectOptions]) -> AsyncSource:
    """As `tagstore.client.connect`."""
    return _awaited(connecting.connect(url, **options))


def _awaited(source: Source) -> AsyncSource:
    backend = source.backend
    inner = AioBackend(backend.wire) if isinstance(backend, RemoteBackend) else Threaded(backend)
    return AsyncSource(source.url, source.location, source.options, source.counters, inner)


class AsyncSource(Flows):
    """A tag source that is awaited. Methods as those of `TagSource`."""

    async def retrieve(
        self,
        images: Sequence[Image] = (),
        *,
        vectors: NDArray[np.floating] | None = None,
        captions: Sequence[str] = (),
        fingerprint: Fingerprint | str = "",
        keys: Sequence[str] = (),
        identities: Sequence[Identity] = (),
        **options: Unpack[SearchOptions],
    ) -> list[Retrieval]:
        """See `TagSource.retrieve`."""
        answers: list[Retrieval] = await self._run(
            self._retrieving(images, vectors, captions, fingerprint, keys, identities, options)
        )
        return answers

    async def tags(self, tag_ids: Sequence[int], *, embeddings: bool = False) -> list[TagInfo]:
        """See `TagSource.tags`."""
        found: list[TagInfo] = await self._run(self._tags(tag_ids, embeddings, self._version))
        return found

    async def embeddings(self, answer: Retrieval) -> NDArray[np.float32]:
        """See `TagSource.embeddings`."""
        rows: NDArray[np.float32] = await self._run(self._embeddings_of(answer))
        return rows

    async def vocabulary(self, *, embeddings: bool = False) -> AsyncIterator[TagInfo]:
        """See `TagSource.vocabulary`."""
        first, version = 0, self._version
        while True:
            tags, first, version = await self.backend.page(first, version, embeddings)
            for tag in tags:
                yield tag
            if not first:
                return

    async def info(self) -> StoreInfo:
        """See `TagSource.info`."""
        info: StoreInfo = await self.backend.info(self._version)
        return info

    async def pin(self, version: int = 0) -> Pin:
        """See `TagSource.pin`."""
        pin: Pin = await self._run(self._pinning(version))
        return pin

    async def close(self) -> None:
        """See `TagSource.close`."""
        await self.backend.close()
        self._close_cache()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(_awaited(connecting.reconnect(**state)).__dict__)

    async def _run(self, flow: Flow) -> Any:
        try:
            name, arguments = next(flow)
            while True:
                try:
                    result = await getattr(self.backend, name)(*arguments)
                except TagstoreError as error:
                    name, arguments = flow.throw(error)
                else:
                    name, arguments = flow.send(result)
        except StopIteration as end:
            return end.value


class Threaded:
    """A blocking backend, each call in a thread."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    async def retrieve(self, ask: Ask) -> list[Retrieval]:
        return await asyncio.to_thread(self._backend.retrieve, ask)

    async def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        return await asyncio.to_thread(self._backend.tags, tag_ids, version, embeddings)

    async def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        return await asyncio.to_thread(self._backend.page, first, version, embeddings)

    async def info(self, version: int) -> StoreInfo:
        return await asyncio.to_thread(self._backend.info, version)

    def health(self) -> dict[str, str]:
        return {}

    async def close(self) -> None:
        await asyncio.to_thread(self._backend.close)


class AioBackend:
    """Answers of a server over grpc.aio. Channels belong to the event loop that uses them, and to its process."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._owner: tuple[int, int] = (0, 0)
        self._channels: dict[str, tuple[Any, Any]] = {}

    async def retrieve(self, ask: Ask) -> list[Retrieval]:
        from tagstore.wire import convert

        return convert.retrievals_from_proto(await self._call("Retrieve", self.wire.retrieve_request(ask)))

    async def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        from tagstore.wire import convert

        response = await self._call(
            "GetTags", self.wire.tags_request(version, tag_ids=tag_ids, embeddings=embeddings)
        )
        return convert.tags_from_proto(response), response.version

    async def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        from tagstore.wire import convert

        response = await self._call(
            "GetTags", self.wire.tags_request(version, first_tag_id=first, embeddings=embeddings)
        )
        return convert.tags_from_proto(response), response.next_tag_id, response.version

    async def info(self, version: int) -> StoreInfo:
        from tagstore.wire import convert

        return convert.info_from_proto((await self._call("GetStore", self.wire.info_request(version))).store)

    def health(self) -> dict[str, str]:
        return {e.address: e.breaker.state for e in self.wire.balancer.endpoints}

    async def close(self) -> None:
        channels, self._channels = self._channels, {}
        if self._owner == self._here():
            for channel, _ in channels.values():
                await channel.close()

    async def _call(self, method: str, request: Any) -> Any:
        attempts = Attempts(self.wire.balancer)
        try:
            attempt = attempts.first()
        except Unavailable:
            self.wire.counters.add(skipped=1)
            raise
        while True:
            if attempt.wait:
                await asyncio.sleep(attempt.wait)
            attempt, answer, error = await self._tried(attempts, attempt, method, request)
            if error is None:
                attempts.succeeded(attempt)
                return answer
            attempt = attempts.failed(attempt, error)
            self.wire.counters.add(retries=1)

    async def _tried(
        self, attempts: Attempts, first: Attempt, method: str, request: Any
    ) -> tuple[Attempt, Any, TagstoreError | None]:
        """The outcome of a try, or of two where the first is slow and hedging is on; whoever is slower is cancelled."""
        tries = {asyncio.create_task(self._send(first, method, request)): first}
        try:
            if self.wire.options.hedge:
                done, _ = await asyncio.wait(tries, timeout=min(self.wire.options.hedge, first.timeout))
                second = None if done else attempts.another(first.endpoint)
                if second is not None:
                    self.wire.counters.add(hedges=1)
                    tries[asyncio.create_task(self._send(second, method, request))] = second
            while True:
                done, _ = await asyncio.wait(tries, return_when=asyncio.FIRST_COMPLETED)
                task = done.pop()
                attempt, (answer, error) = tries.pop(task), task.result()
                if not (tries and isinstance(error, Unavailable)):
                    return attempt, answer, error
                attempt.endpoint.breaker.failed()
                attempts.abandoned(attempt)
        finally:
            for task, attempt in tries.items():
                task.cancel()
                attempts.abandoned(attempt)

    async def _send(self, attempt: Attempt, method: str, request: Any) -> tuple[Any, TagstoreError | None]:
        import grpc

        self.wire.counters.add(requests=1)
        stub = self._stub(attempt.endpoint.address)
        try:
            return await getattr(stub, method)(
                request, timeout=attempt.timeout, metadata=self.wire.metadata
            ), None
        except grpc.RpcError as error:
            return None, self.wire.error(error, attempt)

    def _stub(self, address: str) -> Any:
        import grpc.aio

        from tagstore_proto.v1 import tagstore_pb2_grpc

        if self._owner != self._here():
            # channels of another loop or of the process that this one was forked from are left alone
            self._owner, self._channels = self._here(), {}
        if address not in self._channels:
            with calling():
                channel = self.wire.channel(address, grpc.aio.insecure_channel, grpc.aio.secure_channel)
                self._channels[address] = (channel, tagstore_pb2_grpc.TagStoreStub(channel))
        return self._channels[address][1]

    @staticmethod
    def _here() -> tuple[int, int]:
        return os.getpid(), id(asyncio.get_running_loop())
