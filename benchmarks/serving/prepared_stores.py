"""The measured stores: built once, kept in a directory, never opened by the process that queries them.

A store of N entries has two versions of the same content: `FLAT` with the exact index of an ingest, and the
current one with an HNSW tuned to recall@5. It is tuned on queries like those of the benchmark, but not the
same.
"""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.synthetic import STORE, build, queries

FLAT, CURRENT = 1, 0
"""Versions."""
RECALL, TUNED_RECALL = 0.95, 0.96
"""Recall@5 required of the benchmark's queries, and the goal on the tuning queries."""
TUNING_SEED = 11
INGESTED_PER_SECOND, LINKED_PER_SECOND = 2500, 3000
"""Entries a second on one idle core, roughly; for the announced time."""


def build_seconds(directory: Path, sizes: Sequence[int]) -> float:
    """Seconds that `prepare` will take: two stores are built at a time, so those of the largest."""
    missing = [n for n in sizes if not (directory / str(n) / STORE).exists()]
    return max((n / INGESTED_PER_SECOND + n / LINKED_PER_SECOND for n in missing), default=0.0)


def prepare(directory: Path, sizes: Sequence[int], dimension: int) -> dict[int, Path]:
    """The roots of stores of these sizes under a directory; missing ones are built, two at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        roots = {n: pool.submit(_prepare, directory, n, dimension) for n in sorted(sizes, reverse=True)}
        return {n: roots[n].result() for n in sizes}


def _prepare(directory: Path, n: int, dimension: int) -> Path:
    from tagstore.storage.store import Store
    from tagstore.upkeep.tuning import Budget, build_index

    root, partial = directory / str(n), directory / f"{n}.part"
    if not (root / STORE).exists():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        start = time.perf_counter()
        build(partial, n, dimension)
        partial.rename(root)
        print(f"{n:,} entries ingested in {time.perf_counter() - start:.0f} s", flush=True)
    if Store(root, STORE).snapshot().version.index["kind"] != "hnsw":
        path = root / "tuning-queries.npy"
        np.save(path, queries(1000, n, dimension, TUNING_SEED))
        start = time.perf_counter()
        chosen = build_index(
            root, STORE, Budget(recall=TUNED_RECALL), kind="hnsw", queries=path, device="cpu"
        ).chosen
        plan, took = {**chosen.plan.build, **chosen.plan.search}, time.perf_counter() - start
        print(
            f"{n:,} entries: hnsw {plan}, recall {chosen.recall:.3f} on its queries, {took:.0f} s", flush=True
        )
    kinds = [Store(root, STORE).snapshot(number or None).version.index["kind"] for number in (FLAT, CURRENT)]
    if kinds != ["flat", "hnsw"]:
        raise RuntimeError(f"the store in {root} has indexes {kinds}, not flat and hnsw: remove the folder")
    return root
