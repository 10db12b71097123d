"""What the neighbours of a query say together: their tags, each with its votes, best similarity and
relevance.

The relevance of all tags of a batch is computed at once, the rest query by query in plain Python: a query has
some twenty tags, too few for arrays to be quicker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tagstore.storage.store import Snapshot
from tagstore.types import (
    MAX_MENTIONS,
    Entry,
    Kind,
    Mention,
    Neighbour,
    Retrieval,
    RetrievedTag,
    Search,
    Vectors,
)

TABLE_BYTES = 64 << 20
"""Memory of a version's table of tags: 27,000 of them at 512 dimensions. When it is full, a new one is
begun."""
TAGS_AT_ONCE = 1 << 13
"""Embeddings that several queries may need together: 16 MiB at 512 dimensions."""
SIMILARITY_PLACE = {"votes": 1, "similarity": 0, "relevance": 2}
"""For each order, the place of the similarity among the three signals that rank tags."""
RELEVANCE_PLACE = {"votes": 2, "similarity": 2, "relevance": 0}
"""For each order, the place of the relevance among them."""

Neighbours = tuple[list[int], list[float], int]
"""Ids and similarities of a query's neighbours, best first, equal ones by id; how many nearer entries were
excluded."""
Record = tuple[str, list[int]]
"""Key and tag ids of an entry."""


class RetrievalColumns(NamedTuple):
    """One query's answer in columns: a `Retrieval` without an object for every neighbour and tag.

    A server writes its messages from this. Positions in a column belong together.
    """

    entry_ids: Sequence[int]
    """Ids of the neighbours, best first; also where `Search.with_neighbours` is false."""
    keys: Sequence[str]
    similarities: Sequence[float]
    excluded: int
    tag_ids: Sequence[int]
    """In the order asked for, cut at `Search.max_tags`."""
    texts: Sequence[str]
    """Empty where `Search.with_texts` is false, and so are `kinds`."""
    kinds: Sequence[Kind]
    tag_similarities: Sequence[float]
    relevance: Sequence[float]
    carriers: Sequence[Sequence[int]]
    """Positions in `entry_ids` of the neighbours that carry a tag, best first; its votes are their number."""
    captions: Sequence[tuple[str, ...]] = ()
    """Of each neighbour; empty where `Search.with_provenance` is false, and so are the next two."""
    mentions: Sequence[Sequence[Mention]] = ()
    """Of each tag."""
    miner: str = ""

    def retrieval(self, store: str, version: int, fingerprint: str, search: Search) -> Retrieval:
        """Make values of the columns."""
        ids, with_neighbours = self.entry_ids, search.with_neighbours
        texts = self.texts if search.with_texts else [""] * len(self.tag_ids)
        kinds: Sequence[Kind] = self.kinds if search.with_texts else ["object"] * len(self.tag_ids)
        mentions = self.mentions or [()] * len(self.tag_ids)
        rows = zip(
            self.tag_ids,
            texts,
            kinds,
            self.tag_similarities,
            self.carriers,
            self.relevance,
            mentions,
            strict=True,
        )
        tags = [
            RetrievedTag(
                tag_id,
                text,
                kind,
                similarity,
                len(carriers),
                relevance,
                tuple([ids[place] for place in carriers]) if with_neighbours else (),
                tuple(places),
            )
            for tag_id, text, kind, similarity, carriers, relevance, places in rows
        ]
        captions = self.captions or [()] * len(ids)
        neighbours = (
            tuple(map(Neighbour, self.keys, ids, self.similarities, captions)) if with_neighbours else ()
        )
        return Retrieval(
            store, version, fingerprint, neighbours, tuple(tags), self.excluded, miner=self.miner
        )

    def traced(self, entries: Mapping[int, Entry], miner: str) -> RetrievalColumns:
        """Add where the tags came from, given the entries of all neighbours."""
        mentions = []
        for tag_id, carriers in zip(self.tag_ids, self.carriers, strict=True):
            places = (
                Mention(self.entry_ids[carrier], *place, tag.score)
                for carrier in carriers
                for tag in entries[self.entry_ids[carrier]].tags
                if tag.tag_id == tag_id
                for place in tag.mentions
            )
            mentions.append(tuple(islice(places, MAX_MENTIONS)))
        captions = [entries[entry_id].captions for entry_id in self.entry_ids]
        return self._replace(captions=captions, mentions=mentions, miner=miner)


def merge_tags(
    table: TagTable,
    queries: Vectors,
    neighbours: Sequence[Neighbours],
    records: Mapping[int, Record],
    search: Search,
) -> list[RetrievalColumns]:
    """Merge the tags of each query's neighbours. An answer does not depend on what else is in the batch.

    Args:
        queries: `[N, D]`.
        records: of all neighbours, by entry id.
    """
    rows = [[records[i] for i in ids] for ids, _, _ in neighbours]
    carriers = [_carriers(row) for row in rows]
    signals = _relevance(table, queries, carriers)
    return [
        _ranked(ids, similarities, excluded, [key for key, _ in row], carried, names, relevance, search)
        for (ids, similarities, excluded), row, carried, (names, relevance) in zip(
            neighbours, rows, carriers, signals, strict=True
        )
    ]


def cosines(rows: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compute the inner products of `rows` `[..., D]`, which are overwritten, with `queries`, broadcast to
    that shape.

    They are multiplied and summed row by row, so that they do not depend on what else is in the batch, as
    those of a matrix product do."""
    np.multiply(rows, queries, out=rows)
    products: NDArray[np.float32] = np.minimum(np.maximum(np.add.reduce(rows, axis=-1), -1), 1)
    return products


