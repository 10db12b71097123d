"""What an index must do, and its specification in numpy.

An index is derived: it maps unit vectors to entry ids and can be rebuilt from the store at any time. It proposes
candidates; the engine computes the similarities that are returned from the stored vectors, so that they do not depend
on the index, on the batch a query came in, or on the machine's BLAS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tagstore.types import Vectors


class Index(Protocol):
    """Nearest neighbours by inner product."""

    def search(self, queries: Vectors, k: int) -> NDArray[np.int64]:
        """Entry ids of the best `k` of each query, `[N, min(k, entries)]` int64, best first by the index's own arithmetic."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Kind and parameters."""
        ...


class NumpyIndex:
    """The specification: all inner products, sorted; equal ones in order of entry id. The oracle of every other index."""

    def __init__(self, vectors: Vectors, entry_ids: NDArray[np.int64]) -> None:
        self.vectors, self.entry_ids = vectors, entry_ids

    def search(self, queries: Vectors, k: int) -> NDArray[np.int64]:
        similarities = queries @ self.vectors.T
        order = np.lexsort((np.broadcast_to(self.entry_ids, similarities.shape), -similarities), axis=1)
        return self.entry_ids[order[:, :k]]

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "numpy"}
