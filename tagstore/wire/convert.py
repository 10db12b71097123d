"""Convert between protobuf messages and the types of the code.

What servers send is foreign: an answer that cannot be true (a number that is not finite, a position that is
not there) raises `BadAnswer`. A value of an enum that this code does not know yet is taken for the nearest
that it knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import BadAnswer, BadVector, InvalidInput
from tagstore.types import (
    KINDS,
    ORDERS,
    Exclude,
    Fingerprint,
    Identity,
    Kind,
    Mention,
    Neighbour,
    Order,
    Pair,
    Rejected,
    Retrieval,
    RetrievedTag,
    Search,
    StoreInfo,
    TagInfo,
)
from tagstore_proto.v1 import tagstore_pb2 as pb

KIND_TO_WIRE: dict[Kind, pb.Kind] = {kind: pb.Kind.Value(f"KIND_{kind.upper()}") for kind in KINDS}
_KIND_FROM_WIRE: dict[int, Kind] = {
    pb.KIND_UNSPECIFIED: "object",
    **{number: kind for kind, number in KIND_TO_WIRE.items()},
}
_ORDER_TO_WIRE: dict[Order, pb.Order] = {order: pb.Order.Value(f"ORDER_{order.upper()}") for order in ORDERS}
_ORDER_FROM_WIRE: dict[int, Order] = {
    pb.ORDER_UNSPECIFIED: "votes",
    **{number: order for order, number in _ORDER_TO_WIRE.items()},
}
OUTCOMES: dict[str, pb.Outcome] = {
    name: pb.Outcome.Value(f"OUTCOME_{name.upper()}") for name in ("added", "unchanged", "quarantined")
}
_NOBODY = Exclude()
_DEFAULT = Search()
_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DTYPE_UNSPECIFIED: np.dtype("<f4"),
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
}


def vectors_to_proto(vectors: NDArray[np.floating]) -> pb.Vectors:
    """Pack vectors `[N, D]`: float16 as it is, anything else as float32."""
    half = vectors.dtype == np.float16
    packed = np.ascontiguousarray(vectors, "<f2" if half else "<f4")
    return pb.Vectors(
        data=packed.tobytes(),
        dimension=vectors.shape[1],
        dtype=pb.DTYPE_FLOAT16 if half else pb.DTYPE_FLOAT32,
    )


def vectors_from_proto(message: pb.Vectors) -> NDArray[np.floating]:
    """Return `[N, D]`, a view of the message's bytes.

    Raises `BadVector` if they are no whole number of vectors.
    """
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise BadVector(f"dtype {message.dtype} is unknown here: send float32 or float16")
    size = message.dimension * dtype.itemsize
    if not size or len(message.data) % size:
        raise BadVector(
            f"{len(message.data)} bytes are no whole number of {dtype.name} vectors "
            f"of {message.dimension} dimensions"
        )
    return np.frombuffer(message.data, dtype).reshape(-1, message.dimension)


def search_to_proto(request: pb.RetrieveRequest, search: Search, identities: Sequence[Identity] = ()) -> None:
    """Write the options of a request and the identities of its queries into its message.

    Defaults are not sent. Raises `InvalidInput` for a number that the wire cannot carry.
    """
    request.k = _uint32("k", search.k)
    request.max_tags = _uint32("max_tags", search.max_tags)
    request.nprobe = _uint32("nprobe", search.nprobe)
    request.ef_search = _uint32("ef_search", search.ef_search)
    if search.min_similarity > -1:
        request.min_similarity = search.min_similarity
    if search.order != "votes":
        if search.order not in _ORDER_TO_WIRE:
            raise InvalidInput(f"order '{search.order}' is none of {', '.join(ORDERS)}")
        request.order = _ORDER_TO_WIRE[search.order]
    if search.where:
        request.where.update(search.where)
    if search.exclude != _NOBODY:
        exclude = search.exclude
        request.exclude.key, request.exclude.sha256 = exclude.key, exclude.sha256
        if exclude.hash_distance >= 0:
            request.exclude.perceptual_hash = _uint32("exclude.hash_distance", exclude.hash_distance)
        request.exclude.keys.extend(exclude.keys)
        request.exclude.entry_ids.extend(exclude.entry_ids)
    request.exact = search.exact
    request.omit_neighbours, request.omit_texts = not search.with_neighbours, not search.with_texts
    request.provenance = search.with_provenance
    for identity in identities:
        message = request.identities.add(key=identity.key, sha256=identity.sha256)
        if identity.perceptual_hash is not None:
            message.perceptual_hash = identity.perceptual_hash


def search_from_proto(request: pb.RetrieveRequest) -> Search:
    """Read options, whose ranges the engine checks. Raises `InvalidInput` for an unknown order."""
    order = _ORDER_FROM_WIRE.get(request.order)
    if order is None:
        raise InvalidInput(
            f"order {request.order} is unknown here: leave it out, or ask for {', '.join(ORDERS)}"
        )
    exclude = request.exclude
    options = (
        request.k if request.HasField("k") else _DEFAULT.k,
        request.max_tags,
        request.min_similarity if request.HasField("min_similarity") else _DEFAULT.min_similarity,
        order,
        request.exact,
        request.nprobe,
        request.ef_search,
        not request.omit_neighbours,
        not request.omit_texts,
        request.provenance,
    )
    if request.where or exclude.keys or exclude.entry_ids:
        return _search(options, _exclude_from_proto(exclude), dict(request.where))
    hash_distance = exclude.perceptual_hash if exclude.HasField("perceptual_hash") else -1
    return _plain_search(options, exclude.key, exclude.sha256, hash_distance)


def _search(options: tuple[Any, ...], exclude: Exclude, where: Mapping[str, str]) -> Search:
    k, max_tags, min_similarity, order, exact, nprobe, ef_search, *returned = options
    with_neighbours, with_texts, with_provenance = returned
    return Search(
        k=k,
        max_tags=max_tags,
        min_similarity=min_similarity,
        order=order,
        where=where,
        exclude=exclude,
        exact=exact,
        nprobe=nprobe,
        ef_search=ef_search,
        with_neighbours=with_neighbours,
        with_texts=with_texts,
        with_provenance=with_provenance,
    )


@lru_cache(1024)
def _plain_search(options: tuple[Any, ...], key: bool, sha256: bool, hash_distance: int) -> Search:
    """Return the same object for the same options: a server searches queries that share one together."""
    nobody = not key and not sha256 and hash_distance < 0
    return _search(
        options, _NOBODY if nobody else Exclude(key=key, sha256=sha256, hash_distance=hash_distance), {}
    )


def queries_from_proto(
    request: pb.RetrieveRequest, dimension: int
) -> tuple[NDArray[np.floating], list[Identity]]:
    """Read vectors `[N, D]`, `[0, dimension]` if there are none, and identities. Raises `BadVector`."""
    if request.HasField("vectors"):
        vectors = vectors_from_proto(request.vectors)
    else:
        vectors = np.zeros((0, dimension), np.float32)
    identities = [
        Identity(m.key, m.sha256, m.perceptual_hash if m.HasField("perceptual_hash") else None)
        for m in request.identities
    ]
    return vectors, identities


def _exclude_from_proto(message: pb.Exclude) -> Exclude:
    return Exclude(
        key=message.key,
        sha256=message.sha256,
        hash_distance=message.perceptual_hash if message.HasField("perceptual_hash") else -1,
        keys=tuple(message.keys),
        entry_ids=tuple(message.entry_ids),
    )


def _uint32(name: str, value: int) -> int:
    if not 0 <= value < 1 << 32:
        raise InvalidInput(f"{name} is {value}: it must be a small number, not negative")
    return value


def retrieval_to_proto(retrieval: Retrieval) -> pb.Retrieval:
    position = {n.entry_id: i for i, n in enumerate(retrieval.neighbours)}
    return pb.Retrieval(
        neighbours=[
            pb.Neighbour(entry_id=n.entry_id, key=n.key, similarity=n.similarity, captions=n.captions)
            for n in retrieval.neighbours
        ],
        tags=[
            pb.RetrievedTag(
                tag_id=t.tag_id,
                tag=t.tag,
                kind=KIND_TO_WIRE[t.kind] if t.tag else pb.KIND_UNSPECIFIED,  # texts were not asked for
                similarity=t.similarity,
                relevance=t.relevance,
                neighbours=[position[i] for i in t.neighbours],
                votes=t.votes,
                mentions=mentions_to_proto(t.mentions, position),
            )
            for t in retrieval.tags
        ],
        excluded=retrieval.excluded,
        miner=retrieval.miner,
    )


def mentions_to_proto(mentions: Iterable[Mention], positions: Mapping[int, int]) -> list[pb.Mention]:
    """Write mentions, given the position of each neighbour by its entry id."""
    return [
        pb.Mention(
            neighbour=positions[m.entry_id], caption=m.caption, start=m.start, end=m.end, score=m.score
        )
        for m in mentions
    ]


def _mentions_from_proto(message: pb.RetrievedTag, neighbours: Sequence[Neighbour]) -> tuple[Mention, ...]:
    """Read mentions, each within its caption. Raises `BadAnswer`, and `IndexError` for no such neighbour."""
    mentions = []
    for m in message.mentions:
        neighbour = neighbours[m.neighbour]
        caption = neighbour.captions[m.caption] if m.caption >= 0 else ""
        if m.caption < -1 or not m.start <= m.end or (m.caption >= 0 and m.end > len(caption)):
            raise BadAnswer(f"a mention of tag {message.tag_id} is not within its caption")
        if not 0 <= m.score <= 1:
            raise BadAnswer(f"a mention of tag {message.tag_id} has a score that is not in [0, 1]")
        mentions.append(Mention(neighbour.entry_id, m.caption, m.start, m.end, m.score))
    return tuple(mentions)


def retrievals_from_proto(response: pb.RetrieveResponse) -> list[Retrieval]:
    """Read answers. Raises `BadAnswer`."""
    version = response.store, response.version, response.fingerprint
    retrievals, kinds = [], _KIND_FROM_WIRE.get
    signals = 0.0  # finite if and only if all signals are: float32 values cannot overflow a float64
    try:
        for message in response.retrievals:
            neighbours = [Neighbour(n.key, n.entry_id, n.similarity) for n in message.neighbours]
            if traced := bool(message.miner):
                neighbours = [
                    replace(neighbour, captions=tuple(n.captions))
                    for neighbour, n in zip(neighbours, message.neighbours, strict=True)
                ]
            ids = [neighbour.entry_id for neighbour in neighbours]
            tags = []
            for t in message.tags:
                kind, carriers = kinds(t.kind, "custom"), tuple(map(ids.__getitem__, t.neighbours))
                signals += t.similarity + t.relevance
                mentions = _mentions_from_proto(t, neighbours) if traced else ()
                signals_of = t.similarity, t.votes, t.relevance
                tags.append(RetrievedTag(t.tag_id, t.tag, kind, *signals_of, carriers, mentions))
            signals += sum(neighbour.similarity for neighbour in neighbours)
            answer = tuple(neighbours), tuple(tags), message.excluded
            retrievals.append(Retrieval(*version, *answer, miner=message.miner))
    except IndexError:
        raise BadAnswer("a tag names a neighbour that is not in the answer") from None
    if not isfinite(signals):
        raise BadAnswer("a similarity or relevance is no finite number")
    return retrievals


def kind_from_proto(number: int) -> Kind:
    """Read the kind of a tag; one that is unknown here, of a later server, is `custom`."""
    return _KIND_FROM_WIRE.get(number, "custom")


def tags_to_proto(tags: Iterable[TagInfo]) -> list[pb.TagInfo]:
    return [pb.TagInfo(tag_id=t.tag_id, text=t.text, kind=KIND_TO_WIRE[t.kind], count=t.count) for t in tags]


def tags_from_proto(response: pb.GetTagsResponse) -> list[TagInfo]:
    """Read tags, with embeddings if there are any. Raises `BadAnswer`."""
    embeddings: Iterable[NDArray[np.float32] | None] = [None] * len(response.tags)
    if response.HasField("embeddings"):
        embeddings = _embeddings_from_proto(response.embeddings, len(response.tags))
    return [
        TagInfo(t.tag_id, t.text, kind_from_proto(t.kind), t.count, embedding)
        for t, embedding in zip(response.tags, embeddings, strict=True)
    ]


def _embeddings_from_proto(message: pb.Vectors, count: int) -> NDArray[np.float32]:
    try:
        rows = vectors_from_proto(message).astype(np.float32)
    except BadVector as error:
        raise BadAnswer(f"embeddings: {error}") from error
    if len(rows) != count:
        raise BadAnswer(f"{len(rows)} embeddings of {count} tags")
    if not np.isfinite(rows).all():
        raise BadAnswer("an embedding holds a number that is not finite")
    return rows


def pair_to_proto(pair: Pair) -> pb.Pair:
    metadata = json.dumps(dict(pair.metadata)) if pair.metadata else ""
    return pb.Pair(
        key=pair.key, image=pair.image, captions=pair.captions, metadata=metadata, origin=pair.origin
    )


def pair_from_proto(message: pb.Pair) -> Pair | Rejected:
    """Read a pair, or a rejected one if its metadata is no JSON object. Nothing else of it is checked."""
    try:
        metadata = json.loads(message.metadata) if message.metadata else {}
    except ValueError:
        metadata = None
    except RecursionError:
        return Rejected(message.key, "nested too deeply: the metadata cannot be read", message.origin)
    if not isinstance(metadata, dict):
        return Rejected(message.key, "metadata: no JSON object", message.origin)
    return Pair(message.key, message.image, tuple(message.captions), metadata, message.origin)


def fingerprint_to_proto(f: Fingerprint) -> pb.Fingerprint:
    return pb.Fingerprint(
        model=f.model,
        weights=f.weights,
        preprocess=json.dumps(dict(f.preprocess), sort_keys=True),
        quick_gelu=f.quick_gelu,
        normalised=f.normalised,
        dimension=f.dimension,
    )


def fingerprint_from_proto(f: pb.Fingerprint) -> Fingerprint:
    """Read a fingerprint. Raises `BadAnswer`."""
    preprocess = object_from_json("the preprocessing of a fingerprint", f.preprocess)
    return Fingerprint(f.model, f.weights, preprocess, f.quick_gelu, f.normalised, f.dimension)


def object_from_json(what: str, text: str) -> dict[str, Any]:
    """Read a JSON object that a server sent. Raises `BadAnswer`, which names what it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"{what} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadAnswer(f"{what} is no JSON object")
    return value


