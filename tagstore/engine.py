"""One version of a store, opened to answer: vectors in, retrieved tags out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import BadVector, InvalidInput
from tagstore.faiss_index import FaissIndex
from tagstore.index import Index
from tagstore.store import Snapshot
from tagstore.types import Kind, Neighbour, Retrieval, RetrievedTag, StoreInfo, TagInfo, Vectors

DEFAULT_K = 5
MAX_K = 1000
MAX_BATCH = 4096
SPARE = 8
"""Candidates asked of the index beyond k: equal similarities at the edge are then cut by entry id, not by chance."""
MAX_TIES = 1 << 13
"""Beyond so many entries of equal similarity at the edge, which of them are returned is the index's choice."""
MAX_ANSWERS = 1 << 16
"""Neighbours of one request, over all its queries."""
ROWS_AT_ONCE = 1 << 15
"""Stored vectors held in memory to re-rank: 64 MiB at 512 dimensions, whatever the request."""


class Engine:
    """Answers from one version. Safe for threads; answers depend on the version and the query alone."""

    def __init__(self, snapshot: Snapshot, index: Index | None = None) -> None:
        self.snapshot = snapshot
        self.version = snapshot.version
        self.fingerprint = snapshot.version.fingerprint
        self.index: Index = index or FaissIndex(snapshot)

    def retrieve(self, vectors: NDArray[np.floating], *, k: int = DEFAULT_K, max_tags: int = 0) -> list[Retrieval]:
        """The tags of the `k` nearest entries of each query.

        Args:
            vectors: `[N, D]` of the store's encoder; normalised here.
            k: neighbours a query, 1 to 1000; fewer come back if the store has fewer entries.
            max_tags: at most so many tags a query, 0 for all.

        Raises:
            BadVector: wrong shape, or a row with NaN, infinity or only zeros.
            InvalidInput: k, max_tags or N out of range.
        """
        queries = self._checked(vectors, k, max_tags)
        step = max(1, ROWS_AT_ONCE // (k + SPARE))
        return [r for start in range(0, len(queries), step) for r in self._answer(queries[start : start + step], k, max_tags)]

    def _answer(self, queries: Vectors, k: int, max_tags: int) -> list[Retrieval]:
        ids, similarities = self._nearest(queries, k, k + SPARE)

        flat = ids.ravel().tolist()
        records = dict(zip(flat, self.snapshot.keys_and_tags(flat), strict=True))
        return [
            self._retrieval(query, [Neighbour(records[i][0], i, s) for i, s in zip(row, sims, strict=True)], records, max_tags)
            for query, row, sims in zip(queries, ids.tolist(), similarities.tolist(), strict=True)
        ]

    def _nearest(self, queries: Vectors, k: int, candidates: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and similarities `[N, k]` of the best entries, best first, equal ones by id."""
        found = self.index.search(queries, candidates)
        unique, where = np.unique(found, return_inverse=True)
        similarities = _cosines(self.snapshot.vectors(unique)[where.reshape(found.shape)], queries)
        order = np.lexsort((found, -similarities), axis=1)
        found, similarities = np.take_along_axis(found, order, axis=1), np.take_along_axis(similarities, order, axis=1)
        ids, best = found[:, :k], similarities[:, :k]
        if candidates <= found.shape[1] < min(self.version.entries, MAX_TIES):
            # as many equal ones as were asked for: which of them the index left out is chance, so ask for more
            tied = np.flatnonzero(similarities[:, -1] == best[:, -1])
            if len(tied):
                ids[tied], best[tied] = self._nearest(queries[tied], k, 4 * candidates)
        return ids, best

    def tags(self, tag_ids: Sequence[int] = (), *, first: int = 0, limit: int = 1000, embeddings: bool = False) -> list[TagInfo]:
        """Tags by id, or, without ids, up to `limit` tags from id `first` on. Raises `NotFound`."""
        ids = np.array(tag_ids or self.snapshot.vocabulary(first, limit), np.int64)
        found = self.snapshot.tags(ids.tolist())
        counts = self.snapshot.counts()
        rows: Iterable[NDArray[np.float32] | None] = self.snapshot.embeddings(ids) if embeddings else [None] * len(ids)
        return [TagInfo(i, text, kind, int(counts[i]), row) for i, (text, kind, _), row in zip(ids.tolist(), found, rows, strict=True)]

    def info(self) -> StoreInfo:
        return self.snapshot.info()

    def _retrieval(
        self, query: NDArray[np.float32], neighbours: list[Neighbour], records: dict[int, tuple[str, list[int]]], max_tags: int
    ) -> Retrieval:
        carriers: dict[int, list[Neighbour]] = {}
        for neighbour in neighbours:
            for tag_id in records[neighbour.entry_id][1]:
                carriers.setdefault(tag_id, []).append(neighbour)
        tag_ids = list(carriers)
        relevance = dict(zip(tag_ids, _cosines(self.snapshot.embeddings(np.array(tag_ids, np.int64)), query).tolist(), strict=True))
        # neighbours come best first, so a tag's first carrier is its best
        ranked = sorted(tag_ids, key=lambda t: (-len(carriers[t]), -carriers[t][0].similarity, -relevance[t], t))
        if max_tags:
            ranked = ranked[:max_tags]
        named: list[tuple[str, Kind, str]] = self.snapshot.tags(ranked)
        return Retrieval(
            store=self.snapshot.store.name,
            version=self.version.number,
            fingerprint=self.fingerprint.digest,
            neighbours=tuple(neighbours),
            tags=tuple(
                RetrievedTag(
                    tag_id=t,
                    tag=text,
                    kind=kind,
                    similarity=carriers[t][0].similarity,
                    votes=len(carriers[t]),
                    relevance=relevance[t],
                    neighbours=tuple(n.entry_id for n in carriers[t]),
                )
                for t, (text, kind, _) in zip(ranked, named, strict=True)
            ),
        )

    def _checked(self, vectors: NDArray[np.floating], k: int, max_tags: int) -> Vectors:
        check_request(len(vectors), k, max_tags)
        if vectors.ndim != 2 or vectors.shape[1] != self.fingerprint.dimension:
            raise BadVector(
                f"queries have shape {list(vectors.shape)}, store '{self.snapshot.store.name}' takes [N, {self.fingerprint.dimension}]"
            )
        queries = vectors.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt((queries * queries).sum(axis=1, keepdims=True))
        bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
        if len(bad):
            raise BadVector(f"query {bad[0]} holds NaN, infinite or only zero values: it has no direction to search in")
        unit: Vectors = queries / norms
        return unit


def check_request(queries: int, k: int, max_tags: int) -> None:
    """Raises `InvalidInput` for numbers out of range; before any work is done for them."""
    if not 1 <= k <= MAX_K:
        raise InvalidInput(f"k is {k}: ask for 1 to {MAX_K} neighbours")
    if max_tags < 0:
        raise InvalidInput(f"max_tags is {max_tags}: pass 0 for all tags, or how many you want")
    if queries * k > MAX_ANSWERS:
        raise InvalidInput(f"{queries} queries with k = {k} ask for {queries * k} neighbours: at most {MAX_ANSWERS} in one request")
    if queries > MAX_BATCH:
        raise InvalidInput(f"{queries} queries in one request: send at most {MAX_BATCH}")


def _cosines(rows: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inner products of `rows` `[..., n, D]` with `query` `[..., D]`: summed row by row, so equal whatever else is in the batch."""
    products: NDArray[np.float32] = (rows * query[..., None, :]).sum(axis=-1, dtype=np.float32)
    return np.clip(products, -1, 1)
