"""A store on disk: one LMDB environment that holds everything that is true of it.

    meta        "state" -> JSON: format, current version, high-water marks;  "ingest" -> JSON: how far an unfinished ingest got
    versions    number  -> JSON of a `Version`
    entries     entry_id -> record (`records.py`)
    keys        key -> entry_ids that ever had it, ascending
    vectors     (space, entry_id // 255) -> rows of float16
    tags        tag_id -> record;    tag_ids: kind + canonical form -> tag_id
    embeddings  (space, tag_id // 255) -> rows of float16
    pages       page_id -> 64 KiB of a version's arrays: which entries live (bits), how many carry each tag (int32)
    quarantine  (version, n) -> JSON of a rejected pair
    sources     version -> JSON: what its ingest read; kept when the version is dropped
    takedowns   version -> JSON: what was taken down, by whom and why

Entries, tags and vectors are only ever appended. A version says which of them are its own; it becomes visible when the one
transaction that writes its record commits, and that is the only commit point of a store. Whatever was appended behind the
last version is invisible, and is taken up again or swept away by the next writer. A space is one encoder's vectors. All
numbers used as keys are big endian, so that LMDB keeps them in order.
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

from tagstore.errors import Damaged, InvalidInput, NotFound
from tagstore.storage.codec import (
    decode_entry,
    decode_hashes,
    decode_hot,
    decode_metadata,
    decode_tag,
    metadata_needle,
    unseal,
    widened,
)
from tagstore.storage.lmdb_files import environment, generation, trim
from tagstore.types import Entry, Fingerprint, Kind, Rejected, StoreInfo, Vectors

FORMAT = 4
ROW_FETCH_LIMIT = 1 << 14
"""Rows up to which they are fetched one by one; more are fetched by block."""
ROWS = 255  # rows of a block of vectors: with LMDB's header of 16 bytes they still fit the whole pages that 256 rows would fill
PAGE = 1 << 16  # bytes of a page of a version's arrays
SPACE = 48  # a block's key is space << 48 | block

DATABASES = (
    *("meta", "versions", "entries", "keys", "vectors", "tags", "tag_ids", "embeddings", "pages"),
    *("quarantine", "sources", "takedowns"),
)
U64 = Struct(">Q")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True, slots=True)
class Range:
    """A checksum over a run of records, as they were when a version was committed."""

    first: int
    end: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable state of a store, as it is written at its commit."""

    number: int
    parent: int
    created: str
    """UTC, ISO 8601."""
    operation: str
    """What made it: "ingest", "delete", "rollback to 3" ..."""
    source: Mapping[str, Any]
    """Of an ingest: path, format and columns."""
    entries: int
    tags: int
    unique_tags: int
    next_entry_id: int
    next_tag_id: int
    space: int
    fingerprint: Fingerprint
    miner: Mapping[str, Any]
    """Identity and settings of the miner."""
    pages: Mapping[str, list[int]] = field(default_factory=dict)
    """Page ids of the arrays "live" and "counts"."""
    index: Mapping[str, Any] = field(default_factory=dict)
    """Kind and parameters of the index, and its files with their checksums."""
    ranges: Mapping[str, list[Range]] = field(default_factory=dict)
    """Checksums of "entries", "vectors", "tags" and "embeddings"; of "live" and "counts", one over the whole."""

    def to_json(self) -> str:
        """JSON with a checksum of its own."""
        body = json.dumps(asdict(self), sort_keys=True)
        return json.dumps({"version": body, "sha256": sha256(body.encode()).hexdigest()})

    @classmethod
    def from_json(cls, data: bytes | str) -> Version:
        """Raises `Damaged` if the record is not what was written."""
        try:
            outer = json.loads(data)
            body = outer["version"]
            if sha256(body.encode()).hexdigest() != outer["sha256"]:
                raise Damaged(
                    "a version's record does not fit its checksum: run `tagstore verify`, restore the store from a copy"
                )
            value = json.loads(body)
        except (ValueError, TypeError, KeyError) as error:
            raise Damaged(f"a version's record cannot be read: {error}") from error
        value["fingerprint"] = Fingerprint(**value["fingerprint"])
        value["ranges"] = {name: [Range(**r) for r in ranges] for name, ranges in value["ranges"].items()}
        return cls(**value)


