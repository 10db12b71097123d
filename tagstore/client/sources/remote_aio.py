"""Stores behind servers, asked over grpc.aio; and other backends, asked in threads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from tagstore.client.backend import Backend
from tagstore.client.forks import PerProcess, hold_forks
from tagstore.client.options import Options
from tagstore.client.queries import QueryBatch
from tagstore.client.resilience import Attempt, Attempts, Balancer
from tagstore.client.sources.remote import AttemptResult, RemoteCall, RemoteCalls
from tagstore.client.stats import Counters
from tagstore.client.urls import Location
from tagstore.errors import Unavailable
from tagstore.types import Retrieval, StoreInfo, TagInfo
from tagstore_proto.v1 import tagstore_pb2_grpc


class ThreadedBackend:
    """A blocking backend, each call in a thread."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def retrieve(self, batch: QueryBatch) -> list[Retrieval]:
        return await asyncio.to_thread(self._backend.retrieve, batch)

    async def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        return await asyncio.to_thread(self._backend.tags, tag_ids, version, embeddings)

    async def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        return await asyncio.to_thread(self._backend.page, first, version, embeddings)

    async def info(self, version: int) -> StoreInfo:
        return await asyncio.to_thread(self._backend.info, version)

    def health(self) -> dict[str, str]:
        return self._backend.health()

    async def close(self) -> None:
        await asyncio.to_thread(self._backend.close)


class RemoteAioBackend(RemoteCalls):
    """Answers of a server over grpc.aio. A channel belongs to the event loop that uses it and its process."""

    def __init__(self, location: Location, options: Options, counters: Counters) -> None:
        super().__init__(location, options, counters)
        self._balancer = PerProcess(lambda: Balancer(location.addresses, options))
        self._owner: tuple[int, int] = (0, 0)
        self._channels: dict[str, tuple[Any, Any]] = {}

    async def retrieve(self, batch: QueryBatch) -> list[Retrieval]:
        answers: list[Retrieval] = await self._answer(self.retrieve_call(batch))
        return answers

    async def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        tags: tuple[list[TagInfo], int] = await self._answer(self.tags_call(tag_ids, version, embeddings))
        return tags

    async def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        page: tuple[list[TagInfo], int, int] = await self._answer(self.page_call(first, version, embeddings))
        return page

    async def info(self, version: int) -> StoreInfo:
        info: StoreInfo = await self._answer(self.info_call(version))
        return info

    def health(self) -> dict[str, str]:
        return self._balancer.get().health()

    async def close(self) -> None:
        channels, self._channels = self._channels, {}
        if self._owner == _process_and_loop():
            for channel, _ in channels.values():
                await channel.close()

    async def _answer(self, call: RemoteCall) -> Any:
        attempts, attempt = self.first_attempt(self._balancer.get(), call.insist)
        while True:
            if attempt.wait:
                await asyncio.sleep(attempt.wait)
            attempt, answer, error = await self._send_hedged(attempts, attempt, call)
            if error is None:
                attempts.succeeded(attempt)
                return answer
            attempt = attempts.failed(attempt, error)
            self.counters.add(retries=1)

    async def _send_hedged(self, attempts: Attempts, first: Attempt, call: RemoteCall) -> AttemptResult:
        """Send an attempt, and a second one if it is slow and hedging is on; the slower one is cancelled."""
        tasks = {asyncio.create_task(self._send(first, call)): first}
        try:
            if self.options.hedge:
                done, _ = await asyncio.wait(tasks, timeout=min(self.options.hedge, first.timeout))
                second = None if done else attempts.elsewhere(first.endpoint)
                if second is not None:
                    self.counters.add(hedges=1)
                    tasks[asyncio.create_task(self._send(second, call))] = second
            while True:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                task = done.pop()
                del tasks[task]
                attempt, answer, error = task.result()
                if not (tasks and isinstance(error, Unavailable)):
                    return attempt, answer, error
                attempt.endpoint.breaker.failed()
                attempts.abandoned(attempt)
        finally:
            for task, attempt in tasks.items():
                task.cancel()
                attempts.abandoned(attempt)

    async def _send(self, attempt: Attempt, call: RemoteCall) -> AttemptResult:
        self.counters.add(requests=1)
        method = getattr(self._stub(attempt.endpoint.address), call.method)
        try:
            response = await method(call.request, timeout=attempt.timeout, metadata=self.channels.metadata)
        except grpc.RpcError as error:
            return attempt, None, self.failure(error, attempt)
        return self.decoded(call, attempt, response)

    def _stub(self, address: str) -> Any:
        owner = _process_and_loop()
        if self._owner != owner:
            # channels of another loop, or of the process that this one was forked from, are left alone
            self._owner, self._channels = owner, {}
        if address not in self._channels:
            channel = hold_forks(
                self.channels.open, address, grpc.aio.insecure_channel, grpc.aio.secure_channel
            )
            self._channels[address] = (channel, tagstore_pb2_grpc.TagStoreStub(channel))
        return self._channels[address][1]


def _process_and_loop() -> tuple[int, int]:
    return os.getpid(), id(asyncio.get_running_loop())
