"""The tables of a store's database: their names, keys and values, how to open them, and their one writer.

    meta        "state" -> JSON: format, current version, where ids end
                "ingest" -> JSON: how far an unfinished ingest got
    versions    number  -> JSON of a `Version`
    entries     entry_id -> record (`codec.py`)
    keys        key -> entry_ids that ever had it, ascending
    vectors     (space, entry_id // 255) -> rows of float16 (`rows.py`)
    tags        tag_id -> record;    tag_ids: kind + canonical form -> tag_id
    embeddings  (space, tag_id // 255) -> rows of float16
    pages       page_id -> 64 KiB of a version's arrays: which entries live (bits), entries per tag (int32)
    quarantine  (version, n) -> JSON of a rejected pair
    sources     version -> JSON: what its ingest read; kept when the version is dropped
    takedowns   version -> JSON: what was taken down, by whom and why

Numbers in keys are big endian, so that LMDB keeps them in order. JSON records carry a checksum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from struct import Struct
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from tagstore.errors import Damaged, NotFound
from tagstore.storage.codec import decode_hot, decode_tag, seal, unseal
from tagstore.storage.version import Version
from tagstore.types import KINDS, Kind

FORMAT = 4
"""Number of the on-disk format."""
PAGE_BYTES = 1 << 16
"""Bytes of a page of a version's arrays."""
TABLES = (
    *("meta", "versions", "entries", "keys", "vectors", "tags", "tag_ids", "embeddings", "pages"),
    *("quarantine", "sources", "takedowns"),
)
U64 = Struct(">Q")


def open_tables(env: Any, *, create: bool = False) -> dict[str, Any]:
    """Open the tables of an environment, by name.

    Raises `NotFound` if a first ingest did not get to make them, `Damaged` for another release's format.
    """
    try:
        if env.flags()["readonly"]:
            meta = env.open_db(b"meta", create=False)
            with env.begin() as txn:
                _check_format(env, txn.get(b"state", db=meta))
            return {name: env.open_db(name.encode(), create=False) for name in TABLES}
        # in a transaction of ours: its own would wait for the writer and hold the interpreter meanwhile
        with env.begin(write=True) as txn:
            meta = env.open_db(b"meta", txn=txn, create=create)
            _check_format(env, txn.get(b"state", db=meta))
            return {name: env.open_db(name.encode(), txn=txn, create=create) for name in TABLES}
    except lmdb.NotFoundError:
        raise NotFound(
            f"{env.path()}/data.mdb holds no tag store, or its first ingest did not finish: ingest into it "
            "again"
        ) from None


def _check_format(env: Any, state: bytes | None) -> None:
    if state is not None and (number := unseal(b"state", state)["format"]) != FORMAT:
        raise Damaged(
            f"{env.path()} has on-disk format {number}, this release reads {FORMAT}: use the release that "
            "wrote it"
        )


def key_of(key: str) -> bytes:
    """The key of a pair in `keys`: its bytes, or their hash, since LMDB takes keys of at most 511 bytes."""
    data = key.encode("utf-8", "replace")
    return data if 0 < len(data) <= 480 else b"\xff" + sha256(data).digest()


def tag_key(kind: Kind, canonical: str) -> bytes:
    """The key of a tag in `tag_ids`."""
    return bytes([KINDS.index(kind)]) + key_of(canonical)


def unpack_ids(data: bytes | None) -> list[int]:
    """Decode the ids of a record of `keys`; none if there is no record."""
    return [U64.unpack_from(data, offset)[0] for offset in range(0, len(data), 8)] if data else []


