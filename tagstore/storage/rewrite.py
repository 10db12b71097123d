"""Writing a store anew: to reclaim space, and to take bytes down for good.

LMDB reuses freed pages but neither shrinks its file nor wipes what was in them. So a store is compacted by copying what
remains, record by record, into a fresh generation of the database; then the generations are switched in one atomic step.
Until that step the old one is untouched and served; readers that hold it keep it until they let go.
"""

from __future__ import annotations

import getpass
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import Damaged, InvalidInput, NotFound
from tagstore.indexing import faiss_index
from tagstore.storage.checksums import broken, ranges_of
from tagstore.storage.codec import decode_entry, decode_tag, seal, unseal
from tagstore.storage.lmdb_files import environment, new_generation, sweep, switch
from tagstore.storage.store import (
    FORMAT,
    PAGE,
    ROWS,
    U64,
    Snapshot,
    Store,
    Version,
    block_key,
    key_of,
    now,
    open_databases,
    tag_key,
)
from tagstore.storage.writer import Writer
from tagstore.types import KINDS, Entry
from tagstore.upkeep.edits import Selection

BATCH = 4096
SHORTEST = 8
"""Bytes below which a needle would be found in any file by chance."""


def compact(root: str | Path, store: str, *, keep: int | None = None) -> Version:
    """Commit a version with the content of the current one, in a database without slack, and an index of one file.

    Args:
        keep: drop all versions but the newest `keep`, the new one included; None keeps all.
    """
    if keep is not None and keep < 1:
        raise InvalidInput(f"keep is {keep}: at least the newest version stays, pass 1 or more")
    with Writer(root, store) as writer:
        kept = writer.store.versions()
        if keep is not None:
            kept = kept[max(0, len(kept) - (keep - 1)) :]
        return _Rewrite(writer, kept, "compact").run()


@dataclass(frozen=True, slots=True)
class Takedown:
    """What was removed for good: kept with the store, without what it removed."""

    when: str
    who: str
    reason: str
    entries: int
    keys_sha256: list[str]
    """sha256 of each key, hex: whoever knows a key can see that it was taken down."""
    versions_dropped: list[int]
    version: int
    """The version that the takedown made."""
    proof: str
    """What was searched for, where, and what was found."""


def purge(root: str | Path, store: str, selection: Selection, *, reason: str, who: str = "") -> Takedown:
    """Remove entries from the current version, from disk, and from history: every version that held one of them is dropped.

    The store is then searched, byte by byte and record by record, for their keys, captions, image hashes and vectors.

    Raises:
        NotFound: nothing fits, in any version.
        Damaged: something of them was still found; the message says where.
    """
    selection.check()
    with Writer(root, store) as writer:
        meant = [entry for entry in _all_entries(writer.store) if selection.fits(entry)]
        keys = {entry.key for entry in meant}
        # a key stands for its picture in all versions: what it was before is taken down too
        doomed = [entry for entry in _all_entries(writer.store) if entry.key in keys]
        if not doomed:
            raise NotFound(f"no entry of any version of store '{store}' fits: nothing was taken down")
        ids = np.array([entry.entry_id for entry in doomed], np.int64)
        versions = writer.store.versions()
        kept = [v for v in versions if not _holds(Snapshot(writer.store, v), ids)]
        vectors = _vectors(writer.store, versions, ids)
        writer.delete(ids.tolist())
        assert writer.parent is not None
        takedown = Takedown(
            when=now(),
            who=who or getpass.getuser(),
            reason=reason,
            entries=len(doomed),
            keys_sha256=sorted(sha256(key.encode()).hexdigest() for key in keys),
            versions_dropped=[v.number for v in versions if v not in kept],
            version=writer.parent.number + 1,
            proof="the search for their traces was cut off or found some: run `tagstore prove-absent`",
        )
        # the record stands in the very commit that takes them down: whoever kills this finds both or neither
        version = _Rewrite(writer, kept, "purge", keys=keys, takedown=takedown).run()
        captions, images = {c for e in doomed for c in e.captions}, {e.sha256.hex() for e in doomed}
        for other in _all_entries(Store(root, store)):
            # another entry may say the same or show the same picture, and keeps it
            vectors = [] if other.sha256.hex() in images else vectors
            captions.difference_update(other.captions)
            images.discard(other.sha256.hex())
        found = prove_absent(
            root,
            store,
            keys=sorted(keys),
            captions=sorted(captions),
            images=sorted(images),
            vectors=vectors,
        )
        if found:
            raise Damaged(
                f"version {version.number} is without the entries, but their traces are not gone: {'; '.join(found[:5])}"
            )
        takedown = replace(
            takedown,
            proof=f"{len(keys)} keys, {len(captions)} captions, {len(images)} image hashes and {len(vectors)} vectors that no other entry "
            "has were searched for in every file and record of the store: none found",
        )
        with writer.transaction() as txn:
            key = U64.pack(version.number)
            txn.put(key, seal(key, asdict(takedown)), db=writer.db["takedowns"])
        return takedown


