"""The stores that are measured: made once, kept where one says, and never opened by the process that asks for them.

A store of N entries has two versions of the same content: `FLAT` with the index that an ingest makes, which is exact, and the current one
with an HNSW that is tuned to recall@5 on queries like those that will be asked, but not the same ones.
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
RECALL, TUNED = 0.95, 0.96
"""What is wanted of the queries that are asked, and so what the index is tuned to on others: they differ by chance."""
TUNING_SEED = 11
INGESTED_PER_SECOND, LINKED_PER_SECOND = 2500, 3000
"""On one core that nobody else uses, roughly; for the time that is said before."""


def needed(directory: Path, sizes: Sequence[int]) -> float:
    """Seconds that `prepared` will take for what is not there yet: two stores at a time, so those of the largest."""
    return max(
        (
            n / INGESTED_PER_SECOND + n / LINKED_PER_SECOND
            for n in sizes
            if not (directory / str(n) / STORE).exists()
        ),
        default=0.0,
    )


def prepared(directory: Path, sizes: Sequence[int], dimension: int) -> dict[int, Path]:
    """The roots of stores of these sizes under a directory, made where they are not there; several at a time."""
    directory.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        made = {n: pool.submit(_prepared, directory, n, dimension) for n in sorted(sizes, reverse=True)}
        return {n: made[n].result() for n in sizes}


def _prepared(directory: Path, n: int, dimension: int) -> Path:
    from tagstore.storage.store import Store
    from tagstore.upkeep.tuning import Budget, build_index

    root, part = directory / str(n), directory / f"{n}.part"
    if not (root / STORE).exists():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        start = time.perf_counter()
        build(part, n, dimension)
        part.rename(root)
        print(f"{n:,} entries ingested in {time.perf_counter() - start:.0f} s", flush=True)
    if Store(root, STORE).snapshot().version.index["kind"] != "hnsw":
        held_out = root / "tuning-queries.npy"
        np.save(held_out, queries(1000, n, dimension, TUNING_SEED))
        start = time.perf_counter()
        outcome = build_index(root, STORE, Budget(recall=TUNED), kind="hnsw", queries=held_out, device="cpu")
        plan = {**outcome.chosen.plan.build, **outcome.chosen.plan.search}
        took = time.perf_counter() - start
        print(
            f"{n:,} entries: hnsw {plan}, recall {outcome.chosen.recall:.3f} on its own queries, in {took:.0f} s",
            flush=True,
        )
    kinds = [
        Store(root, STORE).snapshot(version or None).version.index["kind"] for version in (FLAT, CURRENT)
    ]
    if kinds != ["flat", "hnsw"]:
        raise RuntimeError(
            f"the store in {root} has indexes {kinds}, not flat and hnsw: remove it, and it is made anew"
        )
    return root