def arrays_of(live: NDArray[np.bool_], counts: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """The arrays of a version as they are stored: "live" as bits, "counts" as they are."""
    return {"live": np.packbits(live, bitorder="little"), "counts": counts}


def records_from(txn: Any, table: Any, first: int) -> Iterator[tuple[int, bytes]]:
    """Records from an id on; the caller may delete each before it takes the next."""
    with txn.cursor(table) as cursor:
        while cursor.set_range(U64.pack(first)):
            key, value = cursor.item()
            yield U64.unpack(key)[0], value
            first = U64.unpack(key)[0] + 1


class TableWriter:
    """Writes the tables of one environment, in transactions that the caller holds.

    Args:
        next_page: id of the next page of an array.
        spaces: of each space, the digest of its fingerprint and how many tags are embedded in it.
    """

    def __init__(
        self, db: Mapping[str, Any], next_page: int = 0, spaces: Mapping[int, tuple[str, int]] | None = None
    ) -> None:
        self.db = db
        self.next_page = next_page
        self.spaces = dict(spaces or {})
        self._pages: dict[bytes, int] = {}
        """Ids of the pages written here, by the sha256 of their bytes."""

    def put_entry(self, txn: Any, entry_id: int, record: bytes, key: str | None = None) -> None:
        """Write an entry whose id is above all others; its key is decoded if it is not given."""
        txn.put(U64.pack(entry_id), record, db=self.db["entries"], append=True)
        self.put_key(txn, entry_id, decode_hot(record)[0] if key is None else key)

    def put_key(self, txn: Any, entry_id: int, key: str) -> None:
        """Add an entry to those that a key leads to."""
        packed = key_of(key)
        ids = txn.get(packed, db=self.db["keys"]) or b""
        txn.put(packed, ids + U64.pack(entry_id), db=self.db["keys"])

    def delete_entry(self, txn: Any, entry_id: int, record: bytes) -> None:
        """Remove an entry, also from those that its key leads to."""
        key = key_of(decode_hot(record)[0])
        others = [i for i in unpack_ids(txn.get(key, db=self.db["keys"])) if i != entry_id]
        if others:
            txn.put(key, b"".join(map(U64.pack, others)), db=self.db["keys"])
        else:
            txn.delete(key, db=self.db["keys"])
        txn.delete(U64.pack(entry_id), db=self.db["entries"])

    def put_tag(self, txn: Any, tag_id: int, record: bytes) -> bool:
        """Write a tag whose id is above all others; false if there is one of its kind and canonical form."""
        if not self.put_tag_id(txn, tag_id, record):
            return False
        return bool(txn.put(U64.pack(tag_id), record, db=self.db["tags"], append=True))

    def put_tag_id(self, txn: Any, tag_id: int, record: bytes) -> bool:
        """Make a tag's kind and canonical form lead to it; false if they lead to a tag already."""
        _, kind, canonical = decode_tag(record)
        return bool(
            txn.put(tag_key(kind, canonical), U64.pack(tag_id), db=self.db["tag_ids"], overwrite=False)
        )

    def delete_tag(self, txn: Any, tag_id: int, record: bytes) -> None:
        """Remove a tag, and what leads to it."""
        _, kind, canonical = decode_tag(record)
        txn.delete(tag_key(kind, canonical), db=self.db["tag_ids"])
        txn.delete(U64.pack(tag_id), db=self.db["tags"])

    def put_arrays(
        self, txn: Any, arrays: Mapping[str, NDArray[Any]], parent: Mapping[str, Sequence[int]]
    ) -> dict[str, list[int]]:
        """Write the arrays of a version in pages, whose ids are returned.

        A page that equals the parent's in the same place, or one that was written here before, is shared.
        """
        return {name: self._put_array(txn, a.tobytes(), parent.get(name, ())) for name, a in arrays.items()}

    def _put_array(self, txn: Any, data: bytes, parent: Sequence[int]) -> list[int]:
        ids = []
        for n, start in enumerate(range(0, len(data), PAGE_BYTES)):
            page = data[start : start + PAGE_BYTES]
            if n < len(parent) and txn.get(U64.pack(parent[n]), db=self.db["pages"]) == page:
                ids.append(parent[n])
                continue
            digest = sha256(page).digest()
            if digest not in self._pages:
                self._pages[digest] = self.next_page
                txn.put(U64.pack(self.next_page), page, db=self.db["pages"])
                self.next_page += 1
            ids.append(self._pages[digest])
        return ids

    def put_version(self, txn: Any, version: Version, *, overwrite: bool = False) -> None:
        """Write the record of a version."""
        record = version.to_json().encode()
        txn.put(U64.pack(version.number), record, db=self.db["versions"], overwrite=overwrite)

    def put_json(self, txn: Any, table: str, numbers: Iterable[int], value: Mapping[str, Any]) -> None:
        """Write a record that is JSON, under a key of one or more numbers."""
        key = b"".join(map(U64.pack, numbers))
        txn.put(key, seal(key, value), db=self.db[table])

    def put_state(self, txn: Any, current: int, next_entry_id: int, next_tag_id: int) -> None:
        """Write the state of the store, which names its current version."""
        state = {
            "format": FORMAT,
            "current": current,
            "next_page": self.next_page,
            "next_entry_id": next_entry_id,
            "next_tag_id": next_tag_id,
            "spaces": self.spaces,
        }
        txn.put(b"state", seal(b"state", state), db=self.db["meta"])
