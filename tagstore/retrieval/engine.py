"""One version of a store, opened to answer: vectors in, retrieved tags out.

`Engine.query` checks what is asked, once. The `Query` that it returns finds its neighbours and says which
tags they carry. The two are apart because a server runs them in different threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import BadVector, FingerprintMismatch, InvalidInput
from tagstore.indexing.faiss_index import FaissIndex
from tagstore.indexing.gpu import GpuIndex, device_number
from tagstore.indexing.plans import MAX_EF
from tagstore.indexing.protocol import PLAIN, Index
from tagstore.retrieval.filters import Filters
from tagstore.retrieval.leak_guard import Guard
from tagstore.retrieval.tag_votes import Neighbours, RetrievalColumns, TagTable, cosines, merge_tags
from tagstore.storage.rows import Allowed
from tagstore.storage.store import Snapshot
from tagstore.types import ORDERS, Exclude, Identity, Retrieval, Search, StoreInfo, TagInfo, Vectors

MAX_K = 1000
"""Neighbours of a query."""
MAX_QUERIES = 4096
"""Queries of one request."""
MAX_ANSWERS = 1 << 16
"""Neighbours of one request, over all its queries."""
MAX_EXCLUDED = 10_000
"""Keys and entry ids that one request may exclude."""
NOBODY = Exclude()
EXTRA_CANDIDATES = 8
"""Candidates asked of the index beyond k: the engine tells apart those that are equal, or nearly so, at the
edge."""
MAX_TIES = 1 << 13
"""Entries of equal similarity at the edge up to which the lowest ids are returned; of more, the index
chooses."""
ROWS_AT_ONCE = 1 << 15
"""Stored vectors held in memory to re-rank: 64 MiB at 512 dimensions, whatever the request."""

MERGED_AT_ONCE = 1 << 13
"""Neighbours whose tags are in memory as Python's objects."""


