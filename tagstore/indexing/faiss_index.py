"""The index of a version: a list of files, each of a run of entry ids, memory-mapped on open.

A commit writes one small flat file for what it added and merges it with the files before it while they are
not much larger, like the carry of a binary counter: there are few files, and every entry is written few
times. A tuned file (`upkeep/tuning.py`) is the first and is never merged. Later entries are searched exactly
beside it, and `stale` tells when it should be built again. Dead entries are masked in the search.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import faiss
import numpy as np
from numpy.typing import NDArray

from tagstore.errors import Damaged, InvalidInput
from tagstore.indexing import exact, plans
from tagstore.indexing.plans import Advance, Plan
from tagstore.indexing.protocol import PLAIN
from tagstore.storage.generations import sync_directory
from tagstore.storage.rows import Allowed, widened
from tagstore.storage.snapshot import Snapshot
from tagstore.storage.version import Version
from tagstore.types import Search, Vectors

FLAT = {"kind": "flat", "codes": "float16", "metric": "inner product"}
MERGE_SIZE_RATIO = 2
"""A file is merged with what follows it unless it has more than this many times the rows."""
MAX_ROWS = 1 << 20
"""Rows of a flat file at most, which is built in memory: 1 GiB at 512 dimensions."""
STALE_SHARE = 0.2
"""Share of entries beside a tuned file, or dead in it, above which it should be built again."""
MAX_SCAN_QUERIES = 6
"""Queries for which FAISS scans float16 codes, once each; for more, one pass of `exact` is faster."""
ROWS_PER_THREAD = 1 << 16
"""Rows of a flat file that are worth a thread of their own."""
CACHED_PARAMETERS = 64
"""Combinations of k and options whose FAISS search parameters are kept; building them takes 5 us."""
MIN_ALLOWED_SHARE = 0.05
"""Share of entries below which a filter is answered exactly: approximate search would visit nearly all."""


def extend(
    snapshot: Snapshot,
    parent: Version | None,
    directory: Path,
    *,
    whole: bool = False,
    advance: Advance = lambda *_: None,
) -> Mapping[str, Any]:
    """Build the index of a version that is about to be committed; returns what the version says of it.

    It shares the parent's files and writes what came since, or, if `whole`, everything; then a tuned index
    gets the kind and parameters that it had. Files are synced before this returns; a file that a version
    names is never changed.
    """
    about = snapshot.version.index or (parent.index if parent else {})
    # other embeddings of the tags have a space of their own, with the same vectors
    same_vectors = parent is not None and parent.fingerprint.digest == snapshot.version.fingerprint.digest
    files = list(parent.index["files"]) if parent is not None and same_vectors and not whole else []
    live = snapshot.live()
    if whole and len(live) and about.get("tuned", FLAT)["kind"] != "flat":
        try:
            plan = _fitted(plan_of(about["tuned"]), len(live), snapshot.dimension)
            files = [
                write(snapshot, plan, live, 0, snapshot.version.next_entry_id, directory, advance=advance)
            ]
        except InvalidInput:
            about = FLAT  # too few entries are left for such an index
    elif not (files and tuned(files[0])):
        about = FLAT
    first = files[-1]["end"] if files else 0
    rows = int(np.count_nonzero(live >= first))
    while (
        files
        and not tuned(files[-1])
        and files[-1]["rows"] <= MERGE_SIZE_RATIO * rows
        and files[-1]["rows"] + rows <= MAX_ROWS
    ):
        first = files.pop()["first"]
        rows = int(np.count_nonzero(live >= first))
    # a file with mostly dead rows costs every search more than it finds
    while files and not tuned(files[-1]) and _alive(live, files[-1]) * 2 < files[-1]["rows"]:
        first = files.pop()["first"]
        rows = int(np.count_nonzero(live >= first))
    new = live[live >= first]
    for start in range(0, len(new), MAX_ROWS):
        ids = new[start : start + MAX_ROWS]
        end = int(new[start + MAX_ROWS]) if start + MAX_ROWS < len(new) else snapshot.version.next_entry_id
        files.append(write(snapshot, Plan("flat"), ids, first, end, directory, advance=advance))
        first = end
    return record(about, files, live)


def record(about: Mapping[str, Any], files: list[dict[str, Any]], live: NDArray[np.int64]) -> dict[str, Any]:
    """What a version says of its index: kind and parameters, how stale it is, its files."""
    kept = {k: v for k, v in about.items() if k not in ("files", "stale")}
    if not (files and tuned(files[0])):
        return {**kept, "files": files}
    beside = 1 - _alive(live, files[0]) / max(1, len(live))
    dead = 1 - _alive(live, files[0]) / max(1, files[0]["rows"])
    stale = {
        "beside": round(beside, 4),
        "dead": round(dead, 4),
        "rebuild": beside > STALE_SHARE or dead > STALE_SHARE,
    }
    return {**kept, "stale": stale, "files": files}


def tuned(file: Mapping[str, Any]) -> bool:
    """Whether `build-index` made a file."""
    return "plan" in file


def plan_of(value: Mapping[str, Any]) -> Plan:
    """The plan that `Plan.as_json` wrote."""
    return Plan(value["kind"], value["build"], value["search"])


def _fitted(plan: Plan, rows: int, dimension: int) -> Plan:
    """The plan with no more lists than so many rows can train."""
    if "lists" not in plan.build:
        return plan
    lists = min(plan.build["lists"], plans.plan_for(plan.kind, rows, dimension).build["lists"])
    return Plan(plan.kind, {**plan.build, "lists": lists}, plan.search)


def _alive(live: NDArray[np.int64], file: Mapping[str, Any]) -> int:
    """Count the entries of a file that live."""
    return int(np.count_nonzero((live >= file["first"]) & (live < file["end"])))


@exact.on_cores(1)
def write(
    snapshot: Snapshot,
    plan: Plan,
    ids: NDArray[np.int64],
    first: int,
    end: int,
    directory: Path,
    *,
    advance: Advance = lambda *_: None,
    held_out: NDArray[np.int64] = np.zeros(0, np.int64),  # noqa: B008  never written to
    name: str = "",
    gpu: int | None = None,
) -> dict[str, Any]:
    """Build and sync one file; returns what the version says of it.

    Uses one thread, so that the same entries give the same bytes.
    """
    index = plans.build(plan, ids, snapshot.dimension, snapshot.vector_blocks, advance, held_out, gpu)
    if not directory.exists():
        directory.mkdir()
        sync_directory(directory.parent)
    path = directory / f"{snapshot.version.number:08d}-{first:012d}-{end:012d}{name}.faiss"
    temporary = path.with_suffix(".tmp")
    digest = hashlib.sha256()
    with temporary.open("wb") as file:

        def put(piece: bytes) -> int:
            digest.update(piece)
            return file.write(piece)

        # not by file name: FAISS ignores a full disk when it closes its file
        faiss.write_index(index, faiss.PyCallbackIOWriter(put, 1 << 20))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(directory)
    about = {
        "file": path.name,
        "first": first,
        "end": end,
        "rows": len(ids),
        "bytes": path.stat().st_size,
        "sha256": digest.hexdigest(),
    }
    return about if plan == Plan("flat") else {**about, "plan": plan.as_json()}


class Part:
    """One index file, opened."""

    def __init__(self, path: Path, about: Mapping[str, Any], live: Allowed, dimension: int) -> None:
        self.plan = plan_of(about["plan"]) if "plan" in about else Plan("flat")
        self.index = open_file(path, about, dimension)
        self.first, self.end, self.rows = about["first"], about["end"], about["rows"]
        self._dimension = dimension
        self.alive = live.between(self.first, self.end)
        self.holds_vectors = plans.holds_vectors(self.plan)
        """Whether `vectors` may be called."""
        if self.holds_vectors:
            self._codes = plans.codes_of(self.plan, self.index)
            self._ids = None if self.rows == self.end - self.first else plans.ids_of(self.plan, self.index)
        self._unfiltered = lru_cache(CACHED_PARAMETERS)(partial(_unfiltered_parameters, self.plan))

    def vectors(self, ids: NDArray[np.int64]) -> Vectors:
        """Stored vectors of the file's entries, `[n, D]` float32 in memory of their own, read from the index.

        They equal the numbers in the store: `tagstore verify` compares file, checksum and store.
        """
        codes = self._codes.take(ids - self.first if self._ids is None else np.searchsorted(self._ids, ids))
        if self.plan.kind == "flat32":
            return codes.view(np.float32).reshape(len(ids), self._dimension)
        return widened(codes.view(np.float16)).reshape(len(ids), self._dimension)

    def search(
        self, queries: Vectors, k: int, allowed: Allowed | None, live: Allowed, search: Search
    ) -> exact.Candidates:
        """Find the best of the file's entries, by the index's own arithmetic; -1 where there are no more."""
        count, bits = self.alive, live
        if allowed is not None:
            count, bits = allowed.between(self.first, self.end), allowed
        if not count:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        selector = faiss.IDSelectorBitmap(bits.bits) if count < self.rows else None
        k = min(plans.candidates(self.plan, k), count)
        parts = min(exact.cores(), self.rows // ROWS_PER_THREAD)
        if self.plan.kind == "flat" and len(queries) == 1 and parts > 1:
            return self._search_split_rows(queries, k, selector, parts)
        share = count / self.rows
        if len(queries) == 1 or self.plan.kind in ("flat", "hnsw"):
            # FAISS divides the queries itself: threads of ours would wait for the interpreter
            with exact.on_cores(min(exact.cores(), len(queries))):
                return self._search_file(queries, k, self._parameters(search, k, share, selector))
        return self._search_split_queries(queries, k, search, share, selector)

    def _parameters(self, search: Search, k: int, share: float, selector: Any) -> Any:
        if selector is None:
            return self._unfiltered(k, search.ef_search, search.nprobe)
        return plans.parameters(self.plan, search, k, share, selector)

    def _search_file(self, queries: Vectors, k: int, parameters: Any) -> exact.Candidates:
        """Call `self.index.search` without the checks and conversions of its wrapper."""
        shape = len(queries), k
        similarities, ids = np.empty(shape, np.float32), np.empty(shape, np.int64)
        self.index.search_c(
            shape[0],
            faiss.swig_ptr(queries),
            k,
            faiss.swig_ptr(similarities),
            faiss.swig_ptr(ids),
            parameters,
        )
        return similarities, ids

    def _search_split_queries(
        self, queries: Vectors, k: int, search: Search, share: float, selector: Any
    ) -> exact.Candidates:
        """Divide the queries among the cores.

        With lists each query is searched by itself: a matrix product decides which lists are nearest, and its
        last bits depend on its size.
        """
        parts = min(exact.cores(), len(queries))
        step = 1 if "lists" in self.plan.build else -(-len(queries) // parts)
        starts = range(0, len(queries), step)

        def search_part(part: int) -> list[exact.Candidates]:
            return [
                self._search_file(queries[i : i + step], k, self._parameters(search, k, share, selector))
                for i in starts[part::parts]
            ]

        by_part = exact.in_parallel(search_part, parts)
        rows = [by_part[n % parts][n // parts] for n in range(len(starts))]
        return np.concatenate([s for s, _ in rows]), np.concatenate([i for _, i in rows])

    def _search_split_rows(self, queries: Vectors, k: int, selector: Any, parts: int) -> exact.Candidates:
        """Divide the rows among the cores."""
        edges = np.linspace(self.first, self.end, parts + 1).astype(np.int64).tolist()

        def scan(part: int) -> exact.Candidates:
            run = faiss.IDSelectorRange(edges[part], edges[part + 1])
            sel = faiss.IDSelectorAnd(run, selector) if selector is not None else run
            return self._search_file(queries, k, faiss.SearchParameters(sel=sel))

        return exact.merged(exact.in_parallel(scan, parts), k)


def _unfiltered_parameters(plan: Plan, k: int, ef_search: int, nprobe: int) -> Any:
    """Search parameters without a selector, which threads may share because FAISS only reads them."""
    return plans.parameters(plan, Search(ef_search=ef_search, nprobe=nprobe), k, 1.0, None)


class FaissIndex:
    """The index of a version, opened. Safe for threads; never changed after it is opened."""

    tolerance = 1e-5

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._about = snapshot.version.index
        self._entries = snapshot.version.entries
        self._live = Allowed(snapshot.array("live", np.uint8), self._entries)
        directory = snapshot.store.index_directory
        self.parts = [
            Part(directory / about["file"], about, self._live, snapshot.dimension)
            for about in self._about["files"]
        ]
        self._exact = all(part.plan.exact for part in self.parts)
        covered = sum(part.alive for part in self.parts)
        if covered != self._entries:
            raise Damaged(
                f"the index of version {snapshot.version.number} of store '{snapshot.store.name}' covers "
                f"{covered} of its {self._entries} entries: run `tagstore repair`"
            )

    def search(
        self, queries: Vectors, k: int, *, allowed: Allowed | None = None, search: Search = PLAIN
    ) -> NDArray[np.int64]:
        count = self._entries if allowed is None else allowed.count
        k = min(k, count)
        queries = np.ascontiguousarray(queries, np.float32)
        if not k:
            return np.zeros((len(queries), 0), np.int64)
        everything = allowed or self._live
        scarce = count < MIN_ALLOWED_SHARE * self._entries or 2 * k > count
        if ((search.exact or scarce) and not self._exact) or (
            self._exact and len(queries) > MAX_SCAN_QUERIES
        ):
            return exact.search(self._snapshot, queries, k, everything)[1]
        candidates = []
        for part in self.parts:
            if part.plan.exact and len(queries) > MAX_SCAN_QUERIES:
                run = exact.search(self._snapshot, queries, k, everything, part.first, part.end)
            else:
                run = self.refined(part, queries, part.search(queries, k, allowed, self._live, search))
            candidates.append(run)
        enough = len(candidates) == 1 and candidates[0][1].shape[1] >= k
        ids = candidates[0][1][:, :k] if enough else exact.merged(candidates, k)[1]
        if not self._exact and (ids[:, -1] < 0).any():
            # an approximate search may end before it has found enough: these queries are searched exactly
            short = np.flatnonzero((ids < 0).any(axis=1))
            ids = np.array(ids)
            ids[short] = exact.search(self._snapshot, queries[short], k, everything)[1]
        return np.asarray(ids)

    def refined(self, part: Part, queries: Vectors, candidates: exact.Candidates) -> exact.Candidates:
        """Rank candidates of compressed codes again, by the similarities of the stored vectors."""
        if "refine" not in part.plan.search or not candidates[1].size:
            return candidates
        similarities, ids = np.array(candidates[0]), candidates[1]
        for row in range(len(queries)):
            there = np.flatnonzero(ids[row] >= 0)
            similarities[row, there] = self._snapshot.vectors(ids[row, there]) @ queries[row]
        return exact.merged([(similarities, ids)], ids.shape[1])

    def describe(self) -> Mapping[str, Any]:
        return self._about


_open: WeakValueDictionary[tuple[str, int, int], Any] = WeakValueDictionary()
"""Open files by path, inode and time: the next version shares most of them, and their pages are in memory."""


def open_file(path: Path, about: Mapping[str, Any], dimension: int) -> Any:
    """Map an index file into memory. Raises `Damaged` if it can't be read or holds something else."""
    rows = about["rows"]
    try:
        status = path.stat()
        if status.st_size < about["bytes"]:
            # FAISS reads beyond the end of what it maps, and that is SIGBUS
            raise OSError(f"{status.st_size} bytes instead of {about['bytes']}")
        key = str(path), status.st_ino, status.st_mtime_ns
        index = _open.get(key)
        if index is None:
            index = _open[key] = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except (OSError, RuntimeError) as error:
        raise Damaged(
            f"the index file {path} cannot be read: it is missing, cut off or no FAISS index. Run `tagstore "
            "repair`"
        ) from error
    if index.ntotal != rows or index.d != dimension:
        raise Damaged(
            f"the index file {path} holds {index.ntotal} vectors of {index.d} dimensions instead of {rows} "
            f"of {dimension}: run `tagstore repair`"
        )
    return index
