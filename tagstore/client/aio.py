"""The asyncio client: the same sources, options and answers, awaited.

    from tagstore.client import aio

    async with aio.connect("grpc://localhost:50051/flickr8k") as source:
        [answer] = await source.retrieve(["photo.jpg"])

Servers are asked over grpc.aio; directories, maps and controls answer in a thread.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from tagstore.client import connecting
from tagstore.client.options import ConnectOptions, Options, SearchOptions
from tagstore.client.queries import Image
from tagstore.client.source import BackendCalls, BaseSource, Source
from tagstore.client.tag_source import Pin
from tagstore.client.urls import Location
from tagstore.errors import TagstoreError
from tagstore.types import Fingerprint, Identity, Retrieval, StoreInfo, TagInfo


def connect(url: str, **options: Unpack[ConnectOptions]) -> AsyncSource:
    """Connect as `tagstore.client.connect` does."""
    return _awaited(connecting.connect(url, **options))


def _reconnect(url: str, location: Location, options: Options, counters: str) -> AsyncSource:
    return _awaited(connecting.reconnect(url, location, options, counters))


def _awaited(source: Source) -> AsyncSource:
    from tagstore.client.sources.remote import RemoteBackend
    from tagstore.client.sources.remote_aio import RemoteAioBackend, ThreadedBackend

    location, options, counters = source.location, source.options, source.counters
    backend = (
        RemoteAioBackend(location, options, counters)
        if isinstance(source.backend, RemoteBackend)
        else ThreadedBackend(source.backend)
    )
    return AsyncSource(source.url, location, options, counters, backend, _reconnect)


class AsyncSource(BaseSource):
    """A tag source that is awaited. Its methods are those of `TagSource`."""

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
        answers: list[Retrieval] = await self._run(
            self._retrieve_calls(images, vectors, captions, fingerprint, keys, identities, options)
        )
        return answers

    async def tags(self, tag_ids: Sequence[int], *, embeddings: bool = False) -> list[TagInfo]:
        tags: list[TagInfo] = await self._run(self._tags_calls(tag_ids, embeddings, self._version))
        return tags

    async def embeddings(self, answer: Retrieval) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = await self._run(self._embedding_calls(answer))
        return rows

    async def vocabulary(self, *, embeddings: bool = False) -> AsyncIterator[TagInfo]:
        first, version = 0, self._version
        while True:
            tags, first, version = await self.backend.page(first, version, embeddings)
            for tag in tags:
                yield tag
            if not first:
                return

    async def info(self) -> StoreInfo:
        info: StoreInfo = await self.backend.info(self._version)
        return info

    async def pin(self, version: int = 0) -> Pin:
        pin: Pin = await self._run(self._pin_calls(version))
        return pin

    async def close(self) -> None:
        await self.backend.close()
        self._close_cache()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, calls: BackendCalls) -> Any:
        try:
            method, arguments = next(calls)
            while True:
                try:
                    result = await getattr(self.backend, method)(*arguments)
                except TagstoreError as error:
                    method, arguments = calls.throw(error)
                else:
                    method, arguments = calls.send(result)
        except StopIteration as end:
            return end.value