class Engine:
    """Answers from one version. Safe for threads; answers depend on the version and the query alone."""

    def __init__(self, snapshot: Snapshot, index: Index | None = None, *, device: str = "cpu") -> None:
        self.snapshot = snapshot
        self.store = snapshot.store.name
        self.version = snapshot.version
        self.fingerprint = snapshot.version.fingerprint
        self.digest = self.fingerprint.digest
        self.index: Index = index or open_index(snapshot, device)
        self._tolerance = self.index.tolerance
        self._live = Allowed(snapshot.array("live", np.uint8), snapshot.version.entries)
        self._filters = Filters(snapshot, self._live)
        files = self.index.parts if isinstance(self.index, FaissIndex) else ()
        self._index_files = files if all(file.holds_vectors for file in files) else ()
        """The index files, where all of them hold the very vectors of the store."""
        self._tags = TagTable(snapshot)

    def query(
        self,
        vectors: NDArray[np.floating],
        search: Search = PLAIN,
        identities: Sequence[Identity] = (),
        fingerprint: str | None = None,
    ) -> Query:
        """Check queries by vector and make them ready to be searched.

        Args:
            vectors: `[N, D]` of the store's encoder, of any length.
            search: how many neighbours, which entries, what to return.
            identities: which image each query is, for `search.exclude`; none, or N of them.
            fingerprint: digest of the encoder that made the vectors; None if that is known to be the store's.

        Raises:
            BadVector: wrong shape, or a row with NaN, infinity or only zeros.
            FingerprintMismatch: another encoder.
            InvalidInput: an option out of range, or no fingerprint.
        """
        check_request(len(vectors), search, identities)
        self.check_vectors(vectors, self.digest if fingerprint is None else fingerprint)
        return self.ready(vectors, search, identities)

    def check_vectors(self, vectors: NDArray[np.floating], fingerprint: str) -> None:
        """Check which encoder made vectors, and their shape. Raises as `query`."""
        if fingerprint and fingerprint != self.digest:
            raise FingerprintMismatch.between(self.store, self.fingerprint, fingerprint)
        if not fingerprint and len(vectors):
            raise InvalidInput("a query by vector must say which encoder made it: pass its fingerprint")
        if len(vectors) and (vectors.ndim != 2 or vectors.shape[1] != self.fingerprint.dimension):
            raise BadVector(
                f"queries have shape {list(vectors.shape)}, "
                f"store '{self.store}' takes [N, {self.fingerprint.dimension}]"
            )

    def ready(self, vectors: NDArray[np.floating], search: Search, identities: Sequence[Identity]) -> Query:
        """Make a query of checked vectors and options. Raises `BadVector` for zeros, NaN, infinity."""
        queries: Vectors = vectors.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.add.reduce(queries * queries, axis=1, keepdims=True))
        for row, [norm] in enumerate(norms.tolist()):
            if not 0 < norm < np.inf:
                raise BadVector(
                    f"query {row} holds NaN, infinite or only zero values: it has no direction to search in"
                )
        queries /= norms
        return Query(self, search, queries, identities)

    def retrieve(
        self, vectors: NDArray[np.floating], search: Search = PLAIN, identities: Sequence[Identity] = ()
    ) -> list[Retrieval]:
        """Return the tags of the nearest entries of each query. Takes and raises what `query` does."""
        return self.query(vectors, search, identities).retrieve()

    def nearest(
        self, vectors: NDArray[np.floating], search: Search = PLAIN, identities: Sequence[Identity] = ()
    ) -> list[Neighbours]:
        """Return the neighbours of each query. Takes and raises what `query` does."""
        return self.query(vectors, search, identities).find()

    def search(self, query: Query) -> list[Neighbours]:
        """Find the neighbours of each query: see `Query.find`."""
        search, rows = query.search, len(query.vectors)
        guard = None
        if search.exclude != NOBODY:
            guard = Guard(search.exclude, query.identities, rows, self.snapshot, self._live)
        allowed = self._filters.find(search.where) if search.where else None
        return self._nearest(
            query.vectors, np.arange(rows), search.k + EXTRA_CANDIDATES, search, allowed, guard
        )

    def merge(self, query: Query, neighbours: Sequence[Neighbours]) -> Iterator[RetrievalColumns]:
        """Merge the tags of each query's neighbours: see `Query.answers`."""
        # in pieces, so that memory is bounded whatever the request
        step = max(1, MERGED_AT_ONCE // query.search.k)
        for start in range(0, len(neighbours), step):
            piece = neighbours[start : start + step]
            entry_ids = list(dict.fromkeys([i for ids, _, _ in piece for i in ids]))
            records = dict(zip(entry_ids, self.snapshot.keys_and_tags(entry_ids), strict=True))
            vectors = query.vectors[start : start + step]
            answers = merge_tags(self._tags, vectors, piece, records, query.search)
            if query.search.with_provenance and query.search.with_neighbours:
                yield from map(self._traced, answers)
            else:
                yield from answers

    def _traced(self, answer: RetrievalColumns) -> RetrievalColumns:
        """Add where the tags of an answer came from; one answer at a time, for captions may be long."""
        entries = self.snapshot.entries(np.array(answer.entry_ids, np.int64))
        miner = self.version.miner.get("name") or "unknown"
        return answer.traced({entry.entry_id: entry for entry in entries}, miner)

    def _nearest(
        self,
        queries: Vectors,
        numbers: NDArray[np.int64],
        count: int,
        search: Search,
        allowed: Allowed | None,
        guard: Guard | None,
    ) -> list[Neighbours]:
        """Find neighbours among `count` candidates of the index, or more where an entry beyond them may be
        one.

        Args:
            numbers: position of each query in the request.
        """
        if len(queries) > (step := max(1, ROWS_AT_ONCE // count)):
            pieces = (slice(start, start + step) for start in range(0, len(queries), step))
            return [
                neighbours
                for piece in pieces
                for neighbours in self._nearest(queries[piece], numbers[piece], count, search, allowed, guard)
            ]
        entries = self.version.entries if allowed is None else allowed.count
        candidates = self.index.search(queries, count, allowed=allowed, search=search)
        similarities = self._similarities(candidates, queries)
        order = np.lexsort((candidates, -similarities), axis=1)
        rows = np.arange(len(queries))[:, None]
        candidates, similarities = candidates[rows, order], similarities[rows, order]
        complete, k = candidates.shape[1] >= entries, search.k
        short: list[int] = []
        """Queries that need more candidates."""
        if guard is None and search.min_similarity <= -1 and (complete or candidates.shape[1] >= k):
            neighbours: list[Neighbours] = [
                (ids, values, 0)
                for ids, values in zip(candidates[:, :k].tolist(), similarities[:, :k].tolist(), strict=True)
            ]
            if not complete and count < MAX_TIES:
                edges = similarities[:, k - 1] - self._tolerance
                short = (similarities[:, -1] >= edges).nonzero()[0].tolist()
        else:
            neighbours = []
            similar = similarities >= search.min_similarity
            qualified = similar if guard is None else similar & guard.allows(numbers, candidates)
            for row in range(len(queries)):
                places = np.flatnonzero(qualified[row])[:k]
                full = len(places) == k
                # an entry beyond the candidates may be a neighbour if the last one is not clearly less
                # similar
                edge = similarities[row, places[-1]] if full else np.float32(search.min_similarity)
                if (
                    not complete
                    and similarities[row, -1] >= edge - self._tolerance
                    and (not full or count < MAX_TIES)
                ):
                    short.append(row)
                seen = int(places[-1]) + 1 if full else int(similar[row].sum())
                neighbours.append(
                    (
                        candidates[row, places].tolist(),
                        similarities[row, places].tolist(),
                        seen - len(places),
                    )
                )
        if short:
            again = self._nearest(queries[short], numbers[short], 4 * count, search, allowed, guard)
            for row, answer in zip(short, again, strict=True):
                neighbours[row] = answer
        return neighbours

    def _similarities(self, candidates: NDArray[np.int64], queries: Vectors) -> NDArray[np.float32]:
        """Compute the cosines of each query with its candidates, `[N, M]`, from the stored vectors."""
        if candidates.size > ROWS_AT_ONCE:
            starts = range(0, candidates.shape[1], ROWS_AT_ONCE)
            pieces = [candidates[:, start : start + ROWS_AT_ONCE] for start in starts]
            return np.concatenate([self._similarities(piece, queries) for piece in pieces], axis=1)
        rows = self._stored_vectors(candidates.reshape(-1))
        return cosines(rows.reshape(*candidates.shape, queries.shape[1]), queries[:, None])

    def _stored_vectors(self, entry_ids: NDArray[np.int64]) -> Vectors:
        """Read the vectors of entries, `[n, D]`, from the index files if they hold them, else from the
        store."""
        files = self._index_files
        if len(files) == 1:
            return files[0].vectors(entry_ids)
        if not files:
            return self.snapshot.vectors(entry_ids)
        rows = np.empty((len(entry_ids), self.fingerprint.dimension), np.float32)
        for file in files:
            here = (entry_ids >= file.first) & (entry_ids < file.end)
            rows[here] = file.vectors(entry_ids[here])
        return rows

    def tags(
        self, tag_ids: Sequence[int] = (), *, first: int = 0, limit: int = 1000, embeddings: bool = False
    ) -> list[TagInfo]:
        """Return tags by id, or, without ids, up to `limit` tags from id `first` on. Raises `NotFound`."""
        ids = np.array(tag_ids or self.snapshot.vocabulary(first, limit), np.int64)
        counts = self.snapshot.counts()
        texts = self.snapshot.tags(ids.tolist())  # first: an id that nobody has is no lost embedding
        rows: Iterable[NDArray[np.float32] | None] = (
            self.snapshot.embeddings(ids) if embeddings else [None] * len(ids)
        )
        columns = zip(ids.tolist(), texts, rows, strict=True)
        return [TagInfo(i, text, kind, int(counts[i]), row) for i, (text, kind, _), row in columns]

    def info(self) -> StoreInfo:
        return self.snapshot.info()


@dataclass(frozen=True, slots=True)
class Query:
    """Queries of one request, or of several alike: checked, of unit length, ready to be searched."""

    engine: Engine
    search: Search
    vectors: Vectors
    """`[N, D]`"""
    identities: Sequence[Identity]
    """None, or N of them."""

    @classmethod
    def joined(cls, queries: Sequence[Query]) -> Query:
        """Join queries that differ in nothing but vectors and identities."""
        if len(queries) == 1:
            return queries[0]
        first = queries[0]
        identities = [identity for query in queries for identity in query.identities]
        return cls(first.engine, first.search, np.concatenate([q.vectors for q in queries]), identities)

    def find(self) -> list[Neighbours]:
        """Find the neighbours of each query. Most of this is FAISS's work and leaves the interpreter to other
        threads.

        Raises `InvalidInput` for an identity that lacks what is to be excluded.
        """
        return self.engine.search(self)

    def answers(self, neighbours: Sequence[Neighbours]) -> Iterator[RetrievalColumns]:
        """Merge the tags of each query's neighbours. Most of this is Python's work."""
        return self.engine.merge(self, neighbours)

    def retrieve(self) -> list[Retrieval]:
        """Find and answer, as values."""
        engine, search = self.engine, self.search
        version = engine.store, engine.version.number, engine.digest
        if not len(self):
            return []
        return [columns.retrieval(*version, search) for columns in self.answers(self.find())]

    def __len__(self) -> int:
        return len(self.vectors)


def open_index(snapshot: Snapshot, device: str) -> Index:
    """Open the index of a version on a device: "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one
    that FAISS can use.

    Raises `MissingExtra`, or `InvalidInput` where it does not fit.
    """
    number = device_number(device)
    return FaissIndex(snapshot) if number is None else GpuIndex(snapshot, number)


def check_request(queries: int, search: Search, identities: Sequence[Identity] = ()) -> None:
    """Raise `InvalidInput` for options out of range, too many queries, or identities that do not fit them."""
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
            f"nprobe is {search.nprobe}, ef_search {search.ef_search}: "
            "pass 0 for what the index was tuned to, or more"
        )
    if search.ef_search > MAX_EF:
        raise InvalidInput(f"ef_search is {search.ef_search}: at most {MAX_EF}, or ask for an exact search")
    if queries * k > MAX_ANSWERS:
        raise InvalidInput(
            f"{queries} queries with k = {k} ask for {queries * k} neighbours: "
            f"at most {MAX_ANSWERS} in one request"
        )
    if queries > MAX_QUERIES:
        raise InvalidInput(f"{queries} queries in one request: send at most {MAX_QUERIES}")
    if identities:
        _check_identities(queries, identities)
    if search.exclude != NOBODY:
        _check_exclude(search.exclude)


def _check_identities(queries: int, identities: Sequence[Identity]) -> None:
    if len(identities) != queries:
        raise InvalidInput(
            f"{len(identities)} identities for {queries} queries: pass one for each, images first, or none"
        )
    for i, identity in enumerate(identities):
        if len(identity.sha256) not in (0, 32):
            raise InvalidInput(
                f"the sha256 of query {i} has {len(identity.sha256)} bytes: pass all 32, or none"
            )
        if identity.perceptual_hash is not None and not 0 <= identity.perceptual_hash < 1 << 64:
            raise InvalidInput(
                f"the perceptual hash of query {i} is {identity.perceptual_hash}: it has 64 bits, unsigned"
            )


def _check_exclude(exclude: Exclude) -> None:
    if len(exclude.keys) + len(exclude.entry_ids) > MAX_EXCLUDED:
        raise InvalidInput(
            f"{len(exclude.keys) + len(exclude.entry_ids)} keys and entry ids to exclude: "
            f"at most {MAX_EXCLUDED} in one request; "
            "what must never be found is better filtered by its metadata, or deleted"
        )
    if not -1 <= exclude.hash_distance <= 64:
        raise InvalidInput(
            f"exclude.hash_distance is {exclude.hash_distance}: 0 to 64 bits, or -1 to leave it out"
        )
