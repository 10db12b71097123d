"""The write side of a store: appends that nobody sees, and one commit that makes them a version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from tagstore.errors import BadVector, FingerprintMismatch, InvalidInput, NotFound, WriteFailed
from tagstore.mining import MergedTag
from tagstore.storage.checksums import ranges_of
from tagstore.storage.codec import decode_entry, decode_tag, encode_entry, encode_tag, seal, unseal
from tagstore.storage.lmdb_files import (
    environment,
    generation,
    new_generation,
    sweep,
    switch,
    sync_directory,
    trim,
    writer_lock,
    writing,
)
from tagstore.storage.staging import Draft, Progress, Sync, sweep_staged
from tagstore.storage.store import (
    FORMAT,
    PAGE,
    ROWS,
    U64,
    Snapshot,
    Store,
    Version,
    block_key,
    check_name,
    key_of,
    now,
    open_databases,
    tag_key,
    unpack_ids,
)
from tagstore.types import KINDS, Entry, EntryTag, Fingerprint, Kind, Rejected, Vectors

Indexer = Callable[[Snapshot, Version | None, Path], Mapping[str, Any]]
"""Builds and syncs the index of a version that is about to be committed, given its parent, and says what it built."""


class Writer:
    """The one writer of a store, as a context manager.

    Leaving the context without a commit leaves the store at the version it had. Once a step has failed all others are refused, since what
    this object holds may not be what is on disk any more: a new one starts from what is.

    Args:
        fingerprint: of the encoder that makes the vectors; None for work that brings none (delete, rollback).
        new_space: accept another encoder than the store's: the caller gives every entry a new vector.
        resume: identity of an ingest; what one of the same identity staged before it was cut off is kept, see `progress`.

    Raises:
        Busy: another process writes.
        FingerprintMismatch: the store holds vectors of another encoder.
        NotFound: no store, and no fingerprint to make one with.
        WriteFailed: the disk is full, read-only or broken, here or at any step.
    """

    def __init__(
        self,
        root: str | Path,
        name: str,
        fingerprint: Fingerprint | None = None,
        *,
        new_space: bool = False,
        resume: str = "",
        sync: Sync = "full",
    ) -> None:
        if sync not in ("full", "batch"):
            raise InvalidInput(f"sync is '{sync}': it is 'full' or 'batch'")
        self.directory = Path(root) / check_name(name)
        self.name = name
        self._given = fingerprint
        self._new_space = new_space
        self._resume = resume
        self._sync = sync
        self._exit = ExitStack()
        self._failed = False
        self.parent: Version | None = None
        self.next_entry_id = self.next_tag_id = 0
        self._first_number = 1
        self._next_page = 0
        self._spaces: dict[int, tuple[str, int]] = {}
        """Digest of the fingerprint of each space, and how many tags are embedded in it."""

    def __enter__(self) -> Writer:
        if self._given is None:
            Store(self.directory.parent, self.name)
        with writing(f"store '{self.name}'"), ExitStack() as stack:
            self.directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(writer_lock(self.directory))
            if not (self.directory / "CURRENT").exists():
                fresh = new_generation(self.directory)
                open_databases(environment(fresh, create=True), create=True)
                environment(fresh).sync(True)
                switch(self.directory, fresh)
                sync_directory(self.directory.parent)
            sweep(self.directory)
            self._open()
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Work that leaves this object and the disk in agreement, or refuses all that would come after it."""
        if self._failed:
            raise WriteFailed(
                f"an earlier step of this writer of store '{self.name}' failed, and what it staged may be half done: open a new Writer, "
                "which starts from what is on disk"
            )
        try:
            with writing(f"store '{self.name}'"):
                yield
        except BaseException:
            self._failed = True
            raise

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """A write transaction as a step; with `sync="full"` it is durable when the context is left."""
        with self.step():
            with self.env.begin(write=True) as txn:
                yield txn
            if self._sync == "full":
                self.env.sync(True)
            trim(self.env)

    def admit(self, drafts: Sequence[Draft], *, same_miner: bool) -> tuple[list[Draft], list[Rejected], int]:
        """Sort drafts into those to append, those whose key came before in this ingest, and the number already stored unchanged."""
        admitted: list[Draft] = []
        rejected: list[Rejected] = []
        unchanged = 0
        seen: set[str] = set()
        with self.step(), self.env.begin() as txn:
            for draft in drafts:
                old = self._live_id(txn, draft.key)
                taken = old is not None and (old >= self.first_entry_id or self._confirmed[old])
                if draft.key in seen or taken:
                    rejected.append(
                        Rejected(
                            draft.key, "duplicate key: the first pair of this key was kept", draft.origin
                        )
                    )
                elif (
                    old is not None
                    and same_miner
                    and _same(draft, decode_entry(old, txn.get(U64.pack(old), db=self.db["entries"])))
                ):
                    unchanged += 1
                    self._confirmed[old] = True
                else:
                    admitted.append(draft)
                seen.add(draft.key)
        return admitted, rejected, unchanged

    def confirm(self, keys: Sequence[str]) -> None:
        """Take entries of the version before as seen in this ingest; one of their key that comes now is a duplicate."""
        with self.step(), self.env.begin() as txn:
            for key in keys:
                old = self._live_id(txn, key)
                if old is not None and old < self.first_entry_id:
                    self._confirmed[old] = True

    def append(
        self,
        drafts: Sequence[Draft],
        vectors: Vectors | None,
        *,
        rejected: Sequence[Rejected] = (),
        progress: Progress | None = None,
    ) -> None:
        """Stage entries with their unit vectors `[len(drafts), D]`, and the pairs refused on the way, in one transaction.

        A key that the store has is replaced. `progress` is completed with the ids reached and kept with them. Raises `BadVector`.
        """
        rows = self._rows(len(drafts), vectors)
        first = self.next_entry_id
        with self.transaction() as txn:
            self._reserve(len(drafts))
            for entry_id, draft in enumerate(drafts, first):
                old = self._live_id(txn, draft.key)
                if old is not None:
                    self._set_live(txn, old, False)
                ids = [self._tag_id(txn, tag) for tag in draft.tags]
                tags = tuple(
                    EntryTag(i, tag.score, tag.provenance) for i, tag in zip(ids, draft.tags, strict=True)
                )
                entry = Entry(
                    entry_id,
                    draft.key,
                    draft.sha256,
                    draft.perceptual_hash,
                    draft.captions,
                    tags,
                    draft.metadata,
                    draft.origin,
                )
                self._put_entry(txn, entry, encode_entry(entry))
            self._put_rows(txn, "vectors", np.arange(first, first + len(drafts)), rows)
            self.next_entry_id += len(drafts)
            number = U64.pack(self._number())
            for refused in rejected:
                key = number + U64.pack(self._refused)
                txn.put(key, seal(key, asdict(refused)), db=self.db["quarantine"])
                self._refused += 1
            if progress is not None:
                progress.next_entry_id, progress.next_tag_id, progress.rejected = (
                    self.next_entry_id,
                    self.next_tag_id,
                    self._refused,
                )
                txn.put(b"ingest", seal(b"ingest", asdict(progress)), db=self.db["meta"])

    @property
    def live(self) -> NDArray[np.bool_]:
        """Which entry ids live, what was staged included: `[next_entry_id]` bool."""
        return self._live[: self.next_entry_id]

    @property
    def counts(self) -> NDArray[np.int32]:
        """How many entries carry each tag, what was staged included: `[next_tag_id]` int32."""
        return self._counts[: self.next_tag_id]

    def go_on(self) -> None:
        """After a commit, start from it, in the generation that is current now."""
        try:
            self._open()
        except (lmdb.Error, OSError):
            self._failed = True  # the version is there for good: it is only this writer that cannot go on

    def _open(self) -> None:
        self.env = environment(generation(self.directory))
        self.env.reader_check()  # a reader that was killed must not keep freed pages from being used again
        self.db = open_databases(self.env, create=True)
        self._begin()

    def start_at(self, number: int, next_entry_id: int, next_tag_id: int) -> None:
        """Of a store without a version, make the first one this number, over ids that were given elsewhere: all up to these are taken."""
        self._first_number = number
        self.next_entry_id, self.next_tag_id = next_entry_id, next_tag_id
        self._live, self._counts = np.zeros(next_entry_id, bool), np.zeros(next_tag_id, np.int32)
        self._embedded = next_tag_id

    def refused(self) -> list[Rejected]:
        """The pairs refused so far by the ingest that is taken up again."""
        number = U64.pack(self._number())
        with self.env.begin() as txn:
            keys = [number + U64.pack(i) for i in range(self._refused)]
            return [
                Rejected(**unseal(key, data))
                for key in keys
                if (data := txn.get(key, db=self.db["quarantine"]))
            ]

    def delete(self, entry_ids: Sequence[int]) -> int:
        """Stage the end of entries; returns how many of them lived."""
        ended = 0
        with self.step(), self.env.begin() as txn:
            for entry_id in entry_ids:
                if 0 <= entry_id < self.next_entry_id and self._live[entry_id]:
                    self._set_live(txn, entry_id, False)
                    ended += 1
        return ended

    def put_vectors(self, ids: Sequence[int], vectors: Vectors) -> None:
        """Stage vectors of a new space for entries that the store has, in any order."""
        rows = self._rows(len(ids), vectors)
        with self.transaction() as txn:
            self._put_rows(txn, "vectors", np.array(ids, np.int64), rows, keep_tail=True)

    def new_tags(self, *, limit: int) -> list[str]:
        """Texts of up to `limit` tags that have no embedding in this space yet, in order of their ids."""
        with self.env.begin() as txn:
            ids = range(self._embedded, min(self.next_tag_id, self._embedded + limit))
            return [
                decode_tag(data)[0] if (data := txn.get(U64.pack(i), db=self.db["tags"])) else "" for i in ids
            ]

    def embed_tags(self, embeddings: Vectors) -> None:
        """Stage the text embeddings of the next tags, `[n, D]` unit rows, in the order of `new_tags`."""
        embeddings = self._rows(len(embeddings), embeddings)
        with self.transaction() as txn:
            self._put_rows(
                txn, "embeddings", np.arange(self._embedded, self._embedded + len(embeddings)), embeddings
            )
            self._embedded += len(embeddings)

    def commit(
        self,
        *,
        operation: str,
        source: Mapping[str, Any] | None = None,
        miner: Mapping[str, Any] | None = None,
        indexer: Indexer,
    ) -> Version:
        """Make what was staged the next version: durable and visible when this returns.

        If it raises there is no new version, unless it was the very last sync that the disk refused: then whoever opens the store sees
        which of the two reached it.
        """
        if self._embedded < self.next_tag_id:
            raise ValueError(f"{self.next_tag_id - self._embedded} tags have no embedding")
        with self.step():
            return self._commit(operation, source or {}, miner, indexer)

    def _commit(
        self, operation: str, source: Mapping[str, Any], miner: Mapping[str, Any] | None, indexer: Indexer
    ) -> Version:
        live, counts = self.live, self.counts
        bits = np.packbits(live, bitorder="little")
        with self.env.begin(write=True) as txn:
            pages = {
                "live": self._put_pages(txn, "live", bits),
                "counts": self._put_pages(txn, "counts", counts),
            }
        version = Version(
            number=self._number(),
            parent=self.parent.number if self.parent else 0,
            created=now(),
            operation=operation,
            source=source,
            entries=int(live.sum()),
            tags=int(counts.sum(dtype=np.int64)),
            unique_tags=int(np.count_nonzero(counts)),
            next_entry_id=self.next_entry_id,
            next_tag_id=self.next_tag_id,
            space=self.space,
            fingerprint=self.fingerprint,
            miner=miner if miner is not None else (self.parent.miner if self.parent else {}),
            pages=pages,
            ranges=ranges_of(
                self.store,
                self.parent,
                self.space,
                self.next_entry_id,
                self.next_tag_id,
                self._embedded,
                self.fingerprint.dimension,
                bits,
                counts,
            ),
        )
        self._spaces[self.space] = (self.fingerprint.digest, self._embedded)
        return self._publish(
            replace(
                version, index=indexer(Snapshot(self.store, version), self.parent, self.store.index_directory)
            )
        )

    def rollback(self, number: int) -> Version:
        """Commit a version that holds what version `number` held. Raises `NotFound`."""
        old = self.store.snapshot(number).version
        version = replace(
            old,
            number=self._number(),
            parent=self.parent.number if self.parent else 0,
            created=now(),
            operation=f"rollback to {number}",
            source={},
            next_entry_id=self.next_entry_id,
            next_tag_id=self.next_tag_id,
        )
        with self.step():
            return self._publish(version)

    def _publish(self, version: Version) -> Version:
        number = U64.pack(version.number)
        with self.env.begin(write=True) as txn:
            txn.put(number, version.to_json().encode(), db=self.db["versions"], overwrite=False)
            if version.source:
                txn.put(number, seal(number, version.source), db=self.db["sources"])
            self._put_state(txn, version.number, version.next_entry_id, version.next_tag_id)
            txn.delete(b"ingest", db=self.db["meta"])
        self.env.sync(True)
        self.parent = version
        self.go_on()
        return version

    def _begin(self) -> None:
        """Start from the current version; keep what an ingest of the same identity staged, sweep what any other left."""
        with self.env.begin(write=True) as txn:
            if txn.get(b"state", db=self.db["meta"]) is None:
                self._next_page, self._spaces = 0, {}
                self._put_state(txn, 0, 0, 0)
        self.store = Store(self.directory.parent, self.name)
        state = self.store.state()
        self._next_page = state["next_page"]
        self._spaces = {int(k): (d, n) for k, (d, n) in state["spaces"].items()}
        self.parent = self.store.snapshot(state["current"]).version if state["current"] else None
        self._choose_space()
        self.first_entry_id: int = state["next_entry_id"]
        self.next_entry_id = self.first_entry_id
        self.next_tag_id = state["next_tag_id"]
        self._embedded = min(self._spaces.get(self.space, ("", 0))[1], self.next_tag_id)
        self._refused = 0
        self._live = np.zeros(self.next_entry_id, bool)
        self._confirmed = np.zeros(self.next_entry_id, bool)
        self._counts = np.zeros(self.next_tag_id, np.int32)
        if self.parent:
            snapshot = Snapshot(self.store, self.parent)
            mask, counts = snapshot.live_mask(), snapshot.counts()
            self._live[: len(mask)] = mask
            self._counts[: len(counts)] = counts
        self.progress = self._resumable()
        sweep_staged(
            self.store,
            self.progress,
            self.next_entry_id,
            self.next_tag_id,
            self._next_page,
            max(self._spaces, default=-1) + 1,
            self._number(),
        )
        if self.progress:
            self._restore(self.progress)

    def _choose_space(self) -> None:
        given = self._given
        if given is None:
            if self.parent is None:
                raise NotFound(f"store '{self.name}' has no version yet")
            given = self.parent.fingerprint
        self.fingerprint = given
        same = self.parent is None or self.parent.fingerprint.digest == given.digest
        if not same and not self._new_space:
            assert self.parent is not None
            raise FingerprintMismatch.between(self.name, self.parent.fingerprint, given)
        if self.parent is not None and same:
            self.space = self.parent.space
        else:
            # never a space that a version has: its vectors are that version's
            self.space = max(self._spaces, default=-1) + 1

    def _resumable(self) -> Progress | None:
        with self.env.begin() as txn:
            data = txn.get(b"ingest", db=self.db["meta"])
        progress = Progress(**unseal(b"ingest", data)) if data else None
        return progress if progress and progress.identity == self._resume else None

    def _restore(self, progress: Progress) -> None:
        """Count in what was staged before, as `append` did."""
        self._reserve(progress.next_entry_id - self.next_entry_id)
        self._counts = np.concatenate(
            [self._counts, np.zeros(progress.next_tag_id - len(self._counts), np.int32)]
        )
        with self.env.begin() as txn:
            for entry_id in range(self.first_entry_id, progress.next_entry_id):
                entry = decode_entry(entry_id, txn.get(U64.pack(entry_id), db=self.db["entries"]))
                old = self._live_id(txn, entry.key)
                if old is not None:
                    self._set_live(txn, old, False)
                self._live[entry_id] = True
                self._count([tag.tag_id for tag in entry.tags], 1)
        self.next_entry_id, self.next_tag_id, self._refused = (
            progress.next_entry_id,
            progress.next_tag_id,
            progress.rejected,
        )

    def _live_id(self, txn: Any, key: str) -> int | None:
        ids = unpack_ids(txn.get(key_of(key), db=self.db["keys"]) or b"")
        return next((i for i in reversed(ids) if i < len(self._live) and self._live[i]), None)

    def _set_live(self, txn: Any, entry_id: int, live: bool) -> None:
        entry = decode_entry(entry_id, txn.get(U64.pack(entry_id), db=self.db["entries"]))
        self._live[entry_id] = live
        self._count([tag.tag_id for tag in entry.tags], 1 if live else -1)

    def _count(self, tag_ids: list[int], by: int) -> None:
        if tag_ids:
            self._counts[tag_ids] += by  # an entry carries a tag once, so no id stands twice

    def _tag_id(self, txn: Any, tag: MergedTag) -> int:
        key = tag_key(KINDS.index(tag.kind), tag.canonical)
        data = txn.get(key, db=self.db["tag_ids"])
        if data is not None:
            return int(U64.unpack(data)[0])
        tag_id = self.next_tag_id
        self._put_tag(txn, tag_id, tag.text, tag.kind, tag.canonical)
        self.next_tag_id += 1
        if tag_id >= len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(max(4096, tag_id), np.int32)])
        return tag_id

    def _reserve(self, n: int) -> None:
        if self.next_entry_id + n > len(self._live):
            self._live = np.concatenate([self._live, np.zeros(max(4096, self.next_entry_id, n), bool)])

    def _rows(self, n: int, vectors: Vectors | None) -> Vectors:
        """The vectors, if they are `[n, D]` and finite. Raises `BadVector`: nothing was staged then, and the writer can go on."""
        rows = np.zeros((0, self.fingerprint.dimension), np.float32) if vectors is None else vectors
        if rows.shape != (n, self.fingerprint.dimension):
            raise BadVector(
                f"vectors of shape {list(rows.shape)} for [{n}, {self.fingerprint.dimension}] of store '{self.name}'"
            )
        if not np.isfinite(rows).all():
            raise BadVector(
                f"a vector for store '{self.name}' holds NaN or infinity: the encoder, or what it was given, is broken"
            )
        return rows

    def _put_entry(self, txn: Any, entry: Entry, record: bytes) -> None:
        """Write an entry whose id is above all others, and count it in."""
        txn.put(U64.pack(entry.entry_id), record, db=self.db["entries"], append=True)
        key = key_of(entry.key)
        txn.put(key, (txn.get(key, db=self.db["keys"]) or b"") + U64.pack(entry.entry_id), db=self.db["keys"])
        self._live[entry.entry_id] = True
        self._count([tag.tag_id for tag in entry.tags], 1)

    def _put_tag(self, txn: Any, tag_id: int, text: str, kind: Kind, canonical: str) -> bool:
        """Write a tag whose id is above all others; false if there is one of its kind and canonical form."""
        if not txn.put(
            tag_key(KINDS.index(kind), canonical), U64.pack(tag_id), db=self.db["tag_ids"], overwrite=False
        ):
            return False
        return bool(
            txn.put(U64.pack(tag_id), encode_tag(text, kind, canonical), db=self.db["tags"], append=True)
        )

    def _put_rows(
        self, txn: Any, db: str, ids: NDArray[np.int64], rows: NDArray[Any], *, keep_tail: bool = False
    ) -> None:
        """Write the rows `[n, D]` of ids; what blocks hold behind the last of them goes, unless it is to be kept."""
        blocks, offsets = np.divmod(ids, ROWS)
        for block in np.unique(blocks).tolist():
            key, at = block_key(self.space, block), offsets[blocks == block]
            old = np.frombuffer(txn.get(key, db=self.db[db]) or b"", np.float16).reshape(-1, rows.shape[1])
            new = np.zeros((max(int(at.max()) + 1, len(old) if keep_tail else 0), rows.shape[1]), np.float16)
            new[: len(old)] = old[: len(new)]
            new[at] = rows[blocks == block]
            txn.put(key, new.tobytes(), db=self.db[db])

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

    def _put_state(self, txn: Any, current: int, next_entry_id: int, next_tag_id: int) -> None:
        state = {
            "format": FORMAT,
            "current": current,
            "next_page": self._next_page,
            "next_entry_id": next_entry_id,
            "next_tag_id": next_tag_id,
            "spaces": self._spaces,
        }
        txn.put(b"state", seal(b"state", state), db=self.db["meta"])

    def _number(self) -> int:
        return self.parent.number + 1 if self.parent else self._first_number


def _same(draft: Draft, entry: Entry) -> bool:
    return (draft.sha256, draft.captions, dict(draft.metadata)) == (
        entry.sha256,
        entry.captions,
        dict(entry.metadata),
    )
