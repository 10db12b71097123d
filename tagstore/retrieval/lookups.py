"""What a query reads of a version beyond the index, with little Python around it: a few rows, a few records, tags often asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import Damaged, NotFound
from tagstore.indexing import exact
from tagstore.indexing.faiss_index import Part
from tagstore.storage.codec import decode_hot, decode_tag
from tagstore.storage.store import ROWS, SPACE, U64, Snapshot
from tagstore.types import Kind, Vectors

TAG_BYTES = 64 << 20
"""Of a version's tags kept in memory with their embeddings: 27,000 of them at 512 dimensions. When it is full, it starts anew."""
TAGS_AT_ONCE = 1 << 13
"""Embeddings that several queries may ask for together: 16 MiB at 512 dimensions."""
FEW = 1 << 14
"""Rows up to which they are fetched one by one; for more, all rows of a block at a time."""

_pack = U64.pack


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
        if len(ids) > FEW:
            return snapshot.vectors(ids)
        with snapshot.store.env.begin(buffers=True) as txn:
            return _rows(txn, snapshot, "vectors", ids.tolist())


def keys_and_tags(snapshot: Snapshot, ids: Iterable[Iterable[int]]) -> list[list[tuple[str, list[int]]]]:
    """Key and tag ids of each entry, of the neighbours of several queries; an entry that several share is read once."""
    found: dict[int, tuple[str, list[int]]] = {}
    with snapshot.store.env.begin(db=snapshot.store.db["entries"]) as txn:
        get = txn.get
        return [
            [found[i] if i in found else found.setdefault(i, decode_hot(get(_pack(i)))) for i in some]
            for some in ids
        ]


def _rows(txn: Any, snapshot: Snapshot, name: str, ids: Sequence[int]) -> Vectors:
    width, space, get, db = (
        2 * snapshot.dimension,
        snapshot.version.space << SPACE,
        txn.get,
        snapshot.store.db[name],
    )
    pieces = []
    for i in ids:
        at = i % ROWS * width
        data = get(_pack(space | i // ROWS), db=db)
        if data is None or len(data) < at + width:
            raise Damaged(f"store '{snapshot.store.name}' has lost row {i} of its {name}")
        pieces.append(data[at : at + width])
    # joined while the transaction lasts: the pieces are the map's own memory
    return exact.widened(np.frombuffer(b"".join(pieces), np.float16)).reshape(len(ids), snapshot.dimension)


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
        with snapshot.store.env.begin(buffers=True) as txn:
            db = snapshot.store.db["tags"]
            at = len(self.names)
            self.rows[at : at + len(tag_ids)] = _rows(txn, snapshot, "embeddings", tag_ids)
            found = [txn.get(_pack(i), db=db) for i in tag_ids]
            for i, data in zip(tag_ids, found, strict=True):
                if data is None:
                    raise NotFound(
                        f"store '{snapshot.store.name}' has no tag {i} in version {snapshot.version.number}"
                    )
                text, kind, _ = decode_tag(data)
                self.names.append((text, kind))
                self.slots[i] = len(self.names) - 1
