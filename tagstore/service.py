"""The servicer: messages in, the catalog's answer out, errors as status codes. No logic of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import grpc

from tagstore import convert, errors
from tagstore.catalog import Catalog
from tagstore.status import code_of
from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc

log = logging.getLogger(__name__)

MAX_TAGS_A_PAGE = 10_000

Method = TypeVar("Method", bound=Callable[..., Any])


def _answering(method: Method) -> Method:
    """Errors of ours become their status and message; anything else becomes INTERNAL with nothing of it on the wire."""

    @wraps(method)
    def answer(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            if not context.is_active():
                context.abort(grpc.StatusCode.CANCELLED, "the caller has gone")  # it waited in our queue beyond its deadline
            return method(self, request, context)
        except errors.TagstoreError as error:
            context.abort(code_of(error), str(error))
        except Exception:
            log.exception("%s failed", method.__name__)
            context.abort(grpc.StatusCode.INTERNAL, f"{method.__name__} failed by a fault of the server; its log has the details")

    return answer  # type: ignore[return-value]


class TagStoreService(pb_grpc.TagStoreServicer):
    """`tagstore.v1.TagStore` over a catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    @_answering
    def Retrieve(self, request: pb.RetrieveRequest, context: grpc.ServicerContext) -> pb.RetrieveResponse:  # noqa: N802
        vectors = convert.vectors_from_proto(request.vectors) if request.HasField("vectors") else None
        engine = self._catalog.engine(request.store, request.version)
        retrievals = self._catalog.retrieve(
            engine,
            images=request.images,
            vectors=vectors,
            fingerprint=request.fingerprint,
            search=convert.search_from_proto(request),
            identities=convert.identities_from_proto(request),
        )
        return pb.RetrieveResponse(
            store=request.store,
            version=engine.version.number,
            fingerprint=engine.fingerprint.digest,
            retrievals=[convert.retrieval_to_proto(r) for r in retrievals],
        )

    @_answering
    def GetTags(self, request: pb.GetTagsRequest, context: grpc.ServicerContext) -> pb.GetTagsResponse:  # noqa: N802
        engine = self._catalog.engine(request.store, request.version)
        limit = request.page_size or 1000
        if max(limit, len(request.tag_ids)) > MAX_TAGS_A_PAGE or request.first_tag_id < 0:
            raise errors.InvalidInput(f"ask for at most {MAX_TAGS_A_PAGE} tags at once, from id 0 on")
        tags = engine.tags(list(request.tag_ids), first=request.first_tag_id, limit=limit, embeddings=request.embeddings)
        response = pb.GetTagsResponse(
            store=request.store,
            version=engine.version.number,
            fingerprint=engine.fingerprint.digest,
            tags=convert.tags_to_proto(tags),
            next_tag_id=tags[-1].tag_id + 1 if not request.tag_ids and len(tags) == limit else 0,
        )
        if request.embeddings and tags:
            response.embeddings.CopyFrom(convert.vectors_to_proto(convert.stacked(tags)))
        return response

    @_answering
    def ListStores(self, request: pb.ListStoresRequest, context: grpc.ServicerContext) -> pb.ListStoresResponse:  # noqa: N802
        return pb.ListStoresResponse(stores=[convert.info_to_proto(info) for info in self._catalog.stores()])

    @_answering
    def GetStore(self, request: pb.GetStoreRequest, context: grpc.ServicerContext) -> pb.GetStoreResponse:  # noqa: N802
        return pb.GetStoreResponse(store=convert.info_to_proto(self._catalog.engine(request.store, request.version).info()))