class Store:
    """The read side of a store: its versions. Cheap to make; holds no transaction."""

    def __init__(self, root: str | Path, name: str) -> None:
        self.name = check_name(name)
        self.directory = Path(root) / name
        for attempt in range(3):
            try:
                self.generation = generation(self.directory)
                self.env = environment(self.generation)
                break
            except NotFound:
                if not (self.directory / "CURRENT").exists():
                    there = ", ".join(store_names(root)) or "none"
                    raise NotFound(f"no store '{name}'; those there are: {there}") from None
                # between reading CURRENT and opening what it names, a compaction may have ended
                if attempt == 2:
                    raise Damaged(
                        f"{self.directory}/CURRENT names {self.generation.name}, which is not there"
                    ) from None
        self._open()

    @classmethod
    def of_generation(cls, name: str, directory: Path, path: Path) -> Store:
        """A store in a generation that may not be the current one."""
        store = cls.__new__(cls)
        store.name, store.directory, store.generation, store.env = name, directory, path, environment(path)
        store._open()
        return store

    def _open(self) -> None:
        self.db = open_databases(self.env)
        self.state()  # raises if there is none

    @property
    def index_directory(self) -> Path:
        """Where the index files of this generation are."""
        return self.generation / "index"

    def state(self) -> dict[str, Any]:
        with self.env.begin() as txn:
            data = txn.get(b"state", db=self.db["meta"])
        if data is None:
            raise NotFound(
                f"store '{self.name}' was created but nothing was ever committed to it: run `tagstore ingest` again"
            )
        return unseal(b"state", data)

    def is_current(self) -> bool:
        """Whether this is still the store's database; false once a compaction has replaced it."""
        try:
            return generation(self.directory) == self.generation
        except NotFound:
            return False

    def versions(self) -> list[Version]:
        """All versions, oldest first."""
        with self.env.begin() as txn, txn.cursor(self.db["versions"]) as cursor:
            found = [(U64.unpack(key)[0], Version.from_json(value)) for key, value in cursor]
        for number, version in found:
            if number != version.number:
                raise Damaged(
                    f"the record of version {version.number} of store '{self.name}' stands under number {number}"
                )
        return [version for _, version in found]

    def snapshot(self, version: int | None = None) -> Snapshot:
        """A version to read from; the current one if none is named. Raises `NotFound`."""
        number = version or self.state()["current"]
        if not number:
            raise NotFound(
                f"store '{self.name}' has no version yet: its first ingest did not finish; run it again"
            )
        with self.env.begin() as txn:
            data = txn.get(U64.pack(number), db=self.db["versions"])
        if data is None:
            raise NotFound(
                f"store '{self.name}' has no version {number}; its current one is {self.state()['current']}"
            )
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
                raise NotFound(
                    f"version {self.version.number} of store '{self.store.name}' has no entry {entry_id}"
                )
            return decode_entry(entry_id, data)

    def entries(self, ids: NDArray[np.int64] | None = None) -> Iterator[Entry]:
        """Entries of this version in order of their ids, or those of `ids`; memory does not grow with their number."""
        ids = self.live() if ids is None else ids
        for start in range(0, len(ids), 1024):
            with self.store.env.begin() as txn:
                found = [
                    (i, txn.get(U64.pack(i), db=self.store.db["entries"]))
                    for i in ids[start : start + 1024].tolist()
                ]
            yield from (decode_entry(i, data) for i, data in found)

    def find(self, key: str) -> int | None:
        """Id of the entry that has a key in this version."""
        with self.store.env.begin() as txn:
            ids = unpack_ids(txn.get(key_of(key), db=self.store.db["keys"]) or b"")
        live = self.live_mask() if ids else np.zeros(0, bool)
        return next((i for i in reversed(ids) if i < len(live) and live[i]), None)

    def ids_of_keys(self, keys: Iterable[str]) -> list[list[int]]:
        """Of each key, the ids of all entries that ever had it, in any version, ascending."""
        with self.store.env.begin(db=self.store.db["keys"]) as txn:
            return [unpack_ids(txn.get(key_of(key)) or b"") for key in keys]

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
        """Those of the entries whose metadata has all these values, compared as text.

        Reads the record of every entry: one that does not hold the bytes of the values is not decoded.
        """
        needles = [metadata_needle(value) for value in where.values()]
        matching = []
        for start in range(0, len(entry_ids), 4096):
            with self.store.env.begin(db=self.store.db["entries"]) as txn:
                for i in entry_ids[start : start + 4096].tolist():
                    record = txn.get(U64.pack(i))
                    if all(needle in record for needle in needles):
                        metadata = decode_metadata(record)
                        if all(n in metadata and str(metadata[n]) == value for n, value in where.items()):
                            matching.append(i)
        return np.array(matching, np.int64)

    def tags(self, tag_ids: Iterable[int]) -> list[tuple[str, Kind, str]]:
        """Text, kind and canonical form of each tag. Raises `NotFound`, naming the first id that isn't there."""
        with self.store.env.begin(buffers=True) as txn:
            db, found = self.store.db["tags"], []
            for i in tag_ids:
                data = txn.get(U64.pack(i), db=db) if 0 <= i < self.version.next_tag_id else None
                if data is None:
                    raise NotFound(
                        f"store '{self.store.name}' has no tag {i} in version {self.version.number}"
                    )
                found.append(decode_tag(data))
            return found

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
                f"version {self.version.number} of store '{self.store.name}' has lost a page of its array '{name}'"
            )
        return np.frombuffer(b"".join(pages), dtype)

    def vectors(self, ids: NDArray[np.int64]) -> Vectors:
        """Image vectors of some entries, `[len(ids), D]` float32."""
        return self._gather("vectors", ids)

    def embeddings(self, ids: NDArray[np.int64]) -> Vectors:
        """Text embeddings of some tags, `[len(ids), D]` float32."""
        return self._gather("embeddings", ids)

    def vector_blocks(self, ids: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Vectors]]:
        """Ascending ids and their image vectors in pieces of at most 64 Ki rows."""
        for start in range(0, len(ids), 1 << 16):
            piece = ids[start : start + (1 << 16)]
            yield piece, self._gather("vectors", piece)
            trim(self.store.env)

    def _gather(self, db: str, ids: NDArray[np.int64]) -> Vectors:
        if len(ids) <= ROW_FETCH_LIMIT:
            return self._gather_rows(db, ids.tolist())
        out = np.empty((len(ids), self.dimension), np.float32)
        blocks = ids // ROWS
        with self.store.env.begin(buffers=True) as txn:
            for block in np.unique(blocks).tolist():
                data = txn.get(block_key(self.version.space, block), db=self.store.db[db])
                where = blocks == block
                offsets = ids[where] % ROWS
                if data is None or len(data) < (int(offsets.max()) + 1) * self.dimension * 2:
                    raise Damaged(f"store '{self.store.name}' has lost rows of block {block} of its {db}")
                out[where] = np.frombuffer(data, np.float16).reshape(-1, self.dimension)[offsets]
        return out

    def _gather_rows(self, name: str, ids: list[int]) -> Vectors:
        width, space, pack = 2 * self.dimension, self.version.space << SPACE, U64.pack
        rows = []
        with self.store.env.begin(db=self.store.db[name], buffers=True) as txn:
            get = txn.get
            for i in ids:
                offset = i % ROWS * width
                block = get(pack(space | i // ROWS))
                if block is None or len(block) < offset + width:
                    raise Damaged(f"store '{self.store.name}' has lost row {i} of its {name}")
                rows.append(block[offset : offset + width])
            # joined while the transaction lasts: the rows are the map's own memory
            halves = np.frombuffer(b"".join(rows), np.float16)
        return widened(halves).reshape(len(ids), self.dimension)

    def sources(self) -> list[dict[str, Any]]:
        """What was read into the store up to this version, oldest first, also by versions that are not there any more."""
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
            self.store.name, v.number, v.entries, v.tags, v.unique_tags, v.fingerprint, index, v.created
        )


def check_name(name: str) -> str:
    """The name itself, if a store may bear it. Raises `InvalidInput`."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"'{name}' is no name for a store: use letters, digits, '_', '-' and '.', not first, at most 64 of them"
        )
    return name


def store_names(root: str | Path) -> list[str]:
    """Names of the stores under a directory, sorted."""
    return sorted(
        path.parent.name for path in Path(root).glob("*/CURRENT") if _NAME.fullmatch(path.parent.name)
    )


def open_databases(env: Any, *, create: bool = False) -> dict[str, Any]:
    """The named databases of a store.

    Raises `NotFound` where a first ingest was cut off before it made them, `Damaged` for a store in another release's format.
    """
    try:
        # in a transaction of ours: in one of its own, lmdb waits for the writer with the interpreter in hand, which the writer needs
        with env.begin(write=True) as txn:
            meta = env.open_db(b"meta", txn=txn, create=create)
            state = txn.get(b"state", db=meta)
            if state is not None and (found := unseal(b"state", state)["format"]) != FORMAT:
                raise Damaged(
                    f"{env.path()} has on-disk format {found}, this release reads {FORMAT}: use the release that wrote it"
                )
            return {name: env.open_db(name.encode(), txn=txn, create=create) for name in DATABASES}
    except lmdb.NotFoundError:
        raise NotFound(
            f"{env.path()}/data.mdb holds no tag store, or its first ingest did not finish: ingest into it again"
        ) from None


def block_key(space: int, block: int) -> bytes:
    return U64.pack(space << SPACE | block)


def key_of(key: str) -> bytes:
    """How a key stands in `keys`: LMDB takes 511 bytes, a longer one stands by its hash."""
    data = key.encode("utf-8", "replace")
    return data if 0 < len(data) <= 480 else b"\xff" + sha256(data).digest()


def tag_key(kind_index: int, canonical: str) -> bytes:
    """How a tag stands in `tag_ids`."""
    return bytes([kind_index]) + key_of(canonical)


def unpack_ids(data: bytes) -> list[int]:
    """The ids behind a key."""
    return [U64.unpack_from(data, at)[0] for at in range(0, len(data), 8)]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
