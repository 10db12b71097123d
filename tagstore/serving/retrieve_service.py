"""The servicer that answers queries from a catalog.

A request becomes a `Lookup`: checked, embedded, its version open. A queue searches several of them at once,
and each is answered with a message in bytes. `serving.methods` handles access, limits and errors.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor

from tagstore import errors
from tagstore.retrieval.engine import MAX_QUERIES, Engine, Query
from tagstore.retrieval.tag_votes import Neighbours
from tagstore.serving import metrics, tracing
from tagstore.serving.batch_queue import BatchQueue
from tagstore.serving.call import Call
from tagstore.serving.embed_queue import CallEncoder, EmbedQueue
from tagstore.serving.live_catalog import LiveCatalog
from tagstore.serving.lookup import Lookup
from tagstore.serving.methods import answering, in_thread, streaming
from tagstore.serving.request_stream import StreamedRequest, Window
from tagstore.serving.settings import Limits
from tagstore.wire import convert
from tagstore_proto.v1 import tagstore_pb2 as pb

MAX_PAGE_TAGS = 10_000
"""Largest number of tags in one answer of `GetTags`."""
OPEN_RETRIES = 4
"""Times that a call waits for another call to open a version, before it opens the version itself."""
SEARCH_ROWS = 256
"""Largest number of queries in one search."""


class TagStoreService:
    """`tagstore.v1.TagStore` over a catalog.

    Args:
        threads: run what would block the event loop: decoding, embedding, opening versions.
        loop: event loop that runs the rest.
        searchers: number of searches that run at a time.
        alone: tells whether the loop has nothing else to do.
    """

    def __init__(
        self,
        catalog: LiveCatalog,
        limits: Limits,
        threads: Executor,
        loop: asyncio.AbstractEventLoop,
        *,
        searchers: int,
        alone: Callable[[], bool],
    ) -> None:
        self._catalog, self._limits, self._threads = catalog, limits, threads
        self.searches: BatchQueue[Lookup, tuple[Query, list[Neighbours]], bytes] = BatchQueue(
            "search",
            Lookup.find,
            Lookup.answer,
            loop,
            stages=("search", "tags"),
            rows=SEARCH_ROWS,
            threads=searchers,
            max_wait=limits.search_wait,
            spare=limits.search_queue,
            inline=limits.search_inline,
            alone=alone,
        )
        self.embeddings = EmbedQueue(loop, limits)
        self._opening: dict[tuple[str, int], asyncio.Future[Engine]] = {}
        self._engines: dict[tuple[str, int], Engine] = {}
        """Versions that were looked up in the current turn of the loop."""

    def close(self) -> None:
        """Let the queues' threads end."""
        self.searches.close()
        self.embeddings.close()

    @answering("read")
    async def Retrieve(self, request: pb.RetrieveRequest, call: Call) -> bytes:  # noqa: N802
        try:
            return await self.start(request, call, streamed=False)
        except asyncio.CancelledError:
            self.searches.sweep()
            raise

    @streaming("read", parses=True)
    async def RetrieveStream(  # noqa: N802
        self, requests: AsyncIterator[bytes], call: Call, send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        window = Window()

        async def read() -> None:
            try:
                async for data in requests:
                    request = StreamedRequest(data, call)
                    await window.enter(request)
                    request.start(self)
            finally:
                window.end()

        reader = asyncio.create_task(read())
        try:
            while (request := await window.next()) is not None:
                await send(await request.answer())
                window.answered(request)
            await reader
        finally:
            reader.cancel()
            window.cancel()
            self.searches.sweep()

    def start(self, request: pb.RetrieveRequest, call: Call, *, streamed: bool) -> asyncio.Future[bytes]:
        """Begin to answer a request with a message in bytes. Raises the errors of the first checks."""
        check_sizes(request, self._limits)
        engine = self._current_engine(request.store, request.version)
        if engine is None or request.images or request.texts:
            return asyncio.ensure_future(self._prepared(engine, request, call, streamed))
        search = convert.search_from_proto(request)
        vectors, identities = convert.queries_from_proto(request, engine.fingerprint.dimension)
        query = engine.query(vectors, search, identities, request.fingerprint)
        return self._submit(query, call, streamed)

    def _submit(self, query: Query, call: Call, streamed: bool) -> asyncio.Future[bytes]:
        lookup, rows = Lookup(query, streamed, self._limits.message_bytes), len(query.vectors)
        if not rows:
            empty: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            empty.set_result(lookup.message(()))
            return empty
        key = (id(query.engine), id(query.search), bool(query.identities))
        answer = self.searches.submit(key, lookup, rows, call.deadline, query.engine.store)
        if tracing.enabled:
            answer.add_done_callback(tracing.start("search", queries=rows))
        return answer

    def _current_engine(self, store: str, version: int) -> Engine | None:
        """Look up an open version, once per turn of the loop: its requests arrived before the turn."""
        engine = self._engines.get((store, version))
        if engine is None and (engine := self._catalog.ready(store, version)) is not None:
            if not self._engines:
                asyncio.get_running_loop().call_soon(self._engines.clear)
            self._engines[store, version] = engine
        return engine

    async def _prepared(
        self, engine: Engine | None, request: pb.RetrieveRequest, call: Call, streamed: bool
    ) -> bytes:
        """Open the version of a request and embed its images and texts, then answer it."""
        store = request.store
        if engine is None:
            engine = await self._opened(store, request.version)
        for modality, queries in (("images", request.images), ("texts", request.texts)):
            if queries:
                self.embeddings.admit((modality, engine.digest))  # refuse before decoding
        query = await in_thread(self._threads, self._query, engine, request, call)
        return await self._submit(query, call, streamed)

    async def _opened(self, store: str, version: int) -> Engine:
        """Open a version once for all calls that wait for it; a thread for each would starve the loop."""
        for _ in range(OPEN_RETRIES):
            opening = self._opening.get((store, version))
            if opening is None:
                opening = asyncio.ensure_future(
                    in_thread(self._threads, self._catalog.engine, store, version)
                )
                self._opening[store, version] = opening

                def forget(opened: asyncio.Future[Engine]) -> None:
                    self._opening.pop((store, version), None)
                    _ = opened.cancelled() or opened.exception()  # else asyncio logs it as never retrieved

                opening.add_done_callback(forget)
            await asyncio.shield(opening)
            if (engine := self._catalog.ready(store, version)) is not None:
                return engine
            # that opening may have begun before a commit that this call must see
        return await in_thread(self._threads, self._catalog.engine, store, version)  # type: ignore[no-any-return]

    def _query(self, engine: Engine, request: pb.RetrieveRequest, call: Call) -> Query:
        """Check and embed a request, in a thread."""
        start = time.perf_counter()
        encode = CallEncoder(self.embeddings, engine.digest, call.deadline, engine.store)
        search = convert.search_from_proto(request)
        vectors, identities = convert.queries_from_proto(request, engine.fingerprint.dimension)
        query = self._catalog.query(
            engine, request.images, vectors, request.texts, request.fingerprint, search, identities, encode
        )
        if request.images:
            metrics.stage("decode", engine.store, time.perf_counter() - start - encode.seconds)
        return query

    @answering("read")
    def GetTags(self, request: pb.GetTagsRequest, call: Call) -> pb.GetTagsResponse:  # noqa: N802
        engine = self._catalog.engine(request.store, request.version)
        limit = request.page_size or 1000
        if max(limit, len(request.tag_ids)) > MAX_PAGE_TAGS or request.first_tag_id < 0:
            raise errors.InvalidInput(f"ask for at most {MAX_PAGE_TAGS} tags at once, from id 0 on")
        tags = engine.tags(
            list(request.tag_ids), first=request.first_tag_id, limit=limit, embeddings=request.embeddings
        )
        response = pb.GetTagsResponse(
            store=request.store,
            version=engine.version.number,
            fingerprint=engine.digest,
            tags=convert.tags_to_proto(tags),
            next_tag_id=tags[-1].tag_id + 1 if not request.tag_ids and len(tags) == limit else 0,
        )
        if request.embeddings and tags:
            response.embeddings.CopyFrom(convert.vectors_to_proto(convert.stacked(tags)))
        return response

    @answering(None)
    def ListStores(self, request: pb.ListStoresRequest, call: Call) -> pb.ListStoresResponse:  # noqa: N802
        infos = [info for info in self._catalog.stores() if call.caller.may("read", info.store)]
        return pb.ListStoresResponse(stores=[convert.info_to_proto(info) for info in infos])

    @answering("read")
    def GetStore(self, request: pb.GetStoreRequest, call: Call) -> pb.GetStoreResponse:  # noqa: N802
        return pb.GetStoreResponse(
            store=convert.info_to_proto(self._catalog.engine(request.store, request.version).info())
        )


def check_sizes(request: pb.RetrieveRequest, limits: Limits) -> None:
    """Raise `InvalidInput` for more queries to embed, or larger images, than the server takes."""
    most = min(limits.images, MAX_QUERIES)
    for name, queries in (("images", request.images), ("texts", request.texts)):
        if len(queries) > most:
            raise errors.InvalidInput(f"{len(queries)} {name} in one request: send at most {most}")
    for position, image in enumerate(request.images):
        if len(image) > limits.image_bytes:
            raise errors.InvalidInput(
                f"image {position} of the request has {len(image)} bytes, "
                f"this server takes at most {limits.image_bytes}: shrink it"
            )
