"""Correctness, before anything is timed: every way to ask a store gives the same answer."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np

from benchmarks.serving.callers import LOCAL, RETRIEVE, STREAM
from benchmarks.serving.prepared_stores import FLAT, RECALL
from benchmarks.serving.query_paths import K, found, in_process, raw, recall, requests_of
from benchmarks.synthetic import fingerprint
from tagstore.types import Retrieval, Search
from tagstore.wire import convert
from tagstore_proto.v1 import tagstore_pb2 as pb

JUDGED = 1000


def check(
    root: Path, version: int, addresses: Mapping[str, str], small: str, queries: np.ndarray, compared: int
) -> dict[str, float]:
    """Recall@5 against exact search: of our engine on `JUDGED` queries, of the others on the first `compared` of them.

    Raises `RuntimeError` where calls, batches or streams of a server differ from the engine in process in any field, where raw FAISS or the
    server of forty lines find clearly less, or where recall is below what the index was tuned to.
    """
    digest, vectors = fingerprint(queries.shape[1]).digest, queries[:compared]
    judged = in_process(root, version)(queries[: JUDGED if version != FLAT else compared])
    truth = found(in_process(root, version, Search(k=K, exact=True))(queries[: len(judged)]))
    local = judged[:compared]
    for name, address in addresses.items():
        for way, answers in _asked(
            address,
            requests_of(vectors, 1, digest, version=version),
            requests_of(vectors, len(vectors), digest, version=version),
        ).items():
            if answers != local:
                raise RuntimeError(f"{way} of the server with {name} are answered otherwise than in process")
    least = 0.999 if version == FLAT else RECALL
    with grpc.insecure_channel(small, LOCAL) as channel:
        [data] = [
            channel.unary_unary(RETRIEVE)(message) for message in requests_of(vectors, len(vectors), digest)
        ]
    of_small = [
        [n.entry_id for n in one.neighbours] for one in pb.RetrieveResponse.FromString(data).retrievals
    ]
    of_raw = [ids for ids, _ in raw(root, version)(vectors)]
    shares = {
        f"our engine (on {len(judged)} queries)": recall(found(judged), truth),
        f"raw FAISS (on {compared})": recall(of_raw, truth[:compared]),
        f"the server of forty lines (on {compared})": recall(of_small, truth[:compared]),
    }
    for name, share in shares.items():
        if share < least - (
            0.0 if name.startswith("our") else 0.03
        ):  # fewer queries, and no spare candidates
            raise RuntimeError(f"recall@{K} of {name} is {share:.3f}, and {least:g} is wanted")
    return shares


def _asked(address: str, singles: list[bytes], whole: list[bytes]) -> dict[str, list[Retrieval]]:
    with grpc.insecure_channel(address, LOCAL) as channel:
        call = channel.unary_unary(RETRIEVE, None, pb.RetrieveResponse.FromString)
        stream = channel.stream_stream(STREAM, None, pb.RetrieveStreamResponse.FromString)
        with ThreadPoolExecutor(8) as pool:
            unary = [
                one for response in pool.map(call, singles) for one in convert.retrievals_from_proto(response)
            ]
        streamed = [
            one
            for response in stream(iter(singles))
            for one in convert.retrievals_from_proto(response.response)
        ]
        batch = convert.retrievals_from_proto(call(whole[0]))
    return {"calls": unary, "streams": streamed, "batches": batch}
