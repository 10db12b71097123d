"""Search beside its parts: exact search and BLAS, answers and raw FAISS + LMDB, cold start, memory.

    python -m benchmarks.index.search [--entries 200000] [--dimension 512] [--directory DIR] [--quick]

The vectors lie in groups of look-alikes (`synthetic.py`); --directory keeps the store for the next run. Exact
search is compared with numpy and the graph's recall is measured before anything is timed. Both sides of every
ratio are timed in this run, in turn.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from benchmarks import synthetic
from benchmarks.processes import memory_mib
from benchmarks.report import arguments_parser, seconds, table, write
from tagstore.indexing import exact, faiss_index, plans
from tagstore.retrieval.engine import Engine
from tagstore.retrieval.tag_votes import RetrievalColumns
from tagstore.storage.codec import decode_hot
from tagstore.storage.rows import Allowed
from tagstore.storage.store import Snapshot, Store
from tagstore.storage.tables import U64
from tagstore.types import Search
from tagstore.upkeep.tuning import Budget, build_index

K = 5


def spread(times: list[float]) -> str:
    low, high = np.percentile(times, [10, 90])
    return f"{median(times) * 1e3:.2f} ({low * 1e3:.2f} to {high * 1e3:.2f})"


def exactly(snapshot: Snapshot, queries: NDArray[np.float32], times: int) -> str:
    """Exact search beside a matrix product of the same size, and the time to read the rows once."""
    live = Allowed(snapshot.array("live", np.uint8), snapshot.version.entries)
    rows = snapshot.vectors(snapshot.live())
    halves = rows.astype(np.float16)
    sample = queries[:16]
    best = -np.sort(-(sample @ rows.T), axis=1)[:, :K]
    np.testing.assert_allclose(exact.search(snapshot, sample, K, live)[0], best, atol=1e-5)
    engine = Engine(snapshot)
    part = faiss_index.Part(
        snapshot.store.index_directory / snapshot.version.index["files"][0]["file"],
        snapshot.version.index["files"][0],
        live,
        snapshot.dimension,
    )
    flat = faiss.IndexFlatIP(snapshot.dimension)
    flat.add(rows)
    codes = faiss.IndexScalarQuantizer(
        snapshot.dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    codes.add(rows)
    lines = []
    as_integers = halves.view(np.uint64).reshape(-1)
    read = median(seconds(lambda: as_integers.max(), times))
    for batch in (1, 4, 8, 64, 256):
        batch_queries = np.resize(queries, (batch, snapshot.dimension))
        out = np.empty((batch, len(rows)), np.float32)
        blas = seconds(
            lambda batch_queries=batch_queries, out=out: np.dot(batch_queries, rows.T, out=out), times
        )
        ours = seconds(
            lambda batch_queries=batch_queries: exact.search(snapshot, batch_queries, K, live), times
        )
        index = seconds(
            lambda batch_queries=batch_queries: engine.index.search(
                batch_queries, K, search=Search(exact=True)
            ),
            times,
        )
        alone = seconds(
            lambda batch_queries=batch_queries: part.index.search(batch_queries, K), min(times, 3)
        )
        as_installed, as_was = [], []
        for threshold, kept in ((128_000, as_installed), (20, as_was)):
            faiss.cvar.distance_compute_blas_threshold = threshold
            kept += seconds(lambda batch_queries=batch_queries: flat.search(batch_queries, K), min(times, 3))
        faiss.cvar.distance_compute_blas_threshold = 1
        limit = max(median(blas), read)
        lines.append(
            [
                batch,
                spread(index),
                spread(ours),
                f"{median(blas) * 1e3:.2f}",
                f"{read * 1e3:.2f}",
                f"{limit / median(index):.2f}",
                f"{median(as_installed) * 1e3:.1f}",
                f"{median(as_was) * 1e3:.1f}",
                f"{median(alone) * 1e3:.1f}",
            ]
        )
    header = [
        "queries",
        "index, exact, ms (10th to 90th percentile)",
        "one pass over the store's rows, ms",
        "BLAS alone, float32 in memory, ms",
        "reading the float16 rows, one core, ms",
        "limit / index",
        "FAISS FlatIP as installed, ms",
        "FlatIP with BLAS from 20 queries, ms",
        "FAISS float16 flat, ms",
    ]
    return "Exact search, 5 of all entries. The limit is the slower of BLAS and reading.\n\n" + table(
        header, lines
    )


def answers(snapshot: Snapshot, queries: NDArray[np.float32], what: str) -> list[list[object]]:
    """An engine's answers beside raw FAISS and raw LMDB."""
    engine = Engine(snapshot)
    [about] = snapshot.version.index["files"][:1]
    live = Allowed(snapshot.array("live", np.uint8), snapshot.version.entries)
    raw = faiss_index.Part(snapshot.store.index_directory / about["file"], about, live, snapshot.dimension)
    db = snapshot.store.db["entries"]

    def search_params() -> Any:
        return plans.parameters(raw.plan, Search(), K, 1.0, None)

    def answer(vectors: NDArray[np.float32]) -> list[RetrievalColumns]:
        query = engine.query(vectors)
        return list(query.answers(query.find()))

    def look_up(ids: list[int]) -> dict[int, int]:
        votes: dict[int, int] = {}
        with snapshot.store.env.begin() as txn:
            for i in ids:
                for tag in decode_hot(txn.get(U64.pack(i), db=db))[1]:
                    votes[tag] = votes.get(tag, 0) + 1
        return votes

    ids = [engine.nearest(q[None], Search(k=K))[0][0] for q in queries]
    truth = [engine.nearest(q[None], Search(k=K, exact=True))[0][0] for q in queries[:200]]
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(ids, truth, strict=False)])
    costs: dict[str, list[float]] = {"faiss": [], "lmdb": [], "engine": [], "values": []}
    cpu: list[float] = []
    for position, query in enumerate(queries):
        one = query[None]
        for name, work in (
            ("faiss", lambda one=one: raw.index.search(one, K, params=search_params())),
            ("lmdb", lambda position=position: look_up(ids[position])),
            ("engine", lambda one=one: answer(one)),
            ("values", lambda one=one: engine.retrieve(one)),
        ):
            start, before = time.perf_counter(), time.thread_time()
            work()
            costs[name].append(time.perf_counter() - start)
            if name == "engine":
                cpu.append(time.thread_time() - before)
    parts = median(costs["faiss"]) + median(costs["lmdb"])
    p99 = np.percentile(costs["engine"], 99) * 1e3
    batch = np.ascontiguousarray(queries[:64])
    many = median(seconds(lambda: raw.index.search(batch, K, params=search_params()), 7))
    ours = median(seconds(lambda: answer(batch), 7))
    with ThreadPoolExecutor(8) as clients:
        each = [queries[i::8] for i in range(8)]
        raw_8 = median(
            seconds(
                lambda: list(
                    clients.map(
                        lambda batch_queries: [
                            raw.index.search(q[None], K, params=search_params()) for q in batch_queries
                        ],
                        each,
                    )
                ),
                3,
            )
        )
        ours_8 = median(
            seconds(
                lambda: list(
                    clients.map(lambda batch_queries: [answer(q[None]) for q in batch_queries], each)
                ),
                3,
            )
        )
    return [
        [f"{what}: recall@5 of 200 queries", f"{recall:.3f}"],
        [
            f"{what}: raw FAISS / raw LMDB, p50 ms",
            f"{median(costs['faiss']) * 1e3:.3f} / {median(costs['lmdb']) * 1e3:.3f}",
        ],
        [f"{what}: engine, p50 / p99 ms", f"{median(costs['engine']) * 1e3:.3f} / {p99:.3f}"],
        [f"{what}: engine, CPU of it, p50 ms", f"{median(cpu) * 1e3:.3f}"],
        [f"{what}: engine with values made of it, p50 ms", f"{median(costs['values']) * 1e3:.3f}"],
        [f"{what}: engine / (FAISS + LMDB)", f"{median(costs['engine']) / parts:.2f}"],
        [f"{what}: batch of 64, engine / raw FAISS alone, queries/s", f"{64 / ours:,.0f} / {64 / many:,.0f}"],
        [
            f"{what}: 8 threads, engine / raw FAISS alone, queries/s",
            f"{len(queries) / ours_8:,.0f} / {len(queries) / raw_8:,.0f}",
        ],
    ]


