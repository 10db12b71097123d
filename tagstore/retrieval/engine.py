"""One version of a store, opened to answer: vectors in, retrieved tags out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import BadVector, InvalidInput
from tagstore.indexing.faiss_index import FaissIndex
from tagstore.indexing.gpu import GpuIndex, device_number
from tagstore.indexing.plans import MAX_EF
from tagstore.indexing.protocol import PLAIN, Allowed, Index
from tagstore.retrieval.filters import Filters
from tagstore.retrieval.leak_guard import NOBODY, Guard, check_exclude
from tagstore.retrieval.lookups import Rows, Tags, keys_and_tags
from tagstore.retrieval.tag_votes import Answer as Answer
from tagstore.retrieval.tag_votes import Near, cosines, merged
from tagstore.storage.store import Snapshot
from tagstore.types import (
    ORDERS,
    Identity,
    Kind,
    Neighbour,
    Retrieval,
    RetrievedTag,
    Search,
    StoreInfo,
    TagInfo,
    Vectors,
)

MAX_K = 1000
MAX_BATCH = 4096
SPARE = 8
"""Candidates asked of the index beyond k: similarities that are equal, or nearly so, at the edge are then told apart by the engine."""
MAX_TIES = 1 << 13
"""Beyond so many entries of equal similarity at the edge, which of them are returned is the index's choice."""
MAX_ANSWERS = 1 << 16
"""Neighbours of one request, over all its queries."""
ROWS_AT_ONCE = 1 << 15
"""Stored vectors held in memory to re-rank: 64 MiB at 512 dimensions, whatever the request."""


class Found(NamedTuple):
    """What a search found, before it is said what that means."""

    queries: Vectors
    """`[N, D]`, normalised."""
    near: list[Near]


