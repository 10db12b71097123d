"""A store on disk: one LMDB environment that holds everything that is true of it.

    meta      "state" -> JSON: format, name, current version
    versions  number  -> JSON of a `Version`
    entries   entry_id -> record (`records.py`)
    keys      key -> entry_ids that ever had it, ascending
    vectors   entry_id // 256  -> rows of float16
    tags      tag_id -> record;     tag_ids: kind + canonical form -> tag_id
    embeddings  tag_id // 256  -> rows of float16
    pages     page_id -> 64 KiB of a version's arrays: which entries live (bits), how many carry each tag (int32)

Entries, tags and vectors are only ever appended. A version says which of them are its own; it becomes visible when the one
transaction that writes its record commits, and that is the only commit point of a store. Whatever was appended behind the
last version is invisible and is swept away by the next writer. All numbers used as keys are big endian, so LMDB keeps them
in order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from struct import Struct
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from tagstore.environment import environment
from tagstore.errors import Damaged, InvalidInput, NotFound
from tagstore.records import decode_entry, decode_hot, decode_tag
from tagstore.types import Entry, Fingerprint, Kind, StoreInfo, Vectors

FORMAT = 1
ROWS = 256  # rows of a block of vectors: 256 KiB at 512-d float16
PAGE = 1 << 16  # bytes of a page of a version's arrays

DATABASES = ("meta", "versions", "entries", "keys", "vectors", "tags", "tag_ids", "embeddings", "pages")
U64 = Struct(">Q")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable state of a store, as it is written at its commit."""

    number: int
    parent: int
    created: str
    """UTC, ISO 8601."""
    operation: str
    """What made it: "ingest"."""
    source: str
    entries: int
    tags: int
    unique_tags: int
    next_entry_id: int
    next_tag_id: int
    fingerprint: Fingerprint
    miner: Mapping[str, Any]
    """Identity and settings of the miner."""
    index: Mapping[str, Any]
    """Kind, parameters and file of the index."""
    pages: Mapping[str, list[int]] = field(default_factory=dict)
    """Page ids of the arrays "live" and "counts"."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, data: bytes | str) -> Version:
        value = json.loads(data)
        return cls(**{**value, "fingerprint": Fingerprint(**value["fingerprint"])})


class Store:
    """The read side of a store: its versions. Cheap to make; holds no transaction."""

    def __init__(self, root: str | Path, name: str) -> None:
        self.name = check_name(name)
        self.directory = Path(root) / name
        try:
            self.env = environment(self.directory)
        except NotFound:
            there = ", ".join(store_names(root)) or "none"
            raise NotFound(f"no store '{name}'; those there are: {there}") from None
        self.db = open_databases(self.env)
        state = self.state()
        if state["format"] != FORMAT:
            raise Damaged(
                f"store '{name}' has on-disk format {state['format']}, this release reads {FORMAT}: use the release that wrote it"
            )

    def state(self) -> dict[str, Any]:
        with self.env.begin() as txn:
            data = txn.get(b"state", db=self.db["meta"])
        if data is None:
            raise NotFound(f"store '{self.name}' was created but nothing was ever committed to it: run `tagstore ingest` again")
        return dict(json.loads(data))

    def versions(self) -> list[Version]:
        """All versions, oldest first."""
        with self.env.begin() as txn, txn.cursor(self.db["versions"]) as cursor:
            return [Version.from_json(value) for _, value in cursor]

    def snapshot(self, version: int | None = None) -> Snapshot:
        """A version to read from; the current one if none is named. Raises `NotFound`."""
        number = version or self.state()["current"]
        if not number:
            raise NotFound(f"store '{self.name}' has no version yet: its first ingest did not finish; run it again")
        with self.env.begin() as txn:
            data = txn.get(U64.pack(number), db=self.db["versions"])
        if data is None:
            raise NotFound(f"store '{self.name}' has no version {number}; its current one is {self.state()['current']}")
        return Snapshot(self, Version.from_json(data))


class Snapshot:
    """One version of a store, to read from. Safe for threads: every call reads in a transaction of its own."""

    def __init__(self, store: Store, version: Version) -> None:
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
                raise NotFound(f"version {self.version.number} of store '{self.store.name}' has no entry {entry_id}")
            return decode_entry(entry_id, data)

    def entries(self) -> Iterator[Entry]:
        """All entries in order of their ids; memory does not grow with their number."""
        for chunk in np.array_split(ids := self.live(), max(1, len(ids) // 1024)):
            with self.store.env.begin() as txn:
                found = [(int(i), txn.get(U64.pack(int(i)), db=self.store.db["entries"])) for i in chunk]
            yield from (decode_entry(i, data) for i, data in found)

    def keys_and_tags(self, entry_ids: Iterable[int]) -> list[tuple[str, list[int]]]:
        """Key and tag ids of each entry: all that a query needs of it."""
        with self.store.env.begin(buffers=True) as txn:
            db = self.store.db["entries"]
            return [decode_hot(txn.get(U64.pack(i), db=db)) for i in entry_ids]

    def tags(self, tag_ids: Iterable[int]) -> list[tuple[str, Kind, str]]:
        """Text, kind and canonical form of each tag. Raises `NotFound`, naming the first id that isn't there."""
        with self.store.env.begin(buffers=True) as txn:
            db, found = self.store.db["tags"], []
            for i in tag_ids:
                data = txn.get(U64.pack(i), db=db) if 0 <= i < self.version.next_tag_id else None
                if data is None:
                    raise NotFound(f"store '{self.store.name}' has no tag {i} in version {self.version.number}")
                found.append(decode_tag(data))
            return found

    def live(self) -> NDArray[np.int64]:
        """Ids of the entries of this version, ascending: `[entries]` int64."""
        bits = np.unpackbits(self.array("live", np.uint8), count=self.version.next_entry_id, bitorder="little")
        return np.flatnonzero(bits).astype(np.int64)

    def counts(self) -> NDArray[np.int32]:
        """How many entries of this version carry each tag: `[next_tag_id]` int32."""
        return self.array("counts", np.int32)[: self.version.next_tag_id]

    def array(self, name: str, dtype: Any) -> NDArray[Any]:
        with self.store.env.begin() as txn:
            pages = [txn.get(U64.pack(i), db=self.store.db["pages"]) for i in self.version.pages[name]]
        return np.frombuffer(b"".join(pages), dtype)

    def vectors(self, ids: NDArray[np.int64]) -> Vectors:
        """Image vectors of some entries, `[len(ids), D]` float32."""
        return self._gather("vectors", ids)

    def embeddings(self, ids: NDArray[np.int64]) -> Vectors:
        """Text embeddings of some tags, `[len(ids), D]` float32."""
        return self._gather("embeddings", ids)

    def vector_blocks(self, ids: NDArray[np.int64]) -> Iterator[Vectors]:
        """Image vectors of ascending ids in pieces of at most 64 Ki rows."""
        for start in range(0, len(ids), 1 << 16):
            yield self._gather("vectors", ids[start : start + (1 << 16)])

    def _gather(self, db: str, ids: NDArray[np.int64]) -> Vectors:
        out = np.empty((len(ids), self.dimension), np.float32)
        blocks = ids // ROWS
        with self.store.env.begin(buffers=True) as txn:
            for block in np.unique(blocks):
                rows = _rows(txn.get(U64.pack(int(block)), db=self.store.db[db]), self.dimension)
                where = blocks == block
                out[where] = rows[ids[where] % ROWS]
        return out

    def info(self) -> StoreInfo:
        v = self.version
        return StoreInfo(self.store.name, v.number, v.entries, v.tags, v.unique_tags, v.fingerprint, v.index, v.created)


