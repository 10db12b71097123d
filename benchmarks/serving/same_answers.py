"""Correctness, before anything is timed: all ways to query a store give the same answer."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np

from benchmarks.serving.callers import CHANNEL_OPTIONS, RETRIEVE, STREAM
from benchmarks.serving.prepared_stores import FLAT, RECALL
from benchmarks.serving.query_paths import (
    K,
    engine_in_process,
    entry_ids,
    raw_faiss_lmdb,
    recall,
    request_messages,
)
from benchmarks.synthetic import fingerprint
from tagstore.types import Retrieval, Search
from tagstore.wire import convert
from tagstore_proto.v1 import tagstore_pb2 as pb

JUDGED = 1000
"""Queries on which the recall of our engine is measured."""
RAW_TOLERANCE = 0.03
"""Recall that raw FAISS may lack: it is judged on fewer queries and has no spare candidates."""


def check(
    root: Path, version: int, addresses: Mapping[str, str], small: str, queries: np.ndarray, compared: int
) -> dict[str, float]:
    """Recall@5 against exact search: our engine on `JUDGED` queries, the others on the first `compared`.

    Raises `RuntimeError` where calls, batches or streams of a server differ in any field from the engine in
    process, where raw FAISS or the server of forty lines (at `small`) find clearly less, or where recall is
    below the one that the index was tuned to.
    """
    digest, vectors = fingerprint(queries.shape[1]).digest, queries[:compared]
    judged = engine_in_process(root, version)(queries[: JUDGED if version != FLAT else compared])
    truth = entry_ids(engine_in_process(root, version, Search(k=K, exact=True))(queries[: len(judged)]))
    singles = request_messages(vectors, 1, digest, version=version)
    [whole] = request_messages(vectors, len(vectors), digest, version=version)
    for name, address in addresses.items():
        for path, answers in _server_answers(address, singles, whole).items():
            if answers != judged[:compared]:
                raise RuntimeError(f"{path} of the server with {name} differ from the engine in process")
    with grpc.insecure_channel(small, CHANNEL_OPTIONS) as channel:
        [message] = request_messages(vectors, len(vectors), digest)
        response = pb.RetrieveResponse.FromString(channel.unary_unary(RETRIEVE)(message))
    small_ids = [[n.entry_id for n in retrieval.neighbours] for retrieval in response.retrievals]
    raw_ids = [ids for ids, _ in raw_faiss_lmdb(root, version)(vectors)]
    required = 0.999 if version == FLAT else RECALL
    shares = {
        f"our engine (on {len(judged)} queries)": recall(entry_ids(judged), truth),
        f"raw FAISS (on {compared})": recall(raw_ids, truth[:compared]),
        f"the server of forty lines (on {compared})": recall(small_ids, truth[:compared]),
    }
    for name, share in shares.items():
        if share < required - (0.0 if name.startswith("our") else RAW_TOLERANCE):
            raise RuntimeError(f"recall@{K} of {name} is {share:.3f}, required is {required:g}")
    return shares


def _server_answers(address: str, singles: list[bytes], whole: bytes) -> dict[str, list[Retrieval]]:
    with grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        call = channel.unary_unary(RETRIEVE, None, pb.RetrieveResponse.FromString)
        stream = channel.stream_stream(STREAM, None, pb.RetrieveStreamResponse.FromString)
        with ThreadPoolExecutor(8) as pool:
            calls = [answer for r in pool.map(call, singles) for answer in convert.retrievals_from_proto(r)]
        streams = [
            answer for r in stream(iter(singles)) for answer in convert.retrievals_from_proto(r.response)
        ]
        return {"calls": calls, "streams": streams, "batches": convert.retrievals_from_proto(call(whole))}