def takedowns(root: str | Path, store: str) -> list[Takedown]:
    """All takedowns of a store, oldest first."""
    opened = Store(root, store)
    with opened.env.begin() as txn, txn.cursor(opened.db["takedowns"]) as cursor:
        return [Takedown(**unseal(key, value)) for key, value in cursor]


def prove_absent(
    root: str | Path,
    store: str,
    *,
    keys: Sequence[str] = (),
    captions: Sequence[str] = (),
    images: Sequence[str] = (),
    vectors: Sequence[bytes] = (),
) -> list[str]:
    """Where anything of these still is in a store, in any version, slack or derived file; empty if nowhere.

    Args:
        keys, captions: as text. One of fewer than 8 bytes, or one that is part of a text that remains, is looked for in the records
            only: it is in the files by right.
        images: sha256 of encoded images, hex.
        vectors: float16 rows as bytes.
    """
    opened = Store(root, store)
    found = []
    for entry in _all_entries(opened):
        what = [f"key {entry.key}"] if entry.key in keys else []
        what += [f"a caption of {entry.key}" for caption in entry.captions if caption in captions]
        what += [f"the image of {entry.key}"] if entry.sha256.hex() in images else []
        found += [f"entry {entry.entry_id}: {w}" for w in what]
    names = {t.encode(): f"text '{t[:40]}'" for t in (*keys, *captions)}
    texts = set(names)
    names |= {bytes.fromhex(h): f"image hash {h[:12]}" for h in images} | dict.fromkeys(vectors, "a vector")
    needles = [needle for needle in names if len(needle) >= SHORTEST]
    traced = [
        (path, needle)
        for path in sorted(opened.directory.rglob("*"))
        if path.is_file()
        for needle in _needles_in(path, needles)
    ]
    # "photo-1" is in "photo-12": of a text that is part of what remains, only the records can say that it is gone, and did above
    shared = _in_records(opened, {needle for _, needle in traced if needle in texts})
    found += [f"{path}: {names[needle]}" for path, needle in traced if needle not in shared]
    return found


