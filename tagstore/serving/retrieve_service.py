"""The servicer that answers queries from a catalog.

A request becomes a `Lookup`: checked, embedded, its version open. A queue searches several of them at once,
and each is answered with a message in bytes. `serving.methods` handles access, limits and errors.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from tagstore import errors
from tagstore.retrieval.engine import MAX_QUERIES, Engine, Query
from tagstore.retrieval.tag_votes import Neighbours, RetrievalColumns
from tagstore.serving import metrics, tracing
from tagstore.serving.batch_queue import BatchQueue
from tagstore.serving.call import Call
from tagstore.serving.embed_queue import CallEncoder, EmbedQueue
from tagstore.serving.gate import public_error
from tagstore.serving.live_catalog import LiveCatalog
from tagstore.serving.methods import answering, in_thread, streaming
from tagstore.serving.settings import Limits
from tagstore.types import Search
from tagstore.wire import convert
from tagstore.wire.bounds import bounded
from tagstore.wire.status import error_to_proto
from tagstore_proto.v1 import tagstore_pb2 as pb

MAX_PAGE_TAGS = 10_000
"""Largest number of tags in one answer of `GetTags`."""
OPEN_RETRIES = 4
"""Times that a call waits for another call to open a version, before it opens the version itself."""
STREAM_WINDOW = 64
"""Requests of a stream that are read before the first of them is answered."""
parse_request = bounded("RetrieveStream", pb.RetrieveRequest.FromString)
SEARCH_ROWS = 256
"""Largest number of queries in one search."""


class Lookup(NamedTuple):
    """A request that is ready to be searched."""

    query: Query
    streamed: bool

    @staticmethod
    def find(lookups: Sequence[Lookup]) -> tuple[Query, list[Neighbours]]:
        """Find the neighbours of requests that differ in vectors and identities only, in one search."""
        query = Query.joined([lookup.query for lookup in lookups])
        return query, query.find()

    @staticmethod
    def answer(lookups: Sequence[Lookup], outcome: tuple[Query, list[Neighbours]]) -> list[bytes]:
        """Write the answer to each request."""
        query, neighbours = outcome
        answers = iter(query.answer(neighbours))
        return [lookup.message([next(answers) for _ in lookup.query.vectors]) for lookup in lookups]

    def message(self, answers: Iterable[RetrievalColumns]) -> bytes:
        """Write a message with the answers to this request's queries."""
        message = pb.RetrieveStreamResponse() if self.streamed else pb.RetrieveResponse()
        response = message.response if isinstance(message, pb.RetrieveStreamResponse) else message
        engine, search = self.query.engine, self.query.search
        response.store, response.version = engine.store, engine.version.number
        response.fingerprint = engine.digest
        for answer in answers:
            _write(response.retrievals.add(), answer, search)
        data: bytes = message.SerializeToString()
        return data


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
        window: asyncio.Queue[_StreamedRequest | None] = asyncio.Queue(STREAM_WINDOW)

        async def read() -> None:
            try:
                async for data in requests:
                    await window.put(_StreamedRequest(self, data, call))
            finally:
                await window.put(None)

        reader = asyncio.create_task(read())
        try:
            while (request := await window.get()) is not None:
                await send(await request.answer())
            await reader
        finally:
            reader.cancel()
            while not window.empty():
                request = window.get_nowait()
                if request is not None:
                    request.cancel()
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
        lookup, rows = Lookup(query, streamed), len(query.vectors)
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


def _write(message: pb.Retrieval, answer: RetrievalColumns, search: Search) -> None:
    """Write an answer into a message, without the objects that `RetrievalColumns.retrieval` makes."""
    message.excluded = answer.excluded
    if search.with_neighbours:
        add_neighbour = message.neighbours.add
        for entry_id, key, similarity in zip(answer.entry_ids, answer.keys, answer.similarities, strict=True):
            add_neighbour(entry_id=entry_id, key=key, similarity=similarity)
    add_tag = message.tags.add
    columns = zip(answer.tag_ids, answer.tag_similarities, answer.relevance, answer.carriers, strict=True)
    for place, (tag_id, similarity, relevance, carriers) in enumerate(columns):
        tag = add_tag(tag_id=tag_id, similarity=similarity, relevance=relevance, votes=len(carriers))
        if search.with_neighbours:
            tag.neighbours.extend(carriers)
        if search.with_texts:
            tag.tag, tag.kind = answer.texts[place], convert.KIND_TO_WIRE[answer.kinds[place]]


class _StreamedRequest:
    """A request of a stream, which starts when it is read and is answered in order, also if it fails."""

    def __init__(self, service: TagStoreService, data: bytes, call: Call) -> None:
        self._store = ""
        self._future: asyncio.Future[bytes] | None = None
        self._error: Exception | None = None
        try:
            request = parse_request(data)
            call.caller.check("read", request.store)
            self._store = request.store
            self._future = service.start(request, call, streamed=True)
        except Exception as error:  # noqa: BLE001  `answer` reports it
            self._error = error

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
            metrics.child(metrics.REQUESTS, "RetrieveStream", store, code).inc()

    def cancel(self) -> None:
        if self._future is not None:
            self._future.cancel()