COLD = """
import sys, time
start = time.perf_counter()
import numpy as np
numpy_there = time.perf_counter()
import faiss
faiss_there = time.perf_counter()
from tagstore.retrieval.engine import Engine
from tagstore.storage.store import Store
imported = time.perf_counter()
engine = Engine(Store(sys.argv[1], sys.argv[2]).snapshot(int(sys.argv[3])))
opened = time.perf_counter()
query = np.ones((1, engine.fingerprint.dimension), np.float32)
engine.retrieve(query)
times = [start, numpy_there, faiss_there, imported, opened, time.perf_counter()]
print(*(later - earlier for earlier, later in zip(times, times[1:])), flush=True)
"""


def cold(root: Path, snapshot: Snapshot, what: str, times: int) -> list[list[object]]:
    """A fresh process to its first answer, and where its time goes."""
    arguments = [sys.executable, "-c", COLD, str(root), synthetic.STORE, str(snapshot.version.number)]
    runs = []
    for _ in range(times):
        start = time.perf_counter()
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            stages = [float(x) for x in process.stdout.readline().split()]
            runs.append([time.perf_counter() - start, *stages])
    whole, *stages = (median(column) for column in zip(*runs, strict=True))
    named = zip(("numpy", "faiss", "ours", "open", "query"), stages, strict=True)
    rest = whole - sum(stages)
    said = ", ".join(f"{name} {value * 1e3:.0f}" for name, value in named)
    return [
        [
            f"{what}: process start to first answer, ms",
            f"{whole * 1e3:.0f} (interpreter {rest * 1e3:.0f}, {said})",
        ]
    ]


