"""The write side of a store: appends that nobody sees, and one commit that makes them a version."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.environment import environment, writer_lock
from tagstore.errors import FingerprintMismatch
from tagstore.mining import MergedTag
from tagstore.records import decode_entry, decode_tag, encode_entry, encode_tag
from tagstore.store import FORMAT, PAGE, ROWS, U64, Snapshot, Store, Version, check_name, key_of, now, open_databases, tag_key
from tagstore.types import KINDS, Entry, EntryTag, Fingerprint, Rejected, Vectors

Indexer = Callable[[Snapshot, Path], Mapping[str, Any]]
"""Builds and syncs the index of a version that is about to be committed, and says what it built."""


@dataclass(frozen=True, slots=True)
class Draft:
    """An entry that has no id yet."""

    key: str
    sha256: bytes
    perceptual_hash: int
    captions: tuple[str, ...]
    tags: tuple[MergedTag, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


class Writer:
    """The one writer of a store, as a context manager.

    Raises `Busy` if another process writes, `FingerprintMismatch` if the store holds vectors of another encoder. Leaving
    the context without `commit` leaves the store at the version it had.
    """

    def __init__(self, root: str | Path, name: str, fingerprint: Fingerprint) -> None:
        self.directory = Path(root) / check_name(name)
        self.name = name
        self.fingerprint = fingerprint
        self._exit = ExitStack()

    def __enter__(self) -> Writer:
        self.directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(writer_lock(self.directory))
            self.env = environment(self.directory, create=True)
            self.db = open_databases(self.env, create=True)
            self._begin()
            self._exit = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exit.close()

    @property
    def staged(self) -> int:
        """How many entries were appended since the last commit."""
        return self.next_entry_id - self.first_entry_id

    def admit(self, drafts: Sequence[Draft], *, same_miner: bool) -> tuple[list[Draft], list[Rejected], int]:
        """Sort drafts into those to append, those whose key came before in this ingest, and the number already stored unchanged."""
        admitted: list[Draft] = []
        rejected: list[Rejected] = []
        unchanged = 0
        seen: set[str] = set()
        with self.env.begin() as txn:
            for draft in drafts:
                old = self._live_id(txn, draft.key)
                if draft.key in seen or (old is not None and old >= self.first_entry_id):
                    rejected.append(Rejected(draft.key, "duplicate key: the first pair of this key was kept", draft.origin))
                elif old is not None and same_miner and _same(draft, decode_entry(old, txn.get(U64.pack(old), db=self.db["entries"]))):
                    unchanged += 1
                else:
                    admitted.append(draft)
                seen.add(draft.key)
        return admitted, rejected, unchanged

    def append(self, drafts: Sequence[Draft], vectors: Vectors) -> None:
        """Stage entries with their unit vectors `[len(drafts), D]`; a key that the store has is replaced."""
        first = self.next_entry_id
        self._reserve(len(drafts))
        with self.env.begin(write=True) as txn:
            for entry_id, draft in enumerate(drafts, first):
                old = self._live_id(txn, draft.key)
                if old is not None:
                    self._bury(txn, old)
                ids = [self._tag_id(txn, tag) for tag in draft.tags]
                entry = Entry(
                    entry_id,
                    draft.key,
                    draft.sha256,
                    draft.perceptual_hash,
                    draft.captions,
                    tuple(EntryTag(i, tag.score, tag.provenance) for i, tag in zip(ids, draft.tags, strict=True)),
                    draft.metadata,
                    draft.origin,
                )
                txn.put(U64.pack(entry_id), encode_entry(entry), db=self.db["entries"], append=True)
                key = key_of(draft.key)
                txn.put(key, (txn.get(key, db=self.db["keys"]) or b"") + U64.pack(entry_id), db=self.db["keys"])
                self._live[entry_id] = True
                self._count(ids, 1)
            self._put_rows(txn, "vectors", first, vectors)
        self.next_entry_id += len(drafts)

    def new_tags(self, *, limit: int) -> list[str]:
        """Texts of up to `limit` staged tags that have no embedding yet, in order of their ids."""
        with self.env.begin() as txn:
            ids = range(self._embedded, min(self.next_tag_id, self._embedded + limit))
            return [decode_tag(txn.get(U64.pack(i), db=self.db["tags"]))[0] for i in ids]

    def embed_tags(self, embeddings: Vectors) -> None:
        """Stage the text embeddings of the next tags, `[n, D]` unit rows, in the order of `new_tags`."""
        with self.env.begin(write=True) as txn:
            self._put_rows(txn, "embeddings", self._embedded, embeddings)
        self._embedded += len(embeddings)

    def commit(self, *, operation: str, source: str, miner: Mapping[str, Any], indexer: Indexer) -> Version:
        """Make what was staged the next version: durable and visible when this returns, not at all if it raises."""
        if self._embedded != self.next_tag_id:
            raise ValueError(f"{self.next_tag_id - self._embedded} tags have no embedding")
        live = self._live[: self.next_entry_id]
        counts = self._counts[: self.next_tag_id]
        with self.env.begin(write=True) as txn:
            pages = {
                "live": self._put_pages(txn, "live", np.packbits(live, bitorder="little")),
                "counts": self._put_pages(txn, "counts", counts),
            }
        version = Version(
            number=(self.parent.number if self.parent else 0) + 1,
            parent=self.parent.number if self.parent else 0,
            created=now(),
            operation=operation,
            source=source,
            entries=int(live.sum()),
            tags=int(counts.sum(dtype=np.int64)),
            unique_tags=int(np.count_nonzero(counts)),
            next_entry_id=self.next_entry_id,
            next_tag_id=self.next_tag_id,
            fingerprint=self.fingerprint,
            miner=miner,
            index={},
            pages=pages,
        )
        index = indexer(Snapshot(self.store, version), self.directory / "index")
        version = Version.from_json(json.dumps({**json.loads(version.to_json()), "index": dict(index)}))
        with self.env.begin(write=True) as txn:
            txn.put(U64.pack(version.number), version.to_json().encode(), db=self.db["versions"], overwrite=False)
            self._put_state(txn, current=version.number, next_page=self._next_page)
        self._begin()
        return version

    def _begin(self) -> None:
        """Start from the current version, without what an interrupted writer left behind it."""
        with self.env.begin(write=True) as txn:
            if txn.get(b"state", db=self.db["meta"]) is None:
                self._put_state(txn, current=0, next_page=0)
        self.store = Store(self.directory.parent, self.name)
        state = self.store.state()
        self.parent: Version | None = self.store.snapshot().version if state["current"] else None
        if self.parent and self.parent.fingerprint.digest != self.fingerprint.digest:
            raise FingerprintMismatch.between(self.name, self.parent.fingerprint, self.fingerprint)
        self.first_entry_id = self.next_entry_id = self.parent.next_entry_id if self.parent else 0
        self.next_tag_id = self._embedded = self.parent.next_tag_id if self.parent else 0
        self._next_page: int = state["next_page"]
        self._live = np.zeros(self.next_entry_id, bool)
        self._counts = np.zeros(self.next_tag_id, np.int32)
        if self.parent:
            snapshot = Snapshot(self.store, self.parent)
            self._live[snapshot.live()] = True
            self._counts[:] = snapshot.counts()
        self._sweep()

    def _sweep(self) -> None:
        with self.env.begin(write=True) as txn:
            for entry_id, data in self._beyond(txn, "entries", self.next_entry_id):
                key = key_of(decode_entry(entry_id, data).key)
                ids = _unpack(txn.get(key, db=self.db["keys"]) or b"")
                kept = b"".join(U64.pack(i) for i in ids if i < self.next_entry_id)
                if kept:
                    txn.put(key, kept, db=self.db["keys"])
                else:
                    txn.delete(key, db=self.db["keys"])
                txn.delete(U64.pack(entry_id), db=self.db["entries"])
            for tag_id, data in self._beyond(txn, "tags", self.next_tag_id):
                _, kind, canonical = decode_tag(data)
                txn.delete(tag_key(KINDS.index(kind), canonical), db=self.db["tag_ids"])
                txn.delete(U64.pack(tag_id), db=self.db["tags"])
            for page_id, _ in self._beyond(txn, "pages", self._next_page):
                txn.delete(U64.pack(page_id), db=self.db["pages"])
        kept_files = {version.index.get("file") for version in self.store.versions()}
        for path in (self.directory / "index").glob("*"):
            if path.name not in kept_files:
                path.unlink()

    def _beyond(self, txn: Any, db: str, first: int) -> Iterable[tuple[int, bytes]]:
        with txn.cursor(self.db[db]) as cursor:
            found = cursor.set_range(U64.pack(first))
            return [(U64.unpack(key)[0], value) for key, value in cursor] if found else []

    def _live_id(self, txn: Any, key: str) -> int | None:
        ids = _unpack(txn.get(key_of(key), db=self.db["keys"]) or b"")
        return next((i for i in reversed(ids) if self._live[i]), None)

    def _bury(self, txn: Any, entry_id: int) -> None:
        entry = decode_entry(entry_id, txn.get(U64.pack(entry_id), db=self.db["entries"]))
        self._live[entry_id] = False
        self._count([tag.tag_id for tag in entry.tags], -1)

    def _count(self, tag_ids: list[int], by: int) -> None:
        if tag_ids:
            self._counts[tag_ids] += by  # an entry carries a tag once, so no id stands twice

    def _tag_id(self, txn: Any, tag: MergedTag) -> int:
        key = tag_key(KINDS.index(tag.kind), tag.canonical)
        data = txn.get(key, db=self.db["tag_ids"])
        if data is not None:
            return int(U64.unpack(data)[0])
        tag_id = self.next_tag_id
        txn.put(U64.pack(tag_id), encode_tag(tag.text, tag.kind, tag.canonical), db=self.db["tags"], append=True)
        txn.put(key, U64.pack(tag_id), db=self.db["tag_ids"])
        self.next_tag_id += 1
        if tag_id >= len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(max(4096, tag_id), np.int32)])
        return tag_id

    def _reserve(self, n: int) -> None:
        if self.next_entry_id + n > len(self._live):
            self._live = np.concatenate([self._live, np.zeros(max(4096, self.next_entry_id, n), bool)])

    def _put_rows(self, txn: Any, db: str, first: int, rows: Vectors) -> None:
        rows16 = np.ascontiguousarray(rows, np.float16)
        at = 0
        while at < len(rows16):
            block, offset = divmod(first + at, ROWS)
            piece = rows16[at : at + ROWS - offset]
            key = U64.pack(block)
            before = (txn.get(key, db=self.db[db]) or b"")[: offset * rows16.shape[1] * 2]
            txn.put(key, before + piece.tobytes(), db=self.db[db])
            at += len(piece)

    def _put_pages(self, txn: Any, name: str, array: NDArray[Any]) -> list[int]:
        """Write an array, sharing the pages in which it equals the parent's."""
        data = array.tobytes()
        old = self.parent.pages[name] if self.parent else []
        ids = []
        for i, start in enumerate(range(0, len(data), PAGE)):
            page = data[start : start + PAGE]
            if i < len(old) and txn.get(U64.pack(old[i]), db=self.db["pages"]) == page:
                ids.append(old[i])
            else:
                txn.put(U64.pack(self._next_page), page, db=self.db["pages"])
                ids.append(self._next_page)
                self._next_page += 1
        return ids

    def _put_state(self, txn: Any, *, current: int, next_page: int) -> None:
        state = {"format": FORMAT, "name": self.name, "current": current, "next_page": next_page}
        txn.put(b"state", json.dumps(state).encode(), db=self.db["meta"])


def _same(draft: Draft, entry: Entry) -> bool:
    return (draft.sha256, draft.captions, dict(draft.metadata)) == (entry.sha256, entry.captions, dict(entry.metadata))


def _unpack(data: bytes) -> list[int]:
    return [U64.unpack_from(data, at)[0] for at in range(0, len(data), 8)]
