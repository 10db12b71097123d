"""Ways to query a store in process, each a function of queries `[N, D]`, and the same queries as messages."""

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
TOP_K = Search(k=K)
Queries = NDArray[np.float32]
RawQuery = Callable[[Queries], list[tuple[list[int], list[int]]]]
"""Queries to (entry ids, merged tag ids) of each."""


def raw_faiss_lmdb(root: Path, version: int) -> RawQuery:
    """Query FAISS and LMDB directly: search, read records, decode, merge. Every implementation pays this."""
    import faiss

    from tagstore.indexing.faiss_index import plan_of
    from tagstore.indexing.plans import parameters
    from tagstore.storage.codec import decode_hot
    from tagstore.storage.store import Store
    from tagstore.storage.tables import U64

    snapshot = Store(root, STORE).snapshot(version or None)
    files = snapshot.version.index["files"]
    directory = snapshot.store.index_directory
    parts = [faiss.read_index(str(directory / file["file"]), faiss.IO_FLAG_MMAP_IFC) for file in files]
    # an index for a budget is searched as it was tuned: raw FAISS at the same recall, not at FAISS's defaults
    search_params = [
        parameters(plan_of(file["plan"]), Search(), K, 1.0, None) if "plan" in file else None
        for file in files
    ]
    env, db = snapshot.store.env, snapshot.store.db["entries"]

    def query(vectors: Queries) -> list[tuple[list[int], list[int]]]:
        results = [part.search(vectors, K, params=p) for part, p in zip(parts, search_params, strict=True)]
        ids = np.concatenate([part_ids for _, part_ids in results], axis=1)
        if len(parts) > 1:
            order = np.argsort(-np.concatenate([scores for scores, _ in results], axis=1), axis=1)[:, :K]
            ids = np.take_along_axis(ids, order, axis=1)
        answers = []
        with env.begin(buffers=True) as txn:
            for row in ids.tolist():
                votes: dict[int, int] = {}
                for entry in row:
                    for tag in decode_hot(txn.get(U64.pack(entry), db=db))[1]:
                        votes[tag] = votes.get(tag, 0) + 1
                answers.append((row, sorted(votes, key=lambda tag: -votes[tag])))
        return answers

    return query


def engine_in_process(
    root: Path, version: int = 0, search: Search = TOP_K
) -> Callable[[Queries], list[Retrieval]]:
    """Our engine without the wire."""
    from tagstore.retrieval.engine import Engine
    from tagstore.storage.store import Store

    engine = Engine(Store(root, STORE).snapshot(version or None))
    return lambda vectors: engine.retrieve(vectors, search)


def request_messages(
    vectors: Queries, rows: int, digest: str, *, store: str = STORE, version: int = 0, ef: int = 0
) -> list[bytes]:
    """Serialized requests of `rows` queries each."""
    messages = []
    for start in range(0, len(vectors) - rows + 1, rows):
        batch = convert.vectors_to_proto(vectors[start : start + rows])
        request = pb.RetrieveRequest(
            store=store, version=version, vectors=batch, fingerprint=digest, k=K, ef_search=ef
        )
        messages.append(request.SerializeToString())
    return messages


def entry_ids(answers: Sequence[Retrieval]) -> list[list[int]]:
    return [[neighbour.entry_id for neighbour in answer.neighbours] for answer in answers]


def recall(ids: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]) -> float:
    """Mean share of the true neighbours among the ids."""
    return float(np.mean([len({*row} & {*true}) / len(true) for row, true in zip(ids, truth, strict=True)]))
