"""The servicer: messages in, the catalog's answer out. Access, limits and errors are the business of `serving.methods`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tagstore import errors
from tagstore.retrieval.engine import MAX_BATCH, Answer, Engine, Found
from tagstore.serving import metrics, tracing
from tagstore.serving.gate import Call, understood
from tagstore.serving.limits import Limits
from tagstore.serving.live_catalog import LiveCatalog
from tagstore.serving.methods import answering, in_thread, parsed
from tagstore.serving.search_queue import Searches
from tagstore.types import Identity, Search
from tagstore.wire import convert
from tagstore.wire.status import error_to_proto
from tagstore_proto.v1 import tagstore_pb2 as pb

MAX_TAGS_A_PAGE = 10_000
TRIES = 4
"""Of finding a version open that others had opened, before a call has it opened for itself."""
AHEAD = 64
"""Requests of a stream that are worked on before the first of them is answered."""


class Query(NamedTuple):
    """A request that is ready to be searched."""

    engine: Engine
    search: Search
    vectors: NDArray[np.floating]
    identities: Sequence[Identity]
    streamed: bool


class TagStoreService:
    """`tagstore.v1.TagStore` over a catalog.

    Args:
        searches: of `found`, then `answered`.
        threads: for what would keep the event loop: images, texts, versions that are not open yet.
    """

    def __init__(
        self, catalog: LiveCatalog, searches: Searches[Query, Found, bytes], limits: Limits, threads: Executor
    ) -> None:
        self._catalog, self._searches, self._limits, self._threads = catalog, searches, limits, threads
        self._opening: dict[tuple[str, int], asyncio.Future[Engine]] = {}
        self._seen: dict[tuple[str, int], Engine] = {}

    @answering("read")
    async def Retrieve(self, request: pb.RetrieveRequest, call: Call) -> bytes:  # noqa: N802
        try:
            return await self._begun(request, call, streamed=False)
        except asyncio.CancelledError:
            self._searches.sweep()
            raise

    async def RetrieveStream(  # noqa: N802
        self, requests: AsyncIterator[bytes], call: Call, send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        ahead: asyncio.Queue[_Turn | None] = asyncio.Queue(AHEAD)

        async def read() -> None:
            try:
                async for data in requests:
                    await ahead.put(_Turn(self, data, call))
            finally:
                await ahead.put(None)

        reader = asyncio.create_task(read())
        try:
            while (turn := await ahead.get()) is not None:
                await send(await turn.answer())
            await reader
        finally:
            reader.cancel()
            while not ahead.empty():
                turn = ahead.get_nowait()
                if turn is not None:
                    turn.cancel()
            self._searches.sweep()

    RetrieveStream.parses = True  # type: ignore[attr-defined]  # a message that is none is answered, and the stream goes on

    def _begun(self, request: pb.RetrieveRequest, call: Call, *, streamed: bool) -> asyncio.Future[bytes]:
        """The answer to come, a message in bytes. Raises what can be told at once."""
        check_sizes(request, self._limits)
        engine = self._ready(request.store, request.version)
        if engine is None or request.images or request.texts:
            return asyncio.ensure_future(self._answered(engine, request, call, streamed))
        search = convert.search_from_proto(request)
        return self._submitted(engine, search, *self._queries(engine, search, request), call, streamed)

    def _ready(self, store: str, version: int) -> Engine | None:
        """As the catalog's, looked at once a turn of the loop: what else is begun in this turn had arrived before that look."""
        engine = self._seen.get((store, version))
        if engine is None and (engine := self._catalog.ready(store, version)) is not None:
            if not self._seen:
                asyncio.get_running_loop().call_soon(self._seen.clear)
            self._seen[store, version] = engine
        return engine

    async def _answered(
        self, engine: Engine | None, request: pb.RetrieveRequest, call: Call, streamed: bool
    ) -> bytes:
        """As `_begun`, for what has to be opened, decoded or embedded first."""
        store = request.store
        if engine is None:
            engine = await self._opened(store, request.version, call)
        search = convert.search_from_proto(request)
        vectors, identities = await in_thread(
            self._threads, call, store, self._queries, engine, search, request
        )
        return await self._submitted(engine, search, vectors, identities, call, streamed)

    async def _opened(self, store: str, version: int, call: Call) -> Engine:
        """A version that has to be opened: once for all who wait for it, as many threads would keep the loop from its turn."""
        for _ in range(TRIES):
            opening = self._opening.get((store, version))
            if opening is None:
                opening = asyncio.ensure_future(
                    in_thread(self._threads, call, store, self._catalog.engine, store, version)
                )
                self._opening[store, version] = opening
                opening.add_done_callback(
                    lambda done: (
                        self._opening.pop((store, version), None),
                        done.cancelled() or done.exception(),
                    )
                )
            await asyncio.shield(opening)
            if (engine := self._catalog.ready(store, version)) is not None:
                return engine
            # what was opened when this call came may be of before a commit that it must see
        return await in_thread(self._threads, call, store, self._catalog.engine, store, version)  # type: ignore[no-any-return]

    def _queries(
        self, engine: Engine, search: Search, request: pb.RetrieveRequest
    ) -> tuple[NDArray[np.floating], Sequence[Identity]]:
        return self._catalog.queries(
            engine,
            images=request.images,
            vectors=convert.vectors_from_proto(request.vectors) if request.HasField("vectors") else None,
            texts=request.texts,
            fingerprint=request.fingerprint,
            search=search,
            identities=convert.identities_from_proto(request) if request.identities else (),
        )

    def _submitted(
        self,
        engine: Engine,
        search: Search,
        vectors: NDArray[np.floating],
        identities: Sequence[Identity],
        call: Call,
        streamed: bool,
    ) -> asyncio.Future[bytes]:
        query = Query(engine, search, vectors, identities, streamed)
        if not len(vectors):
            nothing: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            nothing.set_result(_message(query, ()))
            return nothing
        answer = self._searches.submit(
            (id(engine), id(search), bool(identities)), query, len(vectors), call.deadline
        )
        if tracing.enabled():
            answer.add_done_callback(tracing.begun("search", queries=len(vectors)))
        return answer

    @answering("read")
    def GetTags(self, request: pb.GetTagsRequest, call: Call) -> pb.GetTagsResponse:  # noqa: N802
        engine = self._catalog.engine(request.store, request.version)
        limit = request.page_size or 1000
        if max(limit, len(request.tag_ids)) > MAX_TAGS_A_PAGE or request.first_tag_id < 0:
            raise errors.InvalidInput(f"ask for at most {MAX_TAGS_A_PAGE} tags at once, from id 0 on")
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
    """Raises `InvalidInput` for more queries to embed, or larger images, than the server takes."""
    most = min(limits.images, MAX_BATCH)
    for name, queries in (("images", request.images), ("texts", request.texts)):
        if len(queries) > most:
            raise errors.InvalidInput(f"{len(queries)} {name} in one request: send at most {most}")
    for position, image in enumerate(request.images):
        if len(image) > limits.image_bytes:
            raise errors.InvalidInput(
                f"image {position} of the request has {len(image)} bytes, this server takes at most {limits.image_bytes}: shrink it"
            )


