"""Between the messages of the wire and the types of the code; nothing else knows both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import BadVector
from tagstore.types import KINDS, Fingerprint, Kind, Neighbour, Retrieval, RetrievedTag, StoreInfo, TagInfo
from tagstore_proto.v1 import tagstore_pb2 as pb

_TO_WIRE: dict[Kind, pb.Kind] = {kind: pb.Kind.Value(f"KIND_{kind.upper()}") for kind in KINDS}
_FROM_WIRE: dict[int, Kind] = {number: kind for kind, number in _TO_WIRE.items()}
_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DTYPE_UNSPECIFIED: np.dtype("<f4"),
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
}


def vectors_to_proto(vectors: NDArray[np.floating]) -> pb.Vectors:
    """`[N, D]` of float16 as it is, of anything else as float32."""
    half = vectors.dtype == np.float16
    packed = np.ascontiguousarray(vectors, "<f2" if half else "<f4")
    return pb.Vectors(data=packed.tobytes(), dimension=vectors.shape[1], dtype=pb.DTYPE_FLOAT16 if half else pb.DTYPE_FLOAT32)


def vectors_from_proto(message: pb.Vectors) -> NDArray[np.floating]:
    """`[N, D]`, a view of the message's bytes. Raises `BadVector` if they are no whole number of vectors."""
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise BadVector(f"dtype {message.dtype} is unknown here: send float32 or float16")
    size = message.dimension * dtype.itemsize
    if not size or len(message.data) % size:
        raise BadVector(f"{len(message.data)} bytes are no whole number of {dtype.name} vectors of {message.dimension} dimensions")
    return np.frombuffer(message.data, dtype).reshape(-1, message.dimension)


def retrieval_to_proto(retrieval: Retrieval) -> pb.Retrieval:
    position = {n.entry_id: i for i, n in enumerate(retrieval.neighbours)}
    return pb.Retrieval(
        neighbours=[pb.Neighbour(entry_id=n.entry_id, key=n.key, similarity=n.similarity) for n in retrieval.neighbours],
        tags=[
            pb.RetrievedTag(
                tag_id=t.tag_id,
                tag=t.tag,
                kind=_TO_WIRE[t.kind],
                similarity=t.similarity,
                relevance=t.relevance,
                neighbours=[position[i] for i in t.neighbours],
                votes=t.votes,
            )
            for t in retrieval.tags
        ],
        excluded=retrieval.excluded,
    )


def retrievals_from_proto(response: pb.RetrieveResponse) -> list[Retrieval]:
    return [
        Retrieval(
            store=response.store,
            version=response.version,
            fingerprint=response.fingerprint,
            neighbours=tuple(Neighbour(n.key, n.entry_id, n.similarity) for n in message.neighbours),
            tags=tuple(_tags_from_proto(message)),
            excluded=message.excluded,
        )
        for message in response.retrievals
    ]


def _tags_from_proto(message: pb.Retrieval) -> Iterator[RetrievedTag]:
    ids = [n.entry_id for n in message.neighbours]
    for t in message.tags:
        yield RetrievedTag(
            tag_id=t.tag_id,
            tag=t.tag,
            kind=_FROM_WIRE[t.kind],
            similarity=t.similarity,
            votes=t.votes,
            relevance=t.relevance,
            neighbours=tuple(ids[i] for i in t.neighbours),
        )


def tags_to_proto(tags: Iterable[TagInfo]) -> list[pb.TagInfo]:
    return [pb.TagInfo(tag_id=t.tag_id, text=t.text, kind=_TO_WIRE[t.kind], count=t.count) for t in tags]


def tags_from_proto(response: pb.GetTagsResponse) -> list[TagInfo]:
    embeddings = vectors_from_proto(response.embeddings).astype(np.float32) if response.HasField("embeddings") else None
    return [
        TagInfo(t.tag_id, t.text, _FROM_WIRE[t.kind], t.count, None if embeddings is None else embeddings[i])
        for i, t in enumerate(response.tags)
    ]


def info_to_proto(info: StoreInfo) -> pb.StoreInfo:
    f = info.fingerprint
    return pb.StoreInfo(
        store=info.store,
        version=info.version,
        entries=info.entries,
        tags=info.tags,
        unique_tags=info.unique_tags,
        fingerprint=pb.Fingerprint(
            model=f.model,
            weights=f.weights,
            preprocess=json.dumps(dict(f.preprocess), sort_keys=True),
            quick_gelu=f.quick_gelu,
            normalised=f.normalised,
            dimension=f.dimension,
        ),
        index=json.dumps(dict(info.index), sort_keys=True),
        created=info.created,
    )


def info_from_proto(message: pb.StoreInfo) -> StoreInfo:
    f = message.fingerprint
    return StoreInfo(
        store=message.store,
        version=message.version,
        entries=message.entries,
        tags=message.tags,
        unique_tags=message.unique_tags,
        fingerprint=Fingerprint(f.model, f.weights, json.loads(f.preprocess), f.quick_gelu, f.normalised, f.dimension),
        index=json.loads(message.index),
        created=message.created,
    )


def stacked(tags: Iterable[TagInfo]) -> NDArray[np.float16]:
    """Embeddings of tags, `[n, D]` float16: as they are stored, so nothing is lost."""
    return np.stack([t.embedding for t in tags if t.embedding is not None]).astype(np.float16)