def released(snapshot: Snapshot, queries: NDArray[np.float32], what: str) -> list[list[object]]:
    """Resident MiB before an engine, with a warm one, and after its end; database pages stay."""
    gc.collect()
    before = round(sum(memory_mib()))
    engine = Engine(snapshot)
    for query in queries:
        engine.retrieve(query[None])
    warm = round(sum(memory_mib()))
    del engine
    gc.collect()
    return [
        [f"{what}: resident MiB before / warm / released", f"{before} / {warm} / {sum(memory_mib()):.0f}"]
    ]


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument(
        "--directory", type=Path, help="where the store is kept; a temporary one if not given"
    )
    parser.add_argument("--quick", action="store_true", help="20,000 entries and few repetitions")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.entries = 20_000
    with tempfile.TemporaryDirectory() as scratch:
        measure(
            arguments.directory or Path(scratch),
            arguments.entries,
            arguments.dimension,
            3 if arguments.quick else 9,
        )


def measure(root: Path, n: int, dimension: int, times: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    if not (root / synthetic.STORE).exists():
        synthetic.build(root, n, dimension)
    store = Store(root, synthetic.STORE)
    by_kind = {version.index["kind"]: version.number for version in store.versions()}
    queries = synthetic.queries(500 if times > 3 else 100, n, dimension)
    built = "there from an earlier run"
    if "hnsw" not in by_kind:
        start = time.perf_counter()
        outcome = build_index(root, synthetic.STORE, Budget(recall=0.95), kind="hnsw")
        by_kind["hnsw"], built = (
            outcome.version.number,
            f"{time.perf_counter() - start:.0f} s, tuning included",
        )
    graph, flat = (store.snapshot(by_kind[kind]) for kind in ("hnsw", "flat"))
    assert graph.version.entries == n, (
        f"{root} holds a store of {graph.version.entries} entries: give another directory"
    )
    lines: list[list[object]] = [
        ["hnsw: built in", built],
        ["hnsw: searched with", str(dict(graph.version.index["tuned"]["search"]))],
    ]
    for snapshot, what in ((flat, "flat"), (graph, "hnsw")):
        lines += released(snapshot, queries, what)
    for snapshot, what in ((graph, "hnsw"), (flat, "flat")):
        lines += answers(snapshot, queries if what == "hnsw" else queries[:100], what)
        lines += cold(root, snapshot, what, times)
    write(
        f"index-{n}",
        f"Search in {n:,} entries of {dimension} dimensions",
        table(["figure", "value"], lines),
        exactly(flat, queries, times),
        packages=("faiss-cpu", "lmdb", "numpy"),
    )


if __name__ == "__main__":
    main()