def _carriers(records: Sequence[Record]) -> dict[int, list[int]]:
    """List for each tag the positions of the neighbours that carry it."""
    carriers: dict[int, list[int]] = {}
    for position, (_, tag_ids) in enumerate(records):
        for tag_id in tag_ids:
            if tag_id in carriers:
                carriers[tag_id].append(position)
            else:
                carriers[tag_id] = [position]
    return carriers


def _relevance(
    table: TagTable, queries: Vectors, carriers: Sequence[dict[int, list[int]]]
) -> Iterator[tuple[list[tuple[str, Kind]], list[float]]]:
    """Yield for each query the texts and kinds of its tags, and the cosines of their embeddings with it."""
    counts = [len(tags) for tags in carriers]
    start = 0
    while start < len(counts):
        end, total = start + 1, counts[start]
        while end < len(counts) and total + counts[end] <= table.at_once:
            total += counts[end]
            end += 1
        names, embeddings = table.find(list(chain.from_iterable(carriers[start:end])))
        of_tags = queries[start] if end - start == 1 else queries[start:end].repeat(counts[start:end], axis=0)
        relevance = cosines(embeddings, of_tags).tolist()
        offset = 0
        for count in counts[start:end]:
            yield names[offset : offset + count], relevance[offset : offset + count]
            offset += count
        start = end


def _ranked(
    ids: list[int],
    similarities: list[float],
    excluded: int,
    keys: list[str],
    carriers: dict[int, list[int]],
    names: list[tuple[str, Kind]],
    relevance: list[float],
    search: Search,
) -> RetrievalColumns:
    if not carriers:
        return RetrievalColumns(ids, keys, similarities, excluded, (), (), (), (), (), ())
    # a row for each tag, what ranks it first; neighbours come best first, so a tag's first carrier is its
    # best
    rows: list[tuple[Any, ...]]
    signals = zip(carriers.items(), relevance, names, strict=True)
    if search.order == "votes":
        rows = [(len(c), similarities[c[0]], r, -t, t, c, n) for (t, c), r, n in signals]
    elif search.order == "similarity":
        rows = [(similarities[c[0]], len(c), r, -t, t, c, n) for (t, c), r, n in signals]
    else:
        rows = [(r, len(c), similarities[c[0]], -t, t, c, n) for (t, c), r, n in signals]
    rows.sort(reverse=True)
    if search.max_tags:
        del rows[search.max_tags :]
    *ranks, _, tag_ids, places, tag_names = zip(*rows, strict=True)
    texts, kinds = zip(*tag_names, strict=True) if search.with_texts else ((), ())
    best, relevant = ranks[SIMILARITY_PLACE[search.order]], ranks[RELEVANCE_PLACE[search.order]]
    return RetrievalColumns(ids, keys, similarities, excluded, tag_ids, texts, kinds, best, relevant, places)


class TagTable:
    """Texts, kinds and embeddings of a version's tags; those that were needed once stay in memory. Safe for
    threads."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._lock = Lock()
        self._rows = _TagRows(snapshot)
        self.at_once = min(TAGS_AT_ONCE, self._rows.room)
        """Tags to ask for together, at most, on behalf of several queries; one query may have more."""

    def find(self, tag_ids: list[int]) -> tuple[list[tuple[str, Kind]], Vectors]:
        """Return text and kind of each tag, and their embeddings `[n, D]` float32. Raises `NotFound`."""
        rows = self._rows
        slots = list(map(rows.slots.get, tag_ids))
        if None in slots:
            with self._lock:
                rows = self._rows
                missing = list(dict.fromkeys(i for i in tag_ids if i not in rows.slots))
                if len(rows.slots) + len(missing) > rows.room:
                    # whoever reads from the full table keeps it until then
                    rows = self._rows = _TagRows(self._snapshot)
                    missing = list(dict.fromkeys(tag_ids))
                rows.add(missing)
            slots = [rows.slots[i] for i in tag_ids]
        names = rows.names
        return [names[slot] for slot in slots], rows.embeddings.take(np.array(slots, np.int64), axis=0)  # type: ignore[index]


class _TagRows:
    """Tags in the order in which they were first needed. A row is written before its slot can be found, and
    only then."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        room = TABLE_BYTES // (4 * snapshot.dimension + 300)
        self.room = max(1, min(room, max(1 << 16, snapshot.version.next_tag_id)))
        self.slots: dict[int, int] = {}
        self.names: list[tuple[str, Kind]] = []
        # its pages take memory as they are written
        self.embeddings = np.empty((self.room, snapshot.dimension), np.float32)

    def add(self, tag_ids: list[int]) -> None:
        snapshot, start = self._snapshot, len(self.names)
        end = start + len(tag_ids)
        if end > self.room:
            self.embeddings = np.empty((end, snapshot.dimension), np.float32)
            self.room = end
        self.embeddings[start:end] = snapshot.embeddings(np.array(tag_ids, np.int64))
        for slot, (i, (text, kind, _)) in enumerate(zip(tag_ids, snapshot.tags(tag_ids), strict=True), start):
            self.names.append((text, kind))
            self.slots[i] = slot
