"""The servicer: messages in, the catalog's answer out. Access, limits and errors are the gate's business."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from tagstore import convert, errors
from tagstore.engine import MAX_BATCH, Answer, Engine
from tagstore.serving import metrics, tracing
from tagstore.serving.access import Caller
from tagstore.serving.gate import Gate, answering, set_current, streaming, understood
from tagstore.serving.limits import Limits
from tagstore.serving.live import LiveCatalog
from tagstore.serving.parsing import Malformed, parsed
from tagstore.status import error_to_proto
from tagstore.types import Search
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc

MAX_TAGS_A_PAGE = 10_000
AHEAD = 64
"""Requests of a stream that are read ahead of the answers; what is there is answered together."""


class TagStoreService(pb_grpc.TagStoreServicer):
    """`tagstore.v1.TagStore` over a catalog."""

    def __init__(self, catalog: LiveCatalog, gate: Gate) -> None:
        self._catalog = catalog
        self.gate = gate

    @answering("read")
    def Retrieve(self, request: pb.RetrieveRequest, context: Any, caller: Caller) -> pb.RetrieveResponse:  # noqa: N802
        check_sizes(request, self.gate.limits)
        engine = self._catalog.engine(request.store, request.version)
        return self._answer(engine, request)

    def RetrieveStream(self, requests: Iterator[pb.RetrieveRequest], context: Any) -> Iterator[pb.RetrieveStreamResponse]:  # noqa: N802
        with streaming(self.gate, context, "RetrieveStream") as caller:
            inbox = _Inbox(requests)
            try:
                while batch := inbox.take():
                    for answer in self._stream_answers(batch, context, caller):
                        self.gate.sending(context)
                        yield answer
                        self.gate.sent(context)
            finally:
                inbox.close()

    def _stream_answers(self, requests: Sequence[pb.RetrieveRequest], context: Any, caller: Caller) -> list[pb.RetrieveStreamResponse]:
        """An answer for each request; queries by vector that are alike are answered with one search."""
        answers: list[pb.RetrieveStreamResponse] = []
        options = [_options(request) for request in requests] if len(requests) > 1 else [None]
        start = 0
        while start < len(requests):
            end = start + 1
            while end < len(requests) and options[start] is not None and options[start] == options[end]:
                end += 1
            answers += self._alike_answers(requests[start:end], context, caller)
            start = end
        return answers

    def _alike_answers(self, requests: Sequence[pb.RetrieveRequest], context: Any, caller: Caller) -> list[pb.RetrieveStreamResponse]:
        first = requests[0]
        code = "OK"
        try:
            parsed(first)
            caller.check("read", first.store)
            set_current(context, first.store)
            for request in requests:
                check_sizes(request, self.gate.limits)
            with tracing.span("RetrieveStream", context.invocation_metadata(), store=first.store, requests=len(requests)):
                engine = self._catalog.engine(first.store, first.version)
                found = [self._answer(engine, first)] if len(requests) == 1 else self._answer_together(engine, requests)
            return [pb.RetrieveStreamResponse(response=response) for response in found]
        except Exception as error:  # noqa: BLE001  a request that fails is answered, and the stream goes on
            if len(requests) > 1 and isinstance(error, errors.InvalidInput):
                return [answer for request in requests for answer in self._alike_answers([request], context, caller)]
            failure = understood(error, "RetrieveStream")
            code = type(failure).__name__
            return [pb.RetrieveStreamResponse(error=error_to_proto(failure)) for _ in requests]
        finally:
            metrics.child(metrics.REQUESTS, "RetrieveStream", first.store if code == "OK" else "", code).inc(len(requests))

    def _answer(self, engine: Engine, request: pb.RetrieveRequest) -> pb.RetrieveResponse:
        search = convert.search_from_proto(request)
        answers = self._catalog.answers(
            engine,
            images=request.images,
            vectors=convert.vectors_from_proto(request.vectors) if request.HasField("vectors") else None,
            texts=request.texts,
            fingerprint=request.fingerprint,
            search=search,
            identities=convert.identities_from_proto(request) if request.identities else (),
        )
        return _response(engine, answers, search)

    def _answer_together(self, engine: Engine, requests: Sequence[pb.RetrieveRequest]) -> list[pb.RetrieveResponse]:
        vectors = [convert.vectors_from_proto(request.vectors) for request in requests]
        search = convert.search_from_proto(requests[0])
        found = iter(self._catalog.answers(engine, vectors=np.concatenate(vectors), fingerprint=requests[0].fingerprint, search=search))
        return [_response(engine, [next(found) for _ in some], search) for some in vectors]

    @answering("read")
    def GetTags(self, request: pb.GetTagsRequest, context: Any, caller: Caller) -> pb.GetTagsResponse:  # noqa: N802
        engine = self._catalog.engine(request.store, request.version)
        limit = request.page_size or 1000
        if max(limit, len(request.tag_ids)) > MAX_TAGS_A_PAGE or request.first_tag_id < 0:
            raise errors.InvalidInput(f"ask for at most {MAX_TAGS_A_PAGE} tags at once, from id 0 on")
        tags = engine.tags(list(request.tag_ids), first=request.first_tag_id, limit=limit, embeddings=request.embeddings)
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
    def ListStores(self, request: pb.ListStoresRequest, context: Any, caller: Caller) -> pb.ListStoresResponse:  # noqa: N802
        infos = [info for info in self._catalog.stores() if caller.may("read", info.store)]
        return pb.ListStoresResponse(stores=[convert.info_to_proto(info) for info in infos])

    @answering("read")
    def GetStore(self, request: pb.GetStoreRequest, context: Any, caller: Caller) -> pb.GetStoreResponse:  # noqa: N802
        return pb.GetStoreResponse(store=convert.info_to_proto(self._catalog.engine(request.store, request.version).info()))


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


def _response(engine: Engine, answers: Sequence[Answer], search: Search) -> pb.RetrieveResponse:
    return pb.RetrieveResponse(
        store=engine.snapshot.store.name,
        version=engine.version.number,
        fingerprint=engine.digest,
        retrievals=[_retrieval(answer, search) for answer in answers],
    )


def _retrieval(answer: Answer, search: Search) -> pb.Retrieval:
    """An answer as a message: what `Engine.retrieve` would say, without making values of it first."""
    message = pb.Retrieval(excluded=answer.excluded)
    if search.neighbours:
        add_neighbour = message.neighbours.add
        for entry_id, key, similarity in zip(answer.entry_ids, answer.keys, answer.similarities, strict=True):
            add_neighbour(entry_id=entry_id, key=key, similarity=similarity)
    add_tag = message.tags.add
    columns = zip(answer.tag_ids, answer.tag_similarities, answer.relevance, answer.carriers, strict=True)
    for place, (tag_id, similarity, relevance, carriers) in enumerate(columns):
        tag = add_tag(tag_id=tag_id, similarity=similarity, relevance=relevance, votes=len(carriers))
        if search.neighbours:
            tag.neighbours.extend(carriers)
        if search.texts:
            tag.tag, tag.kind = answer.texts[place], convert.KIND_TO_WIRE[answer.kinds[place]]
    return message


def _options(request: pb.RetrieveRequest) -> bytes | None:
    """Of a request by vector all but the vectors: those that are alike in it can be answered with one search. None for any other."""
    if isinstance(request, Malformed) or request.images or request.texts or request.identities or not request.HasField("vectors"):
        return None
    rest = pb.RetrieveRequest()
    rest.CopyFrom(request)
    rest.vectors.ClearField("data")
    options: bytes = rest.SerializeToString(deterministic=True)
    return options


class _Inbox:
    """The requests of a stream, read by a thread of its own while those before them are answered; at most `AHEAD` at a time."""

    def __init__(self, requests: Iterator[pb.RetrieveRequest]) -> None:
        self._queue: SimpleQueue[pb.RetrieveRequest | None] = SimpleQueue()
        self._room = threading.Event()
        self._closed = False
        self._ended = False
        threading.Thread(target=self._read, args=(requests,), name="rpc-stream", daemon=True).start()

    def _read(self, requests: Iterator[pb.RetrieveRequest]) -> None:
        try:
            for request in requests:
                self._queue.put(request)
                if self._queue.qsize() >= AHEAD:
                    self._room.clear()
                    if self._queue.qsize() >= AHEAD and not self._closed:
                        self._room.wait()
                if self._closed:
                    return
        except Exception:  # noqa: BLE001  the call has ended: its servicer is told so by gRPC
            return
        finally:
            self._queue.put(None)

    def take(self) -> list[pb.RetrieveRequest]:
        """All requests that are there, at least one; none at the stream's end."""
        if self._ended:
            return []
        found: list[pb.RetrieveRequest] = []
        request = self._queue.get()
        while request is not None:
            found.append(request)
            if self._queue.empty() or len(found) == AHEAD:
                break
            request = self._queue.get()
        self._ended = request is None
        self._room.set()
        return found

    def close(self) -> None:
        self._closed = True
        self._room.set()
