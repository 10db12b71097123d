"""What the neighbours of a query say together: their tags, each with its votes, best similarity and relevance, in the order asked for.

The relevance of all tags of a batch is computed at once, the rest query by query in plain Python: a query has some twenty tags, too few
for arrays to be quicker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tagstore.retrieval.lookups import Tags
from tagstore.types import Kind, Search, Vectors

_SIMILARITY = {"votes": 1, "similarity": 0, "relevance": 2}
_RELEVANCE = {"votes": 2, "similarity": 2, "relevance": 0}
"""Where a signal stands among the three that order tags."""

Near = tuple[list[int], list[float], int]
"""Ids and similarities of a query's neighbours, best first; how many nearer ones were kept out."""
Record = tuple[str, list[int]]
"""Key and tag ids of an entry."""


class Answer(NamedTuple):
    """One query's answer in columns: what a `Retrieval` is made of, without an object for every neighbour and tag.

    A server writes its messages from this; `Engine.retrieve` returns the same as values. Positions in a column belong together.
    """

    entry_ids: Sequence[int]
    """Of the neighbours, best first; also where `Search.with_neighbours` is false."""
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


def merged(
    tags: Tags, queries: Vectors, near: Sequence[Near], records: Sequence[Sequence[Record]], search: Search
) -> list[Answer]:
    """Answers to queries `[N, D]` from their neighbours and the records of these. They do not depend on what else is in the batch."""
    carriers = [_carriers(some) for some in records]
    signals = _relevance(tags, queries, carriers)
    rows = zip(near, records, carriers, signals, strict=True)
    return [
        _answer(*found, [key for key, _ in some], at, *of_tags, search) for found, some, at, of_tags in rows
    ]


def cosines(rows: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inner products of `rows` `[..., D]`, which are overwritten, with `queries` of the same shape or one that is broadcast to it.

    Multiplied and summed row by row, so equal whatever else is in the batch; those of a matrix product are not.
    """
    np.multiply(rows, queries, out=rows)
    found: NDArray[np.float32] = np.minimum(np.maximum(np.add.reduce(rows, axis=-1), -1), 1)
    return found


def _carriers(records: Sequence[Record]) -> dict[int, list[int]]:
    """Of each tag, the positions of the neighbours that carry it."""
    carriers: dict[int, list[int]] = {}
    for position, (_, tag_ids) in enumerate(records):
        for tag_id in tag_ids:
            if tag_id in carriers:
                carriers[tag_id].append(position)
            else:
                carriers[tag_id] = [position]
    return carriers


def _relevance(
    tags: Tags, queries: Vectors, carriers: Sequence[dict[int, list[int]]]
) -> Iterator[tuple[list[tuple[str, Kind]], list[float]]]:
    """Of each query's tags, texts and kinds, and the cosines of their embeddings with it."""
    counts = [len(some) for some in carriers]
    start = 0
    while start < len(counts):
        end, rows = start + 1, counts[start]
        while end < len(counts) and rows + counts[end] <= tags.at_once:
            rows += counts[end]
            end += 1
        names, embeddings = tags.find(list(chain.from_iterable(carriers[start:end])))
        own = queries[start] if end - start == 1 else queries[start:end].repeat(counts[start:end], axis=0)
        relevance = cosines(embeddings, own).tolist()
        at = 0
        for count in counts[start:end]:
            yield names[at : at + count], relevance[at : at + count]
            at += count
        start = end


def _answer(
    ids: list[int],
    similarities: list[float],
    excluded: int,
    keys: list[str],
    carriers: dict[int, list[int]],
    names: list[tuple[str, Kind]],
    relevance: list[float],
    search: Search,
) -> Answer:
    if not carriers:
        return Answer(ids, keys, similarities, excluded, (), (), (), (), (), ())
    # a row for each tag, what orders it first; neighbours come best first, so a tag's first carrier is its best
    rows: list[tuple[Any, ...]]
    signals = zip(carriers.items(), relevance, names, strict=True)
    if search.order == "votes":
        rows = [(len(at), similarities[at[0]], r, -t, t, at, n) for (t, at), r, n in signals]
    elif search.order == "similarity":
        rows = [(similarities[at[0]], len(at), r, -t, t, at, n) for (t, at), r, n in signals]
    else:
        rows = [(r, len(at), similarities[at[0]], -t, t, at, n) for (t, at), r, n in signals]
    rows.sort(reverse=True)
    if search.max_tags:
        del rows[search.max_tags :]
    *ranks, _, tag_ids, at, named = zip(*rows, strict=True)
    texts, kinds = zip(*named, strict=True) if search.with_texts else ((), ())
    best, relevant = ranks[_SIMILARITY[search.order]], ranks[_RELEVANCE[search.order]]
    return Answer(ids, keys, similarities, excluded, tag_ids, texts, kinds, best, relevant, at)
