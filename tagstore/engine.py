"""One version of a store, opened to answer: vectors in, retrieved tags out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import BadVector, InvalidInput
from tagstore.faiss_index import FaissIndex
from tagstore.filters import Filters
from tagstore.guard import NOBODY, Guard, check_exclude
from tagstore.index import PLAIN, Allowed, Index
from tagstore.store import Snapshot
from tagstore.types import ORDERS, Identity, Kind, Neighbour, Retrieval, RetrievedTag, Search, StoreInfo, TagInfo, Vectors

MAX_K = 1000
MAX_BATCH = 4096
SPARE = 8
"""Candidates asked of the index beyond k: similarities that are equal, or nearly so, at the edge are then told apart by the engine."""
EDGE = 1e-5
"""How far the index's arithmetic may be from ours. Candidates that end this close to the last neighbour are too few."""
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
        self._live = Allowed(snapshot.array("live", np.uint8), snapshot.version.entries)
        self._filters = Filters(snapshot, self._live)

    def retrieve(self, vectors: NDArray[np.floating], search: Search = PLAIN, identities: Sequence[Identity] = ()) -> list[Retrieval]:
        """The tags of the nearest entries of each query.

        Args:
            vectors: `[N, D]` of the store's encoder; normalised here.
            search: how many neighbours, which entries, what to return.
            identities: which image each query is, for `search.exclude`; none, or N of them.

        Raises:
            BadVector: wrong shape, or a row with NaN, infinity or only zeros.
            InvalidInput: an option out of range, or an identity that lacks what is to be excluded.
        """
        queries = self._checked(vectors, search, identities)
        allowed = self._filters.find(search.where) if search.where else None
        guard = Guard(search.exclude, identities, len(queries), self.snapshot, self._live) if search.exclude != NOBODY else None
        step = max(1, ROWS_AT_ONCE // (search.k + SPARE))
        starts = range(0, len(queries), step)
        return [r for start in starts for r in self._answer(queries[start : start + step], start, search, allowed, guard)]

    def _answer(self, queries: Vectors, first: int, search: Search, allowed: Allowed | None, guard: Guard | None) -> list[Retrieval]:
        numbers = np.arange(first, first + len(queries))
        ranked = self._nearest(queries, numbers, search.k + SPARE, search, allowed, guard)
        flat = [i for ids, _, _ in ranked for i in ids]
        records = dict(zip(flat, self.snapshot.keys_and_tags(flat), strict=True))
        return [
            self._retrieval(query, [Neighbour(records[i][0], i, s) for i, s in zip(ids, near, strict=True)], excluded, records, search)
            for query, (ids, near, excluded) in zip(queries, ranked, strict=True)
        ]

    def _nearest(
        self, queries: Vectors, numbers: NDArray[np.int64], candidates: int, search: Search, allowed: Allowed | None, guard: Guard | None
    ) -> list[tuple[list[int], list[float], int]]:
        """Of each query: ids and similarities of its neighbours, best first, equal ones by id; and how many nearer ones were kept out."""
        if len(queries) > (step := max(1, ROWS_AT_ONCE // candidates)):
            pieces = (slice(start, start + step) for start in range(0, len(queries), step))
            return [a for p in pieces for a in self._nearest(queries[p], numbers[p], candidates, search, allowed, guard)]
        everything = self.version.entries if allowed is None else allowed.count
        found = self.index.search(queries, candidates, allowed=allowed, search=search)
        similarities = self._similarities(found, queries)
        order = np.lexsort((found, -similarities), axis=1)
        found, similarities = np.take_along_axis(found, order, axis=1), np.take_along_axis(similarities, order, axis=1)
        near = similarities >= search.min_similarity
        fits = near if guard is None else near & guard.kept(numbers, found)
        answers: list[tuple[list[int], list[float], int]] = []
        short: list[int] = []
        for row in range(len(queries)):
            places = np.flatnonzero(fits[row])[: search.k]
            full = len(places) == search.k
            if found.shape[1] < everything and self._too_few(similarities[row], places, full, candidates, search):
                short.append(row)
            last = int(places[-1]) + 1 if full else int(near[row].sum())
            answers.append((found[row, places].tolist(), similarities[row, places].tolist(), last - len(places)))
        if short:
            # of one query at a time, all entries may have to be looked at
            more = self._nearest(queries[short], numbers[short], 4 * candidates, search, allowed, guard)
            for row, answer in zip(short, more, strict=True):
                answers[row] = answer
        return answers

    def _similarities(self, found: NDArray[np.int64], queries: Vectors) -> NDArray[np.float32]:
        """Cosines of each query with its candidates, `[N, M]`, from the stored vectors."""
        if found.size > ROWS_AT_ONCE:
            columns = (found[:, start : start + ROWS_AT_ONCE] for start in range(0, found.shape[1], ROWS_AT_ONCE))
            return np.concatenate([self._similarities(some, queries) for some in columns], axis=1)
        unique, where = np.unique(found, return_inverse=True)
        return _cosines(self.snapshot.vectors(unique)[where.reshape(found.shape)], queries)

    @staticmethod
    def _too_few(similarities: NDArray[np.float32], places: NDArray[np.int64], full: bool, candidates: int, search: Search) -> bool:
        """Whether an entry beyond the candidates may be a neighbour: the index's last one is not clearly less similar than ours."""
        edge = similarities[places[-1]] if full else np.float32(search.min_similarity)
        return bool(similarities[-1] >= edge - EDGE) and (not full or candidates < MAX_TIES)

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
        self,
        query: NDArray[np.float32],
        neighbours: list[Neighbour],
        excluded: int,
        records: dict[int, tuple[str, list[int]]],
        search: Search,
    ) -> Retrieval:
        carriers: dict[int, list[Neighbour]] = {}
        for neighbour in neighbours:
            for tag_id in records[neighbour.entry_id][1]:
                carriers.setdefault(tag_id, []).append(neighbour)
        tag_ids = list(carriers)
        relevance = dict(zip(tag_ids, _cosines(self.snapshot.embeddings(np.array(tag_ids, np.int64)), query).tolist(), strict=True))

        def rank(t: int) -> tuple[float, float, float, int]:
            # neighbours come best first, so a tag's first carrier is its best
            votes, similarity = -len(carriers[t]), -carriers[t][0].similarity
            if search.order == "similarity":
                return similarity, votes, -relevance[t], t
            if search.order == "relevance":
                return -relevance[t], votes, similarity, t
            return votes, similarity, -relevance[t], t

        ranked = sorted(tag_ids, key=rank)
        if search.max_tags:
            ranked = ranked[: search.max_tags]
        named: list[tuple[str, Kind, str]] = self.snapshot.tags(ranked) if search.texts else [("", "object", "")] * len(ranked)
        return Retrieval(
            store=self.snapshot.store.name,
            version=self.version.number,
            fingerprint=self.fingerprint.digest,
            neighbours=tuple(neighbours) if search.neighbours else (),
            tags=tuple(
                RetrievedTag(
                    tag_id=t,
                    tag=text,
                    kind=kind,
                    similarity=carriers[t][0].similarity,
                    votes=len(carriers[t]),
                    relevance=relevance[t],
                    neighbours=tuple(n.entry_id for n in carriers[t]) if search.neighbours else (),
                )
                for t, (text, kind, _) in zip(ranked, named, strict=True)
            ),
            excluded=excluded,
        )

    def _checked(self, vectors: NDArray[np.floating], search: Search, identities: Sequence[Identity]) -> Vectors:
        check_request(len(vectors), search, identities)
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


def check_request(queries: int, search: Search, identities: Sequence[Identity] = ()) -> None:
    """Raises `InvalidInput` for options out of range; before any work is done for them."""
    k = search.k
    if not 1 <= k <= MAX_K:
        raise InvalidInput(f"k is {k}: ask for 1 to {MAX_K} neighbours")
    if search.max_tags < 0:
        raise InvalidInput(f"max_tags is {search.max_tags}: pass 0 for all tags, or how many you want")
    if not -1 <= search.min_similarity <= 1:
        raise InvalidInput(f"min_similarity is {search.min_similarity}: a cosine, from -1 to 1")
    if search.order not in ORDERS:
        raise InvalidInput(f"order is '{search.order}': it is one of {', '.join(ORDERS)}")
    if search.nprobe < 0 or search.ef_search < 0:
        raise InvalidInput(f"nprobe is {search.nprobe}, ef_search {search.ef_search}: pass 0 for what the index was tuned to, or more")
    if queries * k > MAX_ANSWERS:
        raise InvalidInput(f"{queries} queries with k = {k} ask for {queries * k} neighbours: at most {MAX_ANSWERS} in one request")
    if queries > MAX_BATCH:
        raise InvalidInput(f"{queries} queries in one request: send at most {MAX_BATCH}")
    check_exclude(search.exclude, identities, queries)


def _cosines(rows: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inner products of `rows` `[..., n, D]` with `query` `[..., D]`: summed row by row, so equal whatever else is in the batch."""
    products: NDArray[np.float32] = (rows * query[..., None, :]).sum(axis=-1, dtype=np.float32)
    return np.clip(products, -1, 1)
