"""Exact search at the speed of memory: inner products with every stored row, some blocks of rows at a time.

FAISS's own flat search is far slower in the wheels of 1.15. It uses BLAS only from 128,000 queries on
(`distance_compute_blas_threshold`, 20 in earlier releases); below that its float32 kernel runs at a quarter
of memory bandwidth, and over float16 codes it reads all of them again for every query. Here the rows are read
once for all queries, straight from the memory-mapped store: blocks that fit a core's cache become float32 and
are multiplied by FAISS's BLAS, one thread a block. (numpy's BLAS stalls on its own pool when several threads
call it: 10 to 20 times slower.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from tagstore.storage.rows import BLOCK_ROWS, Allowed
from tagstore.storage.snapshot import Snapshot
from tagstore.types import Vectors

# knn() below uses BLAS whatever the number of queries
faiss.cvar.distance_compute_blas_threshold = 1

SCAN_ROWS = 4 * BLOCK_ROWS
"""Rows that are multiplied at once, whole blocks of the store: 2 MiB at 512 dimensions."""
QUERY_MULTIPLE = 4
"""Queries are padded to a multiple of this: BLAS takes a third longer for 7 of them than for 8."""
MAX_HELD = 1 << 22
"""Candidates that a thread holds before it cuts them to the best again: 48 MiB."""

Candidates = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Similarities and entry ids of candidates, `[N, M]` each; -inf and -1 where there are not enough."""

_lock = Lock()
_pool: ThreadPoolExecutor | None = None
T = TypeVar("T")


def cores() -> int:
    """Count the processors that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def on_cores(cores: int) -> Iterator[None]:
    """Make FAISS use so many cores in this thread: one for a single query, as waking more costs more.

    The number is restored at the end: FAISS and torch may share one OpenMP, and the last bits of a vector
    depend on how many cores torch has for it.
    """
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(cores)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def in_parallel(work: Callable[[int], T], parts: int) -> list[T]:
    """Run `work(0)` to `work(parts - 1)` on threads in which FAISS uses one core each."""
    global _pool
    if parts == 1:
        with on_cores(1):
            return [work(0)]
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(
                cores(), thread_name_prefix="scan", initializer=faiss.omp_set_num_threads, initargs=(1,)
            )
        pool = _pool
    return list(pool.map(work, range(parts)))


def _forget_pool() -> None:
    global _pool, _lock
    _pool, _lock = None, Lock()  # a forked child has none of its parent's threads


os.register_at_fork(after_in_child=_forget_pool)


def search(
    snapshot: Snapshot, queries: Vectors, k: int, allowed: Allowed, first: int = 0, end: int | None = None
) -> Candidates:
    """Find the best `k` allowed entries with ids in `[first, end)`: `[N, k]`, best first, equal ones by id.

    Raises `Damaged` if rows are missing.
    """
    end = min(snapshot.version.next_entry_id if end is None else end, 8 * len(allowed.bits))
    starts = range(first - first % BLOCK_ROWS, end, SCAN_ROWS)
    count = len(queries)
    queries = np.ascontiguousarray(queries, np.float32)
    if count > 2 and count % QUERY_MULTIPLE:
        queries = np.pad(queries, ((0, -count % QUERY_MULTIPLE), (0, 0)))
    parts = max(1, min(cores(), len(starts) // 4))

    def scan(part: int) -> Candidates:
        best = _Best(len(queries), k)
        runs = [range(max(first, start), min(end, start + SCAN_ROWS)) for start in starts[part::parts]]
        for ids, rows in snapshot.scan_vectors(runs, allowed):
            similarities, best_rows = faiss.knn(queries, rows, min(k, len(rows)), faiss.METRIC_INNER_PRODUCT)
            best.add(similarities, ids[best_rows])
        return best.take()

    similarities, ids = merged(in_parallel(scan, parts), k)
    return similarities[:count], ids[:count]


def merged(lists: list[Candidates], k: int) -> Candidates:
    """Merge lists into the best `k`, best first, equal ones by id."""
    similarities = np.concatenate([s for s, _ in lists], axis=1)
    ids = np.concatenate([i for _, i in lists], axis=1)
    similarities[ids < 0] = -np.inf
    if similarities.shape[1] < k:
        missing = ((0, 0), (0, k - similarities.shape[1]))
        similarities = np.pad(similarities, missing, constant_values=-np.inf)
        ids = np.pad(ids, missing, constant_values=-1)
    order = np.lexsort((ids, -similarities), axis=1)[:, :k]
    return np.take_along_axis(similarities, order, axis=1), np.take_along_axis(ids, order, axis=1)


class _Best:
    """The best k of the candidates that one thread has seen; sorted only at the end."""

    def __init__(self, queries: int, k: int) -> None:
        self._k, self._room = k, max(4 * k, MAX_HELD // max(1, queries))
        self._held: list[Candidates] = []
        self._queries, self._width = queries, 0

    def add(self, similarities: NDArray[np.float32], ids: NDArray[np.int64]) -> None:
        self._held.append((similarities, ids))
        self._width += ids.shape[1]
        if self._width > self._room:
            self._held = [self.take()]
            self._width = self._held[0][1].shape[1]

    def take(self) -> Candidates:
        if not self._held:
            return np.zeros((self._queries, 0), np.float32), np.zeros((self._queries, 0), np.int64)
        similarities = np.concatenate([s for s, _ in self._held], axis=1)
        ids = np.concatenate([i for _, i in self._held], axis=1)
        if ids.shape[1] <= self._k:
            return similarities, ids
        best = np.argpartition(-similarities, self._k - 1, axis=1)[:, : self._k]
        return np.take_along_axis(similarities, best, axis=1), np.take_along_axis(ids, best, axis=1)
