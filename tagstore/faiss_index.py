"""The exact FAISS index: inner products over float16 codes, the very numbers the store keeps, memory-mapped on open."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from tagstore.errors import Damaged
from tagstore.store import Snapshot
from tagstore.types import Vectors


def build(snapshot: Snapshot, directory: Path) -> Mapping[str, Any]:
    """Write the index of a version into `directory`, synced to disk; returns what the version records of it."""
    index = faiss.IndexScalarQuantizer(snapshot.dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for block in snapshot.vector_blocks(snapshot.live()):
        index.add(block)
    directory.mkdir(exist_ok=True)
    path = directory / f"{snapshot.version.number:08d}.faiss"
    temporary = path.with_suffix(".tmp")
    faiss.write_index(index, str(temporary))
    with temporary.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    temporary.replace(path)
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return {
        "kind": "flat",
        "codes": "float16",
        "metric": "inner product",
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": digest,
    }


class FaissIndex:
    """A built index, opened. Safe for threads; never changed after it is opened."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._about = snapshot.version.index
        path = snapshot.store.directory / "index" / self._about["file"]
        try:
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise Damaged(f"the index {path} cannot be read: {str(error).splitlines()[0]}") from error
        self._entry_ids = snapshot.live()
        if self._index.ntotal != len(self._entry_ids) or self._index.d != snapshot.dimension:
            raise Damaged(
                f"the index {path} holds {self._index.ntotal} vectors of {self._index.d} dimensions, "
                f"version {snapshot.version.number} has {len(self._entry_ids)} of {snapshot.dimension}"
            )

    def search(self, queries: Vectors, k: int) -> NDArray[np.int64]:
        _, rows = self._index.search(np.ascontiguousarray(queries, np.float32), min(k, len(self._entry_ids)))
        return self._entry_ids[rows]

    def describe(self) -> Mapping[str, Any]:
        return self._about