def info_to_proto(info: StoreInfo) -> pb.StoreInfo:
    return pb.StoreInfo(
        store=info.store,
        version=info.version,
        entries=info.entries,
        tags=info.tags,
        unique_tags=info.unique_tags,
        fingerprint=fingerprint_to_proto(info.fingerprint),
        index=json.dumps(dict(info.index), sort_keys=True),
        created=info.created,
        tag_embeddings=json.dumps(dict(info.tag_embeddings), sort_keys=True) if info.tag_embeddings else "",
    )


def info_from_proto(message: pb.StoreInfo) -> StoreInfo:
    """Read the description of a store. Raises `BadAnswer`."""
    return StoreInfo(
        store=message.store,
        version=message.version,
        entries=message.entries,
        tags=message.tags,
        unique_tags=message.unique_tags,
        fingerprint=fingerprint_from_proto(message.fingerprint),
        index=object_from_json("the index of a store", message.index),
        created=message.created,
        tag_embeddings=object_from_json(
            "what a store says of its tags' embeddings", message.tag_embeddings or "{}"
        ),
    )


def stacked(tags: Iterable[TagInfo]) -> NDArray[np.float16]:
    """Stack the embeddings of tags, `[n, D]` float16: they are stored so, and nothing is lost."""
    return np.stack([t.embedding for t in tags if t.embedding is not None]).astype(np.float16)
