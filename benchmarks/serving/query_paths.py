"""The ways to ask a store in process, each a function of queries `[N, D]`, and the same queries as messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.synthetic import STORE
from tagstore.types import Retrieval, Search
from tagstore.wire import convert
from tagstore_proto.v1 import tagstore_pb2 as pb

K = 5
Queries = NDArray[np.float32]
Raw = Callable[[Queries], list[tuple[list[int], list[int]]]]
"""Queries to (entry ids, merged tag ids) of each."""


def raw(root: Path, version: int) -> Raw:
    """FAISS and LMDB called directly: search, get the records, decode, merge. What anybody must pay."""
    import faiss

    from tagstore.indexing.faiss_index import plan_of
    from tagstore.indexing.plans import parameters
    from tagstore.storage.codec import decode_hot
    from tagstore.storage.store import Store
    from tagstore.storage.tables import U64

    snapshot = Store(root, STORE).snapshot(version or None)
    files = snapshot.version.index["files"]
    parts = [
        faiss.read_index(str(snapshot.store.index_directory / about["file"]), faiss.IO_FLAG_MMAP_IFC)
        for about in files
    ]
    # an index for a budget is searched as it was tuned: raw FAISS at the same recall, not at FAISS's defaults
    told = [
        parameters(plan_of(about["plan"]), Search(), K, 1.0, None) if "plan" in about else None
        for about in files
    ]
    env, db = snapshot.store.env, snapshot.store.db["entries"]

    def ask(vectors: Queries) -> list[tuple[list[int], list[int]]]:
        found = [part.search(vectors, K, params=how) for part, how in zip(parts, told, strict=True)]
        ids = np.concatenate([i for _, i in found], axis=1)
        if len(parts) > 1:
            order = np.argsort(-np.concatenate([s for s, _ in found], axis=1), axis=1)[:, :K]
            ids = np.take_along_axis(ids, order, axis=1)
        answers = []
        with env.begin(buffers=True) as txn:
            for row in ids.tolist():
                votes: dict[int, int] = {}
                for entry in row:
                    for tag in decode_hot(txn.get(U64.pack(entry), db=db))[1]:
                        votes[tag] = votes.get(tag, 0) + 1
                answers.append((row, sorted(votes, key=lambda t: -votes[t])))
        return answers

    return ask


def in_process(
    root: Path, version: int = 0, search: Search = Search(k=K)
) -> Callable[[Queries], list[Retrieval]]:  # noqa: B008  frozen
    """Our engine without the wire."""
    from tagstore.retrieval.engine import Engine
    from tagstore.storage.store import Store

    engine = Engine(Store(root, STORE).snapshot(version or None))
    return lambda vectors: engine.retrieve(vectors, search)


def requests_of(
    vectors: Queries, rows: int, digest: str, *, store: str = STORE, version: int = 0, ef: int = 0
) -> list[bytes]:
    """Serialized requests of so many queries each."""
    messages = []
    for start in range(0, len(vectors) - rows + 1, rows):
        some = convert.vectors_to_proto(vectors[start : start + rows])
        request = pb.RetrieveRequest(
            store=store, version=version, vectors=some, fingerprint=digest, k=K, ef_search=ef
        )
        messages.append(request.SerializeToString())
    return messages


def found(answers: Sequence[Retrieval]) -> list[list[int]]:
    """Entry ids of each answer."""
    return [[n.entry_id for n in answer.neighbours] for answer in answers]


def recall(ids: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]) -> float:
    """Share of the true neighbours that were found."""
    return float(
        np.mean([len(set(some) & set(true)) / len(true) for some, true in zip(ids, truth, strict=True)])
    )
