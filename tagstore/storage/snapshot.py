"""One version of a store, to read from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import Damaged, NotFound
from tagstore.metadata_filter import fits, needle
from tagstore.storage.codec import (
    decode_entry,
    decode_hashes,
    decode_hot,
    decode_metadata,
    decode_tag,
    unseal,
)
from tagstore.storage.database import Database
from tagstore.storage.environments import trim
from tagstore.storage.rows import Allowed, RowReader
from tagstore.storage.tables import U64, key_of, unpack_ids
from tagstore.storage.version import Version
from tagstore.types import Entry, Kind, Rejected, StoreInfo, Vectors


class Snapshot:
    """One version of a store, to read from. Safe for threads: every call has its own transaction."""

    def __init__(self, store: Database, version: Version) -> None:
        self.store = store
        self.version = version

    @property
    def dimension(self) -> int:
        return self.version.fingerprint.dimension

    def entry(self, entry_id: int) -> Entry:
        """The entry of an id. Raises `NotFound` if this version doesn't have it."""
        with self.store.env.begin(buffers=True) as txn:
            data = txn.get(U64.pack(entry_id), db=self.store.db["entries"])
            if data is None or entry_id >= self.version.next_entry_id:
                raise NotFound(
                    f"version {self.version.number} of store '{self.store.name}' has no entry {entry_id}"
                )
            return decode_entry(entry_id, data)

    def entries(self, ids: NDArray[np.int64] | None = None) -> Iterator[Entry]:
        """Entries of this version in order of their ids, or those of `ids`, in bounded memory."""
        return self.store.entries(self.live() if ids is None else ids)

    def find(self, key: str) -> int | None:
        """Id of the entry that has a key in this version."""
        [ids] = self.ids_of_keys([key])
        live = self.live_mask() if ids else np.zeros(0, bool)
        return next((i for i in reversed(ids) if i < len(live) and live[i]), None)

    def ids_of_keys(self, keys: Iterable[str]) -> list[list[int]]:
        """The ids of all entries that ever had each key, in any version, ascending."""
        with self.store.env.begin(db=self.store.db["keys"]) as txn:
            return [unpack_ids(txn.get(key_of(key))) for key in keys]

    def keys_and_tags(self, entry_ids: Iterable[int]) -> list[tuple[str, list[int]]]:
        """Key and tag ids of each entry: all that a query needs of it."""
        with self.store.env.begin(db=self.store.db["entries"]) as txn:
            get, pack = txn.get, U64.pack
            return [decode_hot(get(pack(i))) for i in entry_ids]

    def hashes(self, entry_ids: Iterable[int]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """sha256 (`[n, 4]`, its bytes as they lie) and perceptual hash (`[n]`) of each entry's image."""
        with self.store.env.begin(db=self.store.db["entries"], buffers=True) as txn:
            hashes = [decode_hashes(txn.get(U64.pack(i))) for i in entry_ids]
        digests = np.frombuffer(b"".join(digest for digest, _ in hashes), np.uint64).reshape(-1, 4)
        return digests, np.frombuffer(b"".join(bits for _, bits in hashes), ">u8").astype(np.uint64)

    def with_metadata(self, entry_ids: NDArray[np.int64], where: Mapping[str, str]) -> NDArray[np.int64]:
        """Those of the entries whose metadata has all these values (`metadata_filter`).

        Reads the record of every entry: one that does not hold the bytes of the values is not decoded.
        """
        needles = [needle(value) for value in where.values()]
        matching = []
        for start in range(0, len(entry_ids), 4096):
            with self.store.env.begin(db=self.store.db["entries"]) as txn:
                for i in entry_ids[start : start + 4096].tolist():
                    record = txn.get(U64.pack(i))
                    if all(n in record for n in needles) and fits(decode_metadata(record), where):
                        matching.append(i)
        return np.array(matching, np.int64)

    def tags(self, tag_ids: Iterable[int]) -> list[tuple[str, Kind, str]]:
        """Text, kind and canonical form of each tag. Raises `NotFound`, naming the first missing id."""
        with self.store.env.begin(buffers=True) as txn:
            db, tags = self.store.db["tags"], []
            for i in tag_ids:
                data = txn.get(U64.pack(i), db=db) if 0 <= i < self.version.next_tag_id else None
                if data is None:
                    raise NotFound(
                        f"store '{self.store.name}' has no tag {i} in version {self.version.number}"
                    )
                tags.append(decode_tag(data))
            return tags

    def vocabulary(self, first: int = 0, limit: int | None = None) -> list[int]:
        """Ids of the tags that entries of this version carry, ascending, from id `first` on."""
        ids = np.flatnonzero(self.counts())
        return [int(i) for i in ids[np.searchsorted(ids, first) :][:limit]]

    def live_mask(self) -> NDArray[np.bool_]:
        """Which entry ids live in this version: `[next_entry_id]` bool."""
        bits = np.unpackbits(
            self.array("live", np.uint8), count=self.version.next_entry_id, bitorder="little"
        )
        return bits.view(bool)

    def live(self) -> NDArray[np.int64]:
        """Ids of the entries of this version, ascending: `[entries]` int64."""
        return np.flatnonzero(self.live_mask()).astype(np.int64)

    def counts(self) -> NDArray[np.int32]:
        """How many entries of this version carry each tag: `[next_tag_id]` int32."""
        counts = np.zeros(self.version.next_tag_id, np.int32)
        stored = self.array("counts", np.int32)
        counts[: len(stored)] = stored  # a rollback shares the pages of a version that knew fewer tags
        return counts

    def array(self, name: str, dtype: Any) -> NDArray[Any]:
        """An array of this version, as it is stored. Raises `Damaged` if a page of it is gone."""
        with self.store.env.begin() as txn:
            pages = [txn.get(U64.pack(i), db=self.store.db["pages"]) for i in self.version.pages[name]]
        if None in pages:
            raise Damaged(
                f"version {self.version.number} of store '{self.store.name}' has lost a page of its array "
                f"'{name}'"
            )
        return np.frombuffer(b"".join(pages), dtype)

    def vectors(self, ids: NDArray[np.int64]) -> Vectors:
        """Image vectors of entries, `[len(ids), D]` float32. Raises `Damaged` if the store has lost one."""
        return self._rows("vectors").gather(ids)

    def embeddings(self, ids: NDArray[np.int64]) -> Vectors:
        """Text embeddings of tags, `[len(ids), D]` float32. Raises `Damaged` if the store has lost one."""
        return self._rows("embeddings").gather(ids)

    def vector_blocks(self, ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Vectors]]:
        """Ascending ids and their image vectors in pieces of at most 64 Ki rows."""
        reader = self._rows("vectors")
        for start in range(0, len(ids), 1 << 16):
            piece = ids[start : start + (1 << 16)]
            yield piece, reader.gather(piece)
            trim(self.store.env)

    def scan_vectors(
        self, runs: Iterable[range], allowed: Allowed
    ) -> Iterator[tuple[NDArray[np.int64], Vectors]]:
        """Yield the allowed ids of each run and their image vectors; the next run reuses the memory.

        Whole blocks of `BLOCK_ROWS` ids are read fastest. Raises `Damaged` if a row is missing.
        """
        return self._rows("vectors").scan(runs, allowed)

    def _rows(self, name: str) -> RowReader:
        store = self.store
        what = f"the {name} of store '{store.name}'"
        return RowReader(store.env, store.db[name], self.version.space, self.dimension, what)

    def sources(self) -> list[dict[str, Any]]:
        """What was read into the store up to this version, oldest first, dropped versions included."""
        with self.store.env.begin() as txn, txn.cursor(self.store.db["sources"]) as cursor:
            return [unseal(key, value) for key, value in cursor if U64.unpack(key)[0] <= self.version.number]

    def quarantine(self) -> Iterator[Rejected]:
        """The pairs that were refused when this version was made."""
        first = U64.pack(self.version.number)
        with self.store.env.begin() as txn, txn.cursor(self.store.db["quarantine"]) as cursor:
            if cursor.set_range(first):
                for key, value in cursor:
                    if not key.startswith(first):
                        return
                    yield Rejected(**unseal(key, value))

    def info(self) -> StoreInfo:
        v = self.version
        index = {k: val for k, val in v.index.items() if k != "files"} | {
            "files": len(v.index.get("files", [])),
            "bytes": sum(f["bytes"] for f in v.index.get("files", [])),
        }
        return StoreInfo(
            self.store.name, v.number, v.entries, v.tags, v.unique_tags, v.fingerprint, index, v.created,
            v.tag_embeddings,
        )  # fmt: skip
