"""The index of a version: a list of files, each of a run of entry ids, memory-mapped on open.

A commit writes one small flat file for what it added and merges it with the files before it while they are not much larger (as a
binary counter carries), so there are few files, and every entry is written few times. A tuned file (`tuning.py`) stands first
and is never merged: what comes after it is searched exactly beside it, and `stale` says when it is time to build it anew.
Entries that died are masked in the search.
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
from tagstore.indexing.protocol import PLAIN, Allowed
from tagstore.storage.generations import sync_directory
from tagstore.storage.rows import widened
from tagstore.storage.store import Snapshot
from tagstore.storage.version import Version
from tagstore.types import Search, Vectors

ABOUT = {"kind": "flat", "codes": "float16", "metric": "inner product"}
MERGE = 2
"""A file is merged with what follows it unless it has more than this many times the rows."""
MAX_ROWS = 1 << 20
"""Of a flat file, which is built in memory: 1 GiB at 512 dimensions, whatever the size of the store."""
STALE = 0.2
"""Share of entries beside a tuned file, or dead in it, from which on it should be built anew."""
FEW_QUERIES = 6
"""Up to so many, FAISS reads the float16 codes for each of them at the speed of memory; beyond, one pass of `exact` for all is faster."""
SPLIT_ROWS = 1 << 16
"""Rows of a flat file that are worth a thread of their own."""
WHOLE_KEPT = 64
"""Combinations of k and options for which what FAISS is told is kept; making it anew takes 5 us."""
FEW_ALLOWED = 0.05
"""Share of entries below which a filter is answered exactly: an approximate search would visit nearly everything to find them."""


def extend(
    snapshot: Snapshot,
    parent: Version | None,
    directory: Path,
    *,
    whole: bool = False,
    advance: Advance = lambda *_: None,
) -> Mapping[str, Any]:
    """The index of a version that is about to be committed: the parent's files and what came since, or, if `whole`, all anew.

    A tuned index that is made anew gets the kind and numbers that it had. Files are synced to disk before this returns; none that a
    version names is ever changed.
    """
    about = snapshot.version.index or (parent.index if parent else {})
    same_space = parent is not None and parent.space == snapshot.version.space
    files = list(parent.index["files"]) if parent is not None and same_space and not whole else []
    live = snapshot.live()
    if whole and len(live) and about.get("tuned", ABOUT)["kind"] != "flat":
        try:
            plan = _fitted(plan_of(about["tuned"]), len(live), snapshot.dimension)
            files = [
                write(snapshot, plan, live, 0, snapshot.version.next_entry_id, directory, advance=advance)
            ]
        except InvalidInput:
            about = ABOUT  # too few are left for such an index
    elif not (files and tuned(files[0])):
        about = ABOUT
    first = files[-1]["end"] if files else 0
    rows = int(np.count_nonzero(live >= first))
    while (
        files
        and not tuned(files[-1])
        and files[-1]["rows"] <= MERGE * rows
        and files[-1]["rows"] + rows <= MAX_ROWS
    ):
        first = files.pop()["first"]
        rows = int(np.count_nonzero(live >= first))
    # a file of which most rows are dead costs every search more than it gives
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
    """What a version says of its index: kind and numbers, how stale it is, its files."""
    kept = {k: v for k, v in about.items() if k not in ("files", "stale")}
    if not (files and tuned(files[0])):
        return {**kept, "files": files}
    beside = 1 - _alive(live, files[0]) / max(1, len(live))
    dead = 1 - _alive(live, files[0]) / max(1, files[0]["rows"])
    stale = {"beside": round(beside, 4), "dead": round(dead, 4), "rebuild": beside > STALE or dead > STALE}
    return {**kept, "stale": stale, "files": files}


def tuned(file: Mapping[str, Any]) -> bool:
    """Whether a file is one that `build-index` made."""
    return "plan" in file


def plan_of(value: Mapping[str, Any]) -> Plan:
    return Plan(value["kind"], value["build"], value["search"])


def _fitted(plan: Plan, rows: int, dimension: int) -> Plan:
    """The plan, with no more lists than so many rows can teach."""
    if "lists" not in plan.build:
        return plan
    lists = min(plan.build["lists"], plans.plan_for(plan.kind, rows, dimension).build["lists"])
    return Plan(plan.kind, {**plan.build, "lists": lists}, plan.search)


def _alive(live: NDArray[np.int64], file: Mapping[str, Any]) -> int:
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
    """Build and sync one file; returns what the version says of it. One thread, so that the same entries give the same bytes."""
    index = plans.made(plan, ids, snapshot.dimension, snapshot.vector_blocks, advance, held_out, gpu)
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

        # not by file name: FAISS takes no notice of a disk that is full when it closes its file
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
    """One file, opened."""

    def __init__(self, path: Path, about: Mapping[str, Any], live: Allowed, dimension: int) -> None:
        self.plan = plan_of(about["plan"]) if "plan" in about else Plan("flat")
        self.index = open_file(path, about["rows"], dimension)
        self.first, self.end, self.rows = about["first"], about["end"], about["rows"]
        self._dimension = dimension
        self.alive = live.between(self.first, self.end)
        self.holds_vectors = plans.holds_vectors(self.plan)
        """Whether `vectors` may be called."""
        if self.holds_vectors:
            self._codes = plans.codes_of(self.plan, self.index)
            self._ids = None if self.rows == self.end - self.first else plans.ids_of(self.plan, self.index)
        self._whole = lru_cache(WHOLE_KEPT)(partial(_told_of_the_whole, self.plan))

    def vectors(self, ids: NDArray[np.int64]) -> Vectors:
        """Stored vectors of some entries of the file, `[n, D]` float32 in memory of their own, read where the index lies in memory.

        They are the very numbers that the store keeps: `tagstore verify` compares the file with its checksum and with the store.
        """
        codes = self._codes.take(ids - self.first if self._ids is None else np.searchsorted(self._ids, ids))
        if self.plan.kind == "flat32":
            return codes.view(np.float32).reshape(len(ids), self._dimension)
        return widened(codes.view(np.float16)).reshape(len(ids), self._dimension)

    def search(
        self, queries: Vectors, k: int, allowed: Allowed | None, live: Allowed, search: Search
    ) -> exact.Candidates:
        """The best of the file's entries, by the index's own arithmetic; -1 where it found no more."""
        held, bits = self.alive, live
        if allowed is not None:
            held, bits = allowed.between(self.first, self.end), allowed
        if not held:
            return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
        selector = faiss.IDSelectorBitmap(bits.bits) if held < self.rows else None
        k = min(plans.candidates(self.plan, k), held)
        parts = min(exact.cores(), self.rows // SPLIT_ROWS)
        if self.plan.kind == "flat" and len(queries) == 1 and parts > 1:
            return self._split(queries, k, selector, parts)
        share = held / self.rows
        if len(queries) == 1 or self.plan.kind in ("flat", "hnsw"):
            # FAISS shares queries out by itself, and needs no Python for it: our own threads would wait for the interpreter
            with exact.on_cores(min(exact.cores(), len(queries))):
                return self._ask(queries, k, self._told(search, k, share, selector))
        return self._shared_out(queries, k, search, share, selector)

    def _told(self, search: Search, k: int, share: float, selector: Any) -> Any:
        if selector is None:
            return self._whole(k, search.ef_search, search.nprobe)
        return plans.parameters(self.plan, search, k, share, selector)

    def _ask(self, queries: Vectors, k: int, told: Any) -> exact.Candidates:
        """`self.index.search`, less what its wrapper checks and converts."""
        shape = len(queries), k
        similarities, ids = np.empty(shape, np.float32), np.empty(shape, np.int64)
        self.index.search_c(
            shape[0], faiss.swig_ptr(queries), k, faiss.swig_ptr(similarities), faiss.swig_ptr(ids), told
        )
        return similarities, ids

    def _shared_out(
        self, queries: Vectors, k: int, search: Search, share: float, selector: Any
    ) -> exact.Candidates:
        """Queries divided among the cores. Of lists, each by itself: which are nearest is decided by a matrix product, whose last bits
        depend on its size."""
        parts = min(exact.cores(), len(queries))
        step = 1 if "lists" in self.plan.build else -(-len(queries) // parts)
        starts = range(0, len(queries), step)

        def some(part: int) -> list[exact.Candidates]:
            return [
                self._ask(queries[i : i + step], k, self._told(search, k, share, selector))
                for i in starts[part::parts]
            ]

        found = exact.in_parallel(some, parts)
        rows = [found[n % parts][n // parts] for n in range(len(starts))]
        return np.concatenate([s for s, _ in rows]), np.concatenate([i for _, i in rows])

    def _split(self, queries: Vectors, k: int, selector: Any, parts: int) -> exact.Candidates:
        """Rows divided among the cores."""
        edges = np.linspace(self.first, self.end, parts + 1).astype(np.int64).tolist()

        def scan(part: int) -> exact.Candidates:
            run = faiss.IDSelectorRange(edges[part], edges[part + 1])
            sel = faiss.IDSelectorAnd(run, selector) if selector is not None else run
            return self._ask(queries, k, faiss.SearchParameters(sel=sel))

        return exact.merged(exact.in_parallel(scan, parts), k)


def _told_of_the_whole(plan: Plan, k: int, ef_search: int, nprobe: int) -> Any:
    """What a search without a selector is told: FAISS only reads it, so that threads may share it."""
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
                f"the index of version {snapshot.version.number} of store '{snapshot.store.name}' covers {covered} of its "
                f"{self._entries} entries: run `tagstore repair`"
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
        scarce = count < FEW_ALLOWED * self._entries or 2 * k > count
        if ((search.exact or scarce) and not self._exact) or (self._exact and len(queries) > FEW_QUERIES):
            return exact.search(self._snapshot, queries, k, everything)[1]
        found = []
        for part in self.parts:
            if part.plan.exact and len(queries) > FEW_QUERIES:
                found.append(exact.search(self._snapshot, queries, k, everything, part.first, part.end))
            else:
                found.append(
                    self.refined(part, queries, part.search(queries, k, allowed, self._live, search))
                )
        ids = (
            found[0][1][:, :k] if len(found) == 1 and found[0][1].shape[1] >= k else exact.merged(found, k)[1]
        )
        if not self._exact and (ids[:, -1] < 0).any():
            # an approximate search may come to an end before it has found enough: what it owes is looked up
            short = np.flatnonzero((ids < 0).any(axis=1))
            ids = np.array(ids)
            ids[short] = exact.search(self._snapshot, queries[short], k, everything)[1]
        return np.asarray(ids)

    def refined(self, part: Part, queries: Vectors, found: exact.Candidates) -> exact.Candidates:
        """Candidates of compressed codes, with the similarities that the stored vectors have."""
        if "refine" not in part.plan.search or not found[1].size:
            return found
        similarities, ids = np.array(found[0]), found[1]
        for row in range(len(queries)):
            there = np.flatnonzero(ids[row] >= 0)
            similarities[row, there] = self._snapshot.vectors(ids[row, there]) @ queries[row]
        return exact.merged([(similarities, ids)], ids.shape[1])

    def describe(self) -> Mapping[str, Any]:
        return self._about


_open: WeakValueDictionary[tuple[str, int, int], Any] = WeakValueDictionary()
"""Files that some version has open, by path, inode and time: the next version has most of them too, and their pages are there."""


def open_file(path: Path, rows: int, dimension: int) -> Any:
    """One index file, memory-mapped. Raises `Damaged` if it can't be read or holds something else."""
    try:
        status = path.stat()
        key = str(path), status.st_ino, status.st_mtime_ns
        index = _open.get(key)
        if index is None:
            index = _open[key] = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except (OSError, RuntimeError) as error:
        raise Damaged(
            f"the index file {path} cannot be read: it is missing, cut off or no FAISS index. Run `tagstore repair`"
        ) from error
    if index.ntotal != rows or index.d != dimension:
        raise Damaged(
            f"the index file {path} holds {index.ntotal} vectors of {index.d} dimensions instead of {rows} of {dimension}: "
            "run `tagstore repair`"
        )
    return index