def check_name(name: str) -> str:
    """The name itself, if a store may bear it. Raises `InvalidInput`."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"'{name}' is no name for a store: use letters, digits, '_', '-' and '.', not first, at most 64 of them")
    return name


def store_names(root: str | Path) -> list[str]:
    """Names of the stores under a directory, sorted."""
    return sorted(path.parent.name for path in Path(root).glob("*/data.mdb") if _NAME.fullmatch(path.parent.name))


def open_databases(env: Any, *, create: bool = False) -> dict[str, Any]:
    """The named databases of a store. Raises `NotFound` where a first ingest was cut off before it made them."""
    try:
        return {name: env.open_db(name.encode(), create=create) for name in DATABASES}
    except lmdb.NotFoundError:
        raise NotFound(f"{env.path()}/data.mdb holds no tag store, or its first ingest did not finish: ingest into it again") from None


def key_of(key: str) -> bytes:
    """How a key stands in `keys`: LMDB takes 511 bytes, a longer one stands by its hash."""
    data = key.encode("utf-8", "replace")
    return data if len(data) <= 480 else b"\xff" + sha256(data).digest()


def tag_key(kind_index: int, canonical: str) -> bytes:
    """How a tag stands in `tag_ids`."""
    return bytes([kind_index]) + key_of(canonical)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _rows(data: Any, dimension: int) -> NDArray[np.float16]:
    return np.frombuffer(data, np.float16).reshape(-1, dimension)
