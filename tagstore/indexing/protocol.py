"""What an index must do, and its specification in numpy.

An index is derived: it maps unit vectors to entry ids and can be rebuilt from the store at any time. It
proposes candidates; the engine computes their similarities from the stored vectors, so that answers do not
depend on the index, on the batch a query came in, or on the machine's BLAS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tagstore.storage.rows import Allowed
from tagstore.types import Search, Vectors

PLAIN = Search()


class Index(Protocol):
    """Nearest neighbours by inner product. Safe for threads."""

    @property
    def tolerance(self) -> float:
        """How far the inner products of an exact index may be from those of the stored vectors."""
        ...

    def search(
        self, queries: Vectors, k: int, *, allowed: Allowed | None = None, search: Search = PLAIN
    ) -> NDArray[np.int64]:
        """Find the best entries of each query: ids `[N, M]` int64, best first by the index's own arithmetic.

        M is at least k, or the number of entries if that is less; an approximate index may propose more.

        Args:
            allowed: find only these; all entries of the version if None.
            search: options of the request, which `exact`, `nprobe` and `ef_search` are taken from.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """Kind and parameters."""
        ...


class NumpyIndex:
    """The specification that every index is tested against: all inner products, sorted, equal ones by id."""

    tolerance = 1e-5

    def __init__(self, vectors: Vectors, entry_ids: NDArray[np.int64]) -> None:
        self.vectors, self.entry_ids = vectors, entry_ids

    def search(
        self, queries: Vectors, k: int, *, allowed: Allowed | None = None, search: Search = PLAIN
    ) -> NDArray[np.int64]:
        rows = slice(None) if allowed is None else np.flatnonzero(allowed.holds(self.entry_ids))
        ids = self.entry_ids[rows]
        similarities = queries @ self.vectors[rows].T
        order = np.lexsort((np.broadcast_to(ids, similarities.shape), -similarities), axis=1)
        return ids[order[:, :k]]

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "numpy"}