def found(queries: Sequence[Query]) -> Found:
    """The neighbours of queries that are alike but for their vectors and identities, in one search."""
    first = queries[0]
    vectors = first.vectors if len(queries) == 1 else np.concatenate([query.vectors for query in queries])
    identities = (
        first.identities
        if len(queries) == 1
        else [identity for query in queries for identity in query.identities]
    )
    return first.engine.find(vectors, first.search, identities)


def answered(queries: Sequence[Query], finds: Found) -> list[bytes]:
    """Messages for queries and what was found for them."""
    answers = iter(queries[0].engine.merge(finds, queries[0].search))
    return [_message(query, [next(answers) for _ in query.vectors]) for query in queries]


def _message(query: Query, answers: Iterable[Answer]) -> bytes:
    message = pb.RetrieveStreamResponse() if query.streamed else pb.RetrieveResponse()
    response = message.response if isinstance(message, pb.RetrieveStreamResponse) else message
    engine = query.engine
    response.store, response.version, response.fingerprint = (
        engine.snapshot.store.name,
        engine.version.number,
        engine.digest,
    )
    for answer in answers:
        _write(response.retrievals.add(), answer, query.search)
    data: bytes = message.SerializeToString()
    return data


def _write(message: pb.Retrieval, answer: Answer, search: Search) -> None:
    """An answer into a message: what `Engine.retrieve` would say, without making values of it first."""
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


class _Turn:
    """One request of a stream: begun when it is read, answered when it is its turn. A failure is an answer, too."""

    def __init__(self, service: TagStoreService, data: bytes, call: Call) -> None:
        self._store = ""
        self._future: asyncio.Future[bytes] | None = None
        self._error: Exception | None = None
        try:
            request = parsed(pb.RetrieveRequest.FromString, data)
            call.caller.check("read", request.store)
            self._store = request.store
            self._future = service._begun(request, call, streamed=True)
        except Exception as error:  # noqa: BLE001  told in the answer
            self._error = error

    async def answer(self) -> bytes:
        code, store = "OK", self._store
        try:
            if self._error is not None:
                raise self._error
            assert self._future is not None
            return await self._future
        except Exception as error:  # noqa: BLE001  a request that fails is answered, and the stream goes on
            failure = understood(error, "RetrieveStream")
            code, store = type(failure).__name__, ""
            data: bytes = pb.RetrieveStreamResponse(error=error_to_proto(failure)).SerializeToString()
            return data
        finally:
            metrics.child(metrics.REQUESTS, "RetrieveStream", store, code).inc()

    def cancel(self) -> None:
        if self._future is not None:
            self._future.cancel()
