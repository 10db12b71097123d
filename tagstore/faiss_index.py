"""The exact FAISS index: inner products over float16 codes, the very numbers the store keeps, memory-mapped on open.

An index is a list of files, each of a run of entry ids. A commit writes one file for what it added and merges it with the
files before it while they are not much larger (as a binary counter carries), so there are few files, and every entry is
written few times. Entries that died are masked in the search and dropped at the next merge.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from tagstore.environment import sync_directory
from tagstore.errors import Damaged
from tagstore.index import PLAIN, Allowed
from tagstore.store import Snapshot, Version
from tagstore.types import Search, Vectors

ABOUT = {"kind": "flat", "codes": "float16", "metric": "inner product"}
MERGE = 2
"""A file is merged with what follows it unless it has more than this many times the rows."""
MAX_ROWS = 1 << 20
"""Of a file, which is built in memory: 1 GiB at 512 dimensions, whatever the size of the store."""


def extend(snapshot: Snapshot, parent: Version | None, directory: Path, *, whole: bool = False) -> Mapping[str, Any]:
    """The index of a version that is about to be committed: the parent's files and what came since, or, if `whole`, all anew.

    Files are synced to disk before this returns; none that a version names is ever changed.
    """
    same_space = parent is not None and parent.space == snapshot.version.space
    files = list(parent.index["files"]) if parent is not None and same_space and not whole else []
    live = snapshot.live()
    first = files[-1]["end"] if files else 0
    rows = int(np.count_nonzero(live >= first))
    while files and files[-1]["rows"] <= MERGE * rows and files[-1]["rows"] + rows <= MAX_ROWS:
        first = files.pop()["first"]
        rows = int(np.count_nonzero(live >= first))
    # a file of which most rows are dead costs every search more than it gives
    while files and np.count_nonzero((live >= files[-1]["first"]) & (live < files[-1]["end"])) * 2 < files[-1]["rows"]:
        first = files.pop()["first"]
        rows = int(np.count_nonzero(live >= first))
    new = live[live >= first]
    for start in range(0, len(new), MAX_ROWS):
        ids = new[start : start + MAX_ROWS]
        end = int(new[start + MAX_ROWS]) if start + MAX_ROWS < len(new) else snapshot.version.next_entry_id
        files.append(_write(snapshot, ids, first, end, directory))
        first = end
    return {**ABOUT, "files": files}


def _write(snapshot: Snapshot, ids: NDArray[np.int64], first: int, end: int, directory: Path) -> dict[str, Any]:
    codes = faiss.IndexScalarQuantizer(snapshot.dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    index = faiss.IndexIDMap(codes)
    for piece, vectors in snapshot.vector_blocks(ids):
        index.add_with_ids(vectors, piece)
    if not directory.exists():
        directory.mkdir()
        sync_directory(directory.parent)
    path = directory / f"{snapshot.version.number:08d}-{first:012d}-{end:012d}.faiss"
    temporary = path.with_suffix(".tmp")
    digest = hashlib.sha256()
    with temporary.open("wb") as file:

        def write(piece: bytes) -> int:
            digest.update(piece)
            return file.write(piece)

        # not by file name: FAISS takes no notice of a disk that is full when it closes its file
        faiss.write_index(index, faiss.PyCallbackIOWriter(write, 1 << 20))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(directory)
    return {
        "file": path.name,
        "first": first,
        "end": end,
        "rows": len(ids),
        "bytes": path.stat().st_size,
        "sha256": digest.hexdigest(),
    }


class FaissIndex:
    """The index of a version, opened. Safe for threads; never changed after it is opened."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._about = snapshot.version.index
        self._entries = snapshot.version.entries
        mask = snapshot.live_mask()
        self._bits = np.packbits(mask, bitorder="little")
        self._parts: list[tuple[Any, Any]] = []
        covered = 0
        for about in self._about["files"]:
            part = open_file(snapshot.store.index_directory / about["file"], about["rows"], snapshot.dimension)
            alive = int(np.count_nonzero(mask[about["first"] : about["end"]]))
            # the selector reads our bits: they must live as long as it does
            selector = faiss.IDSelectorBitmap(self._bits) if alive < about["rows"] else None
            self._parts.append((part, faiss.SearchParameters(sel=selector) if selector else None))
            covered += alive
        if covered != self._entries:
            raise Damaged(
                f"the index of version {snapshot.version.number} of store '{snapshot.store.name}' covers {covered} of its "
                f"{self._entries} entries: run `tagstore repair`"
            )

    def search(self, queries: Vectors, k: int, *, allowed: Allowed | None = None, search: Search = PLAIN) -> NDArray[np.int64]:
        k = min(k, self._entries if allowed is None else allowed.count)
        queries = np.ascontiguousarray(queries, np.float32)
        if not k:
            return np.zeros((len(queries), 0), np.int64)
        parts = self._parts
        if allowed is not None:
            params = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(allowed.bits))
            parts = [(part, params) for part, _ in parts]
        found = [part.search(queries, k, params=params) for part, params in parts]
        if len(found) == 1:
            return np.asarray(found[0][1])
        similarities = np.concatenate([s for s, _ in found], axis=1)
        ids = np.concatenate([i for _, i in found], axis=1)
        similarities[ids < 0] = -np.inf
        return np.take_along_axis(ids, np.lexsort((ids, -similarities), axis=1)[:, :k], axis=1)

    def describe(self) -> Mapping[str, Any]:
        return self._about


def open_file(path: Path, rows: int, dimension: int) -> Any:
    """One index file, memory-mapped. Raises `Damaged` if it can't be read or holds something else."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise Damaged(f"the index file {path} cannot be read: it is missing, cut off or no FAISS index. Run `tagstore repair`") from error
    if index.ntotal != rows or index.d != dimension:
        raise Damaged(
            f"the index file {path} holds {index.ntotal} vectors of {index.d} dimensions instead of {rows} of {dimension}: "
            "run `tagstore repair`"
        )
    return index
