"""What a query reads of a version beyond the index, with little Python around it: a few rows, a few records, tags often asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from tagstore.indexing.faiss_index import Part
from tagstore.storage.store import Snapshot
from tagstore.types import Kind, Vectors

TAG_BYTES = 64 << 20
"""Of a version's tags kept in memory with their embeddings: 27,000 of them at 512 dimensions. When it is full, it starts anew."""
TAGS_AT_ONCE = 1 << 13
"""Embeddings that several queries may ask for together: 16 MiB at 512 dimensions."""


class Rows:
    """Image vectors of a version's entries: out of its index files where all of them hold the stored numbers, else out of the store."""

    def __init__(self, snapshot: Snapshot, parts: Sequence[Part]) -> None:
        self._snapshot = snapshot
        self._parts = parts if all(part.holds_vectors for part in parts) else ()

    def find(self, ids: NDArray[np.int64]) -> Vectors:
        """`[n, D]` float32 in the order of `ids`, in memory of their own. Raises `Damaged` if the store has lost one."""
        snapshot, parts = self._snapshot, self._parts
        if len(parts) == 1:
            return parts[0].vectors(ids)
        if parts:
            rows = np.empty((len(ids), snapshot.dimension), np.float32)
            for part in parts:
                here = (ids >= part.first) & (ids < part.end)
                rows[here] = part.vectors(ids[here])
            return rows
        return snapshot.vectors(ids)


def keys_and_tags(snapshot: Snapshot, ids: Sequence[Sequence[int]]) -> list[list[tuple[str, list[int]]]]:
    """Key and tag ids of each entry, of the neighbours of several queries; an entry that several share is read once."""
    unique = list(dict.fromkeys(chain.from_iterable(ids)))
    records = dict(zip(unique, snapshot.keys_and_tags(unique), strict=True))
    return [[records[i] for i in neighbours] for neighbours in ids]


class Tags:
    """Texts, kinds and embeddings of a version's tags, the ones asked for kept at hand. Safe for threads."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._lock = Lock()
        self._table = _Table(snapshot)
        self.at_once = min(TAGS_AT_ONCE, self._table.room)
        """Tags to ask for together, at most, on behalf of several queries; one query may have more."""

    def find(self, tag_ids: list[int]) -> tuple[list[tuple[str, Kind]], Vectors]:
        """Text and kind of each tag, and their embeddings `[n, D]` float32. Raises `NotFound` for an id of none."""
        table = self._table
        slots = list(map(table.slots.get, tag_ids))
        if None in slots:
            with self._lock:
                table = self._table
                missing = list(dict.fromkeys(i for i in tag_ids if i not in table.slots))
                if len(table.slots) + len(missing) > table.room:
                    # whoever reads from the full one keeps it until then
                    table = self._table = _Table(self._snapshot)
                    missing = list(dict.fromkeys(tag_ids))
                table.add(missing)
            slots = [table.slots[i] for i in tag_ids]
        names = table.names
        return [names[slot] for slot in slots], table.rows.take(np.array(slots, np.int64), axis=0)  # type: ignore[index]


class _Table:
    """Tags in the order they were first asked for; rows are written before their slot can be found, and never again."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        room = TAG_BYTES // (4 * snapshot.dimension + 300)
        self.room = max(1, min(room, max(1 << 16, snapshot.version.next_tag_id)))
        self.slots: dict[int, int] = {}
        self.names: list[tuple[str, Kind]] = []
        self.rows = np.empty(
            (self.room, snapshot.dimension), np.float32
        )  # pages are taken as they are written

    def add(self, tag_ids: list[int]) -> None:
        snapshot = self._snapshot
        if len(tag_ids) + len(self.names) > self.room:
            self.rows = np.empty((len(tag_ids) + len(self.names), snapshot.dimension), np.float32)
            self.room = len(self.rows)
        end = len(self.names)
        self.rows[end : end + len(tag_ids)] = snapshot.embeddings(np.array(tag_ids, np.int64))
        for slot, (i, (text, kind, _)) in enumerate(zip(tag_ids, snapshot.tags(tag_ids), strict=True), end):
            self.names.append((text, kind))
            self.slots[i] = slot