class _Rewrite:
    """A copy of some versions, and one more, into a fresh generation."""

    def __init__(
        self,
        writer: Writer,
        kept: list[Version],
        operation: str,
        *,
        keys: set[str] | None = None,
        takedown: Takedown | None = None,
    ) -> None:
        assert writer.parent is not None
        self.writer, self.old, self.operation = writer, writer.store, operation
        self.keys = keys or set()
        self.takedown = takedown
        self.new_version = replace(
            writer.parent,
            number=writer.parent.number + 1,
            parent=writer.parent.number,
            created=now(),
            operation=operation,
            source={},
            entries=int(writer.live.sum()),
            tags=int(writer.counts.sum(dtype=np.int64)),
            unique_tags=int(np.count_nonzero(writer.counts)),
            next_entry_id=writer.next_entry_id,
            next_tag_id=writer.next_tag_id,
        )
        self.versions = [*kept, self.new_version]
        self.arrays = {v.number: (s.live_mask(), s.counts()) for v in kept for s in [Snapshot(self.old, v)]}
        self.arrays[self.new_version.number] = (writer.live, writer.counts)
        self._pages: dict[bytes, int] = {}

    def run(self) -> Version:
        """Copy, sync, switch, and take the writer along. Raises `Damaged` if what is to be copied is not what was committed."""
        self._check()
        with self.writer.step():
            version = self._copy_all()
        with suppress(OSError):  # it is committed: what cannot be removed now is by the next writer
            sweep(self.writer.directory)
        self.writer.go_on()
        return version

    def _check(self) -> None:
        seen: set[object] = set()
        for version in [*self.versions[:-1], *([self.writer.parent] if self.writer.parent else [])]:
            for name, r in broken(Snapshot(self.old, version), seen):
                raise Damaged(
                    f"{name} {r.first} to {r.end - 1} of store '{self.old.name}' are not what version {version.number} committed: "
                    "a copy would hide that. Run `tagstore verify`, restore the store from a bundle or a copy"
                )

    def _copy_all(self) -> Version:
        fresh = new_generation(self.writer.directory)
        self.env = environment(fresh, create=True)
        self.db = open_databases(self.env, create=True)
        spaces = {v.space for v in self.versions}
        state = self.old.state()
        state = {
            **state,
            "format": FORMAT,
            "current": 0,
            "spaces": {k: v for k, v in state["spaces"].items() if int(k) in spaces},
        }
        with self.env.begin(write=True) as txn:
            self._put_state(txn, state)
        self._copy_entries(self._union(0, self.writer.next_entry_id))
        self._copy_tags(self._union(1, self.writer.next_tag_id))
        for space in sorted(spaces):
            self._copy_rows("vectors", space, self._union(0, self.writer.next_entry_id, space))
            # of every tag that stays, whichever space needs it now: an ingest finds it in the table and does not embed it again
            tags = self._union(1, self.writer.next_tag_id)
            tags[state["spaces"][str(space)][1] :] = False
            self._copy_rows("embeddings", space, tags)
        self._copy_lines()
        store = Store.of_generation(self.old.name, self.writer.directory, fresh)
        version = None
        for old in self.versions:
            version = self._put_version(store, old, version)
        with self.env.begin(write=True) as txn:
            self._put_state(txn, {**state, "current": self.new_version.number, "next_page": len(self._pages)})
        self.env.sync(True)
        switch(self.writer.directory, fresh)
        assert version is not None
        return version

    def _union(self, which: int, n: int, space: int | None = None) -> NDArray[np.bool_]:
        """Ids that some version needs."""
        needed = np.zeros(n, bool)
        for version in self.versions:
            if space is None or version.space == space:
                array = self.arrays[version.number][which]
                needed[: len(array)] |= array.astype(bool)
        return needed

    def _copy_entries(self, needed: NDArray[np.bool_]) -> None:
        def put(txn: Any, entry_id: int, data: bytes) -> None:
            txn.put(U64.pack(entry_id), data, db=self.db["entries"], append=True)
            key = key_of(decode_entry(entry_id, data).key)
            txn.put(key, (txn.get(key, db=self.db["keys"]) or b"") + U64.pack(entry_id), db=self.db["keys"])

        self._copy("entries", needed, put)

    def _copy_tags(self, needed: NDArray[np.bool_]) -> None:
        def put(txn: Any, tag_id: int, data: bytes) -> None:
            _, kind, canonical = decode_tag(data)
            txn.put(U64.pack(tag_id), data, db=self.db["tags"], append=True)
            txn.put(tag_key(KINDS.index(kind), canonical), U64.pack(tag_id), db=self.db["tag_ids"])

        self._copy("tags", needed, put)

    def _copy(self, db: str, needed: NDArray[np.bool_], put: Callable[[Any, int, bytes], None]) -> None:
        ids = np.flatnonzero(needed)
        for start in range(0, len(ids), BATCH):
            with self.old.env.begin() as source, self.env.begin(write=True) as target:
                for i in ids[start : start + BATCH].tolist():
                    put(target, i, source.get(U64.pack(i), db=self.old.db[db]))

    def _copy_rows(self, db: str, space: int, needed: NDArray[np.bool_]) -> None:
        blocks = np.unique(np.flatnonzero(needed) // ROWS).tolist()
        width = next(v.fingerprint.dimension for v in self.versions if v.space == space)
        for start in range(0, len(blocks), 256):
            with self.old.env.begin() as source, self.env.begin(write=True) as target:
                for block in blocks[start : start + 256]:
                    data = source.get(block_key(space, block), db=self.old.db[db])
                    wanted = needed[block * ROWS : (block + 1) * ROWS]
                    rows = np.frombuffer(data, np.float16).reshape(-1, width)[: len(wanted)].copy()
                    rows[~wanted[: len(rows)]] = 0
                    target.put(block_key(space, block), rows.tobytes(), db=self.db[db])

    def _copy_lines(self) -> None:
        """Quarantine of the versions that stay, without what is taken down; sources and takedowns, whatever became of their versions."""
        numbers = {U64.pack(v.number) for v in self.versions}
        with self.old.env.begin() as source, self.env.begin(write=True) as target:
            with source.cursor(self.old.db["quarantine"]) as cursor:
                for key, value in cursor:
                    if key[:8] in numbers and unseal(key, value)["key"] not in self.keys:
                        target.put(key, value, db=self.db["quarantine"])
            for name in ("sources", "takedowns"):
                with source.cursor(self.old.db[name]) as cursor:
                    for key, value in cursor:
                        target.put(key, value, db=self.db[name])
            if self.takedown:
                key = U64.pack(self.takedown.version)
                target.put(key, seal(key, asdict(self.takedown)), db=self.db["takedowns"])

    def _put_version(self, store: Store, version: Version, parent: Version | None) -> Version:
        live, counts = self.arrays[version.number]
        bits = np.packbits(live, bitorder="little")
        with self.env.begin(write=True) as txn:
            pages = {
                "live": self._put_pages(txn, bits.tobytes()),
                "counts": self._put_pages(txn, counts.tobytes()),
            }
        kept, version = version.index, replace(version, pages=pages, index={})
        same = parent if parent is not None and parent.next_entry_id <= version.next_entry_id else None
        embedded = min(version.next_tag_id, self.old.state()["spaces"][str(version.space)][1])
        ranges = ranges_of(
            store,
            same,
            version.space,
            version.next_entry_id,
            version.next_tag_id,
            embedded,
            version.fingerprint.dimension,
            bits,
            counts,
        )
        version = replace(version, ranges=ranges)
        whole = version is self.versions[-1] or version.number == self.new_version.number
        snapshot = Snapshot(store, replace(version, index=kept))  # so that a tuned index is tuned again
        index = faiss_index.extend(
            snapshot, self._index_parent(version, parent), store.index_directory, whole=whole
        )
        version = replace(version, index=index)
        with self.env.begin(write=True) as txn:
            txn.put(U64.pack(version.number), version.to_json().encode(), db=self.db["versions"])
        return version

    def _index_parent(self, version: Version, parent: Version | None) -> Version | None:
        """The version whose index files this one may go on from: only if it has all entries that those leave out."""
        if parent is None or parent.space != version.space:
            return None
        mine, theirs = self.arrays[version.number][0], self.arrays[parent.number][0]
        old = mine[: len(theirs)]
        return None if (old & ~theirs[: len(old)]).any() else parent

    def _put_pages(self, txn: Any, data: bytes) -> list[int]:
        ids = []
        for start in range(0, len(data), PAGE):
            page = data[start : start + PAGE]
            mark = sha256(page).digest()
            if mark not in self._pages:
                self._pages[mark] = len(self._pages)
                txn.put(U64.pack(self._pages[mark]), page, db=self.db["pages"])
            ids.append(self._pages[mark])
        return ids

    def _put_state(self, txn: Any, state: dict[str, Any]) -> None:
        txn.put(b"state", seal(b"state", state), db=self.db["meta"])


def _all_entries(store: Store) -> Iterator[Entry]:
    """Every entry record there is, whether a version has it or not."""
    first = 0
    while True:
        with store.env.begin() as txn, txn.cursor(store.db["entries"]) as cursor:
            batch = []
            if cursor.set_range(U64.pack(first)):
                for key, value in cursor:
                    batch.append((U64.unpack(key)[0], value))
                    if len(batch) == 1024:
                        break
        if not batch:
            return
        yield from (decode_entry(i, data) for i, data in batch)
        first = batch[-1][0] + 1


def _holds(snapshot: Snapshot, ids: NDArray[np.int64]) -> bool:
    mask = snapshot.live_mask()
    return bool(mask[ids[ids < len(mask)]].any())


def _vectors(store: Store, versions: list[Version], ids: NDArray[np.int64]) -> list[bytes]:
    """The stored bytes of some entries' vectors, in every space that has them."""
    found = set()
    for version in {v.space: v for v in versions}.values():
        snapshot = Snapshot(store, version)
        mask = snapshot.live_mask()
        for row in snapshot.vectors(ids[ids < len(mask)][mask[ids[ids < len(mask)]]]):
            found.add(row.astype(np.float16).tobytes())
    return sorted(found)


def _in_records(store: Store, needles: set[bytes]) -> set[bytes]:
    """Those that are part of an entry or a tag of the store, or of the name of a source."""
    found: set[bytes] = set()
    for table in ("entries", "tags", "sources") if needles else ():
        with store.env.begin() as txn, txn.cursor(store.db[table]) as cursor:
            for _, value in cursor:
                found |= {needle for needle in needles - found if needle in value}
    return found


def _needles_in(path: Path, needles: list[bytes], piece: int = 1 << 24) -> set[bytes]:
    found: set[bytes] = set()
    overlap = max(map(len, needles), default=1) - 1
    with path.open("rb") as file:
        before = b""
        while data := file.read(piece):
            window = before + data
            found |= {needle for needle in needles if needle in window}
            before = window[len(window) - overlap :] if overlap else b""
    return found