class Engine:
    """Answers from one version. Safe for threads; answers depend on the version and the query alone."""

    def __init__(self, snapshot: Snapshot, index: Index | None = None, *, device: str = "cpu") -> None:
        self.snapshot = snapshot
        self.version = snapshot.version
        self.fingerprint = snapshot.version.fingerprint
        self.index: Index = index or open_index(snapshot, device)
        self._edge = self.index.tolerance
        self.digest = self.fingerprint.digest
        self._live = Allowed(snapshot.array("live", np.uint8), snapshot.version.entries)
        self._filters = Filters(snapshot, self._live)
        self._rows = Rows(snapshot, self.index.parts if isinstance(self.index, FaissIndex) else ())
        self._tags = Tags(snapshot)
        self.observe: Callable[[str, float], None] | None = None
        """Called with a stage, "search" or "tags", and the seconds that it took of a request or a piece of one."""

    def retrieve(
        self, vectors: NDArray[np.floating], search: Search = PLAIN, identities: Sequence[Identity] = ()
    ) -> list[Retrieval]:
        """The tags of the nearest entries of each query.

        Args:
            vectors: `[N, D]` of the store's encoder; normalised here.
            search: how many neighbours, which entries, what to return.
            identities: which image each query is, for `search.exclude`; none, or N of them.

        Raises:
            BadVector: wrong shape, or a row with NaN, infinity or only zeros.
            InvalidInput: an option out of range, or an identity that lacks what is to be excluded.
        """
        return [self._retrieval(answer, search) for answer in self.answers(vectors, search, identities)]

    def answers(
        self, vectors: NDArray[np.floating], search: Search = PLAIN, identities: Sequence[Identity] = ()
    ) -> list[Answer]:
        """As `retrieve`, in columns."""
        return self.merge(self.find(vectors, search, identities), search)

    def find(
        self, vectors: NDArray[np.floating], search: Search = PLAIN, identities: Sequence[Identity] = ()
    ) -> Found:
        """The neighbours of each query, up to 4096: the half of an answer that is FAISS's work, and keeps the interpreter free.

        Raises as `retrieve`.
        """
        began = time.perf_counter()
        queries = self._checked(vectors, search, identities)
        allowed, guard = self._conditions(len(queries), search, identities)
        near = self._nearest(queries, np.arange(len(queries)), search.k + SPARE, search, allowed, guard)
        if self.observe is not None:
            self.observe("search", time.perf_counter() - began)
        return Found(queries, near)

    def merge(self, found: Found, search: Search = PLAIN) -> list[Answer]:
        """What the neighbours of each query say together: the other half, which is Python's work."""
        began = time.perf_counter()
        answers: list[Answer] = []
        # in pieces, so that memory is bounded whatever the request
        step = max(1, ROWS_AT_ONCE // (search.k + SPARE))
        for start in range(0, len(found.near), step):
            near = found.near[start : start + step]
            records = keys_and_tags(self.snapshot, [ids for ids, _, _ in near])
            answers += merged(self._tags, found.queries[start : start + step], near, records, search)
        if self.observe is not None:
            self.observe("tags", time.perf_counter() - began)
        return answers

    def nearest(
        self, vectors: NDArray[np.floating], search: Search = PLAIN, identities: Sequence[Identity] = ()
    ) -> list[Near]:
        """Of each query, up to 4096: ids and similarities of its neighbours, best first, equal ones by id; how many nearer ones were
        kept out. Raises as `retrieve`."""
        return self.find(vectors, search, identities).near

    def _conditions(
        self, queries: int, search: Search, identities: Sequence[Identity]
    ) -> tuple[Allowed | None, Guard | None]:
        guard = (
            None
            if search.exclude == NOBODY
            else Guard(search.exclude, identities, queries, self.snapshot, self._live)
        )
        return self._filters.find(search.where) if search.where else None, guard

    def _nearest(
        self,
        queries: Vectors,
        numbers: NDArray[np.int64],
        candidates: int,
        search: Search,
        allowed: Allowed | None,
        guard: Guard | None,
    ) -> list[Near]:
        if len(queries) > (step := max(1, ROWS_AT_ONCE // candidates)):
            pieces = (slice(start, start + step) for start in range(0, len(queries), step))
            return [
                a
                for p in pieces
                for a in self._nearest(queries[p], numbers[p], candidates, search, allowed, guard)
            ]
        everything = self.version.entries if allowed is None else allowed.count
        found = self.index.search(queries, candidates, allowed=allowed, search=search)
        similarities = self._similarities(found, queries)
        order = np.lexsort((found, -similarities), axis=1)
        rows = np.arange(len(queries))[:, None]
        found, similarities = found[rows, order], similarities[rows, order]
        complete, k = found.shape[1] >= everything, search.k
        answers: list[Near] = []
        short: list[int] = []
        if guard is None and search.min_similarity <= -1 and (complete or found.shape[1] >= k):
            answers = [
                (i, s, 0) for i, s in zip(found[:, :k].tolist(), similarities[:, :k].tolist(), strict=True)
            ]
            if not complete and candidates < MAX_TIES:
                short = (similarities[:, -1] >= similarities[:, k - 1] - self._edge).nonzero()[0].tolist()
        else:
            near = similarities >= search.min_similarity
            fits = near if guard is None else near & guard.kept(numbers, found)
            for row in range(len(queries)):
                places = np.flatnonzero(fits[row])[:k]
                full = len(places) == k
                # an entry beyond the candidates may be a neighbour if the last one is not clearly less similar than ours
                edge = similarities[row, places[-1]] if full else np.float32(search.min_similarity)
                if (
                    not complete
                    and similarities[row, -1] >= edge - self._edge
                    and (not full or candidates < MAX_TIES)
                ):
                    short.append(row)
                last = int(places[-1]) + 1 if full else int(near[row].sum())
                answers.append(
                    (found[row, places].tolist(), similarities[row, places].tolist(), last - len(places))
                )
        if short:
            more = self._nearest(queries[short], numbers[short], 4 * candidates, search, allowed, guard)
            for row, answer in zip(short, more, strict=True):
                answers[row] = answer
        return answers

    def _similarities(self, found: NDArray[np.int64], queries: Vectors) -> NDArray[np.float32]:
        """Cosines of each query with its candidates, `[N, M]`, from the stored vectors."""
        if found.size > ROWS_AT_ONCE:
            columns = (
                found[:, start : start + ROWS_AT_ONCE] for start in range(0, found.shape[1], ROWS_AT_ONCE)
            )
            return np.concatenate([self._similarities(some, queries) for some in columns], axis=1)
        return cosines(
            self._rows.find(found.reshape(-1)).reshape(*found.shape, queries.shape[1]), queries[:, None]
        )

    def _retrieval(self, answer: Answer, search: Search) -> Retrieval:
        ids, there = answer.entry_ids, search.with_neighbours
        texts = answer.texts if search.with_texts else [""] * len(answer.tag_ids)
        kinds: Sequence[Kind] = answer.kinds if search.with_texts else ["object"] * len(answer.tag_ids)
        rows = zip(
            answer.tag_ids,
            texts,
            kinds,
            answer.tag_similarities,
            answer.carriers,
            answer.relevance,
            strict=True,
        )
        return Retrieval(
            self.snapshot.store.name,
            self.version.number,
            self.digest,
            tuple(map(Neighbour, answer.keys, ids, answer.similarities)) if there else (),
            tuple(
                [
                    RetrievedTag(t, text, kind, s, len(at), r, tuple([ids[i] for i in at]) if there else ())
                    for t, text, kind, s, at, r in rows
                ]
            ),
            answer.excluded,
        )

    def tags(
        self, tag_ids: Sequence[int] = (), *, first: int = 0, limit: int = 1000, embeddings: bool = False
    ) -> list[TagInfo]:
        """Tags by id, or, without ids, up to `limit` tags from id `first` on. Raises `NotFound`."""
        ids = np.array(tag_ids or self.snapshot.vocabulary(first, limit), np.int64)
        found = self.snapshot.tags(ids.tolist())
        counts = self.snapshot.counts()
        rows: Iterable[NDArray[np.float32] | None] = (
            self.snapshot.embeddings(ids) if embeddings else [None] * len(ids)
        )
        return [
            TagInfo(i, text, kind, int(counts[i]), row)
            for i, (text, kind, _), row in zip(ids.tolist(), found, rows, strict=True)
        ]

    def info(self) -> StoreInfo:
        return self.snapshot.info()

    def _checked(
        self, vectors: NDArray[np.floating], search: Search, identities: Sequence[Identity]
    ) -> Vectors:
        check_request(len(vectors), search, identities)
        if vectors.ndim != 2 or vectors.shape[1] != self.fingerprint.dimension:
            raise BadVector(
                f"queries have shape {list(vectors.shape)}, store '{self.snapshot.store.name}' takes [N, {self.fingerprint.dimension}]"
            )
        queries = vectors.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt((queries * queries).sum(axis=1, keepdims=True))
        fine = [0 < norm < np.inf for [norm] in norms.tolist()]
        if False in fine:
            raise BadVector(
                f"query {fine.index(False)} holds NaN, infinite or only zero values: it has no direction to search in"
            )
        unit: Vectors = queries / norms
        return unit


def open_index(snapshot: Snapshot, device: str) -> Index:
    """The index of a version on a device: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one that FAISS can use.

    Raises `MissingExtra`, or `InvalidInput` where it does not fit.
    """
    number = device_number(device)
    return FaissIndex(snapshot) if number is None else GpuIndex(snapshot, number)


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
        raise InvalidInput(
            f"nprobe is {search.nprobe}, ef_search {search.ef_search}: pass 0 for what the index was tuned to, or more"
        )
    if search.ef_search > MAX_EF:
        raise InvalidInput(f"ef_search is {search.ef_search}: at most {MAX_EF}, or ask for an exact search")
    if queries * k > MAX_ANSWERS:
        raise InvalidInput(
            f"{queries} queries with k = {k} ask for {queries * k} neighbours: at most {MAX_ANSWERS} in one request"
        )
    if queries > MAX_BATCH:
        raise InvalidInput(f"{queries} queries in one request: send at most {MAX_BATCH}")
    check_exclude(search.exclude, identities, queries)
