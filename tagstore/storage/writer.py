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
from tagstore.storage.environments import environment, trim, writing
from tagstore.storage.file_length import complete
from tagstore.storage.generations import (
    generation,
    new_generation,
    sweep,
    switch,
    sync_directory,
    writer_lock,
)
from tagstore.storage.rows import put_rows
from tagstore.storage.snapshot import Snapshot
from tagstore.storage.staging import Draft, Progress, Sync, sweep_staged
from tagstore.storage.store import Store, store_directory
from tagstore.storage.tables import U64, TableWriter, arrays_of, key_of, open_tables, tag_key, unpack_ids
from tagstore.storage.version import Version, now
from tagstore.types import Entry, EntryTag, Fingerprint, Rejected, Vectors

Indexer = Callable[[Snapshot, Version | None, Path], Mapping[str, Any]]
"""Builds and syncs the index of a version to be committed, given its parent and the directory to write to."""
GROWTH = 4096
"""Entries or tags by which the arrays of a writer grow at least."""


class Writer:
    """The one writer of a store, as a context manager.

    Leaving the context without a commit leaves the store at the version it had. Once a step has failed all
    others are refused, since this object may not agree with the disk any more: a new one starts from what is
    there.

    Args:
        fingerprint: of the encoder that makes the vectors; None for work that brings none (delete, rollback).
        new_space: accept another encoder than the store's: the caller gives every entry a new vector.
        resume: identity of an ingest: what one of the same identity staged is kept; see `progress`.

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
        self.directory = store_directory(root, name)
        self.name = name
        self._given = fingerprint
        self._new_space = new_space
        self._resume = resume
        self._sync = sync
        self._exit = ExitStack()
        self._failed = False
        self._first_number = 1
        self.parent: Version | None = None
        self.progress: Progress | None = None
        """How far an ingest got that is to be taken up again; None if there is none of the identity given."""
        self.first_entry_id = self.next_entry_id = self.next_tag_id = self.space = 0
        self.tag_embeddings: Mapping[str, Any] = {}
        """See `Version.tag_embeddings`. If it is not empty, whoever adds tags has to learn them all anew."""

    def __enter__(self) -> Writer:
        if self._given is None:
            Store(self.directory.parent, self.name)
        with writing(f"store '{self.name}'"), ExitStack() as stack:
            self.directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(writer_lock(self.directory))
            if not (self.directory / "CURRENT").exists():
                fresh = new_generation(self.directory)
                open_tables(environment(fresh, create=True), create=True)
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
        """Run work after which this object and the disk agree; if it fails, every later step is refused."""
        if self._failed:
            raise WriteFailed(
                f"an earlier step of this writer of store '{self.name}' failed, and what it staged may be "
                "half done: open a new Writer, which starts from what is on disk"
            )
        try:
            with writing(f"store '{self.name}'"):
                yield
                complete(self.env, str(self._path))
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
        """Sort drafts: those to append, refusals of keys seen before in this ingest, the number unchanged."""
        admitted: list[Draft] = []
        rejected: list[Rejected] = []
        unchanged = 0
        seen: set[str] = set()
        with self.step(), self.env.begin() as txn:
            for draft in drafts:
                old = self._live_id(txn, draft.key)
                taken = old is not None and (old >= self.first_entry_id or self._confirmed[old])
                if draft.key in seen or taken:
                    reason = (
                        "duplicate key: the first pair of this key was kept; rows of one picture are joined "
                        "where they follow one another, so sort the source by its key"
                    )
                    rejected.append(Rejected(draft.key, reason, draft.origin))
                elif old is not None and same_miner and _same(draft, self._entry(txn, old)):
                    unchanged += 1
                    self._confirmed[old] = True
                else:
                    admitted.append(draft)
                seen.add(draft.key)
        return admitted, rejected, unchanged

    def holds(self, draft: Draft) -> bool:
        """Whether a live entry is what a draft brings: then `admit` will not ask for its vector. Safe beside
        other steps, in any thread."""
        with self.env.begin() as txn:
            old = self._live_id(txn, draft.key)
            return old is not None and _same(draft, self._entry(txn, old))

    def confirm(self, keys: Sequence[str]) -> None:
        """Mark entries of the parent as seen in this ingest: another pair of their key is a duplicate."""
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
        """Stage entries with their unit vectors `[len(drafts), D]` and the refused pairs, in one transaction.

        An entry replaces the one of its key. `progress` is completed and stored. Raises `BadVector`.
        """
        rows = self._checked(len(drafts), vectors)
        first = self.next_entry_id
        with self.transaction() as txn:
            self._reserve(len(drafts))
            for entry_id, draft in enumerate(drafts, first):
                old = self._live_id(txn, draft.key)
                if old is not None:
                    self._count_out(txn, old)
                tags = tuple(EntryTag(self._tag_id(txn, t), t.score, t.provenance) for t in draft.tags)
                entry = draft.entry(entry_id, tags)
                self._tables.put_entry(txn, entry_id, encode_entry(entry), entry.key)
                self._count_in(entry)
            put_rows(txn, self.db["vectors"], self.space, np.arange(first, first + len(drafts)), rows)
            self.next_entry_id += len(drafts)
            for refused in rejected:
                self._tables.put_json(txn, "quarantine", (self._next_number, self._refused), asdict(refused))
                self._refused += 1
            if progress is not None:
                progress.next_entry_id, progress.next_tag_id = self.next_entry_id, self.next_tag_id
                progress.rejected = self._refused
                txn.put(b"ingest", seal(b"ingest", asdict(progress)), db=self.db["meta"])

    @property
    def live(self) -> NDArray[np.bool_]:
        """Which entry ids live, what was staged included: `[next_entry_id]` bool."""
        return self._live[: self.next_entry_id]

    @property
    def counts(self) -> NDArray[np.int32]:
        """How many entries carry each tag, what was staged included: `[next_tag_id]` int32."""
        return self._counts[: self.next_tag_id]

    def refused(self) -> list[Rejected]:
        """The pairs that the resumed ingest has refused so far."""
        number = U64.pack(self._next_number)
        with self.env.begin(db=self.db["quarantine"]) as txn:
            keys = [number + U64.pack(i) for i in range(self._refused)]
            return [Rejected(**unseal(key, data)) for key in keys if (data := txn.get(key))]

    def delete(self, entry_ids: Sequence[int]) -> int:
        """Stage the removal of entries; returns how many of them lived."""
        removed = 0
        with self.step(), self.env.begin() as txn:
            for entry_id in entry_ids:
                if 0 <= entry_id < self.next_entry_id and self._live[entry_id]:
                    self._count_out(txn, entry_id)
                    removed += 1
        return removed

    def begin_space(self, tag_embeddings: Mapping[str, Any]) -> bool:
        """Begin a space for other embeddings of all tags; returns whether it needs the vectors too.

        A space that no version has yet is taken as it is, with its vectors.
        """
        fresh = self.space not in self._tables.spaces
        if not fresh:
            self.space = max(self._tables.spaces) + 1
        self._embedded, self.tag_embeddings = 0, tag_embeddings
        return not fresh

    def put_vectors(self, ids: Sequence[int], vectors: Vectors) -> None:
        """Stage vectors of a new space for entries that the store has, in any order."""
        rows = self._checked(len(ids), vectors)
        with self.transaction() as txn:
            put_rows(txn, self.db["vectors"], self.space, np.array(ids, np.int64), rows, keep_tail=True)

    def new_tags(self, *, limit: int) -> list[str]:
        """Texts of up to `limit` tags that have no embedding in this space yet, in order of their ids."""
        ids = range(self._embedded, min(self.next_tag_id, self._embedded + limit))
        with self.env.begin(db=self.db["tags"]) as txn:
            records = [txn.get(U64.pack(i)) for i in ids]
        return [decode_tag(record)[0] if record else "" for record in records]

    def embed_tags(self, embeddings: Vectors) -> None:
        """Stage the text embeddings of the next tags, `[n, D]` unit rows, in the order of `new_tags`."""
        rows = self._checked(len(embeddings), embeddings)
        with self.transaction() as txn:
            ids = np.arange(self._embedded, self._embedded + len(rows))
            put_rows(txn, self.db["embeddings"], self.space, ids, rows)
            self._embedded += len(rows)

    def commit(
        self,
        *,
        operation: str,
        source: Mapping[str, Any] | None = None,
        miner: Mapping[str, Any] | None = None,
        indexer: Indexer,
    ) -> Version:
        """Make what was staged the next version: durable and visible when this returns.

        If it raises there is no new version, except if the disk refused the very last sync: then the next one
        to open the store sees which version reached it.
        """
        if self._embedded < self.next_tag_id:
            raise ValueError(f"{self.next_tag_id - self._embedded} tags have no embedding")
        with self.step():
            version = self.draft_version(operation, source or {})
            version = replace(version, miner=version.miner if miner is None else miner)
            arrays = arrays_of(self.live, self.counts)
            with self.env.begin(write=True) as txn:
                pages = self._tables.put_arrays(txn, arrays, self.parent.pages if self.parent else {})
            ranges = ranges_of(self.store, self.parent, version, arrays, self._embedded)
            version = replace(version, pages=pages, ranges=ranges)
            self._tables.spaces[self.space] = (self.fingerprint.digest, self._embedded)
            index = indexer(Snapshot(self.store, version), self.parent, self.store.index_directory)
            return self._publish(replace(version, index=index))

    def draft_version(self, operation: str, source: Mapping[str, Any]) -> Version:
        """The next version as far as this object knows it: without pages, index and checksums."""
        return Version(
            number=self._next_number,
            parent=self.parent.number if self.parent else 0,
            created=now(),
            operation=operation,
            source=source,
            entries=int(self.live.sum()),
            tags=int(self.counts.sum(dtype=np.int64)),
            unique_tags=int(np.count_nonzero(self.counts)),
            next_entry_id=self.next_entry_id,
            next_tag_id=self.next_tag_id,
            space=self.space,
            fingerprint=self.fingerprint,
            miner=self.parent.miner if self.parent else {},
            tag_embeddings=self.tag_embeddings,
        )

    def rollback(self, number: int) -> Version:
        """Commit a version that holds what version `number` held. Raises `NotFound`."""
        old = self.store.snapshot(number).version
        version = replace(
            old,
            number=self._next_number,
            parent=self.parent.number if self.parent else 0,
            created=now(),
            operation=f"rollback to {number}",
            source={},
            next_entry_id=self.next_entry_id,
            next_tag_id=self.next_tag_id,
        )
        with self.step():
            self._publish(version)
            self.reopen()  # entries and counts are those of another version than before
            return version

    def replace_index(self, version: Version, index: Mapping[str, Any]) -> None:
        """Make a committed version name other index files with the same content."""
        with self.transaction() as txn:
            self._tables.put_version(txn, replace(version, index=index), overwrite=True)

    def put_takedown(self, version: int, takedown: Mapping[str, Any]) -> None:
        """Write the record of the takedown that made a version, in place of an earlier one."""
        with self.transaction() as txn:
            self._tables.put_json(txn, "takedowns", [version], takedown)

    def _publish(self, version: Version) -> Version:
        with self.env.begin(write=True) as txn:
            self._tables.put_version(txn, version)
            if version.source:
                self._tables.put_json(txn, "sources", [version.number], version.source)
            self._tables.put_state(txn, version.number, version.next_entry_id, version.next_tag_id)
            txn.delete(b"ingest", db=self.db["meta"])
        self.env.sync(True)
        self.parent = version
        self.progress = None
        self.first_entry_id = self.next_entry_id
        self._confirmed = np.zeros(self.next_entry_id, bool)
        self._refused = 0
        return version

    def reopen(self) -> None:
        """After a commit, read again what was committed, in the generation that is current now."""
        try:
            self._open()
        except (lmdb.Error, OSError):
            self._failed = True  # the version is there for good: it is only this writer that cannot go on

    def discard(self) -> None:
        """Sweep away what an ingest that was cut off staged, and start from the current version."""
        self._resume = ""
        with self.step():
            self._begin()

    def _open(self) -> None:
        self._path = generation(self.directory)
        self.env = environment(self._path)
        self.env.reader_check()  # a reader that was killed must not keep freed pages from being used again
        self.db = open_tables(self.env, create=True)
        self._begin()

    def _begin(self) -> None:
        """Start from the current version and what the ingest to resume staged; sweep anything else."""
        with self.env.begin(write=True) as txn:
            if txn.get(b"state", db=self.db["meta"]) is None:
                TableWriter(self.db).put_state(txn, 0, 0, 0)
        self.store = Store(self.directory.parent, self.name)
        state = self.store.state()
        spaces = {int(k): (digest, embedded) for k, (digest, embedded) in state["spaces"].items()}
        self._tables = TableWriter(self.db, state["next_page"], spaces)
        self.parent = self.store.snapshot(state["current"]).version if state["current"] else None
        self._choose_space()
        self.tag_embeddings = self.parent.tag_embeddings if self.parent else {}
        self.first_entry_id = state["next_entry_id"]
        self.next_entry_id = self.first_entry_id
        self.next_tag_id = state["next_tag_id"]
        self._embedded = min(spaces.get(self.space, ("", 0))[1], self.next_tag_id)
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
        sweep_staged(self.store, self._tables, self.progress, state, self._next_number)
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
            self.space = max(self._tables.spaces, default=-1) + 1

    def _resumable(self) -> Progress | None:
        with self.env.begin(db=self.db["meta"]) as txn:
            data = txn.get(b"ingest")
        progress = Progress(**unseal(b"ingest", data)) if data else None
        return progress if progress and progress.identity == self._resume else None

    def _restore(self, progress: Progress) -> None:
        """Count in what was staged before, as `append` did."""
        self._reserve(progress.next_entry_id - self.next_entry_id)
        self._counts = np.pad(self._counts, (0, progress.next_tag_id - len(self._counts)))
        with self.env.begin() as txn:
            for entry_id in range(self.first_entry_id, progress.next_entry_id):
                entry = self._entry(txn, entry_id)
                old = self._live_id(txn, entry.key)
                if old is not None:
                    self._count_out(txn, old)
                self._count_in(entry)
        self.next_entry_id, self.next_tag_id = progress.next_entry_id, progress.next_tag_id
        self._refused = progress.rejected

    def _entry(self, txn: Any, entry_id: int) -> Entry:
        return decode_entry(entry_id, txn.get(U64.pack(entry_id), db=self.db["entries"]))

    def _live_id(self, txn: Any, key: str) -> int | None:
        ids = unpack_ids(txn.get(key_of(key), db=self.db["keys"]))
        return next((i for i in reversed(ids) if i < len(self._live) and self._live[i]), None)

    def _count_in(self, entry: Entry) -> None:
        self._live[entry.entry_id] = True
        # an entry carries a tag once, so no id stands twice
        if entry.tags:
            self._counts[[tag.tag_id for tag in entry.tags]] += 1

    def _count_out(self, txn: Any, entry_id: int) -> None:
        self._live[entry_id] = False
        self._counts[np.array([tag.tag_id for tag in self._entry(txn, entry_id).tags], np.int64)] -= 1

    def _tag_id(self, txn: Any, tag: MergedTag) -> int:
        data = txn.get(tag_key(tag.kind, tag.canonical), db=self.db["tag_ids"])
        if data is not None:
            return int(U64.unpack(data)[0])
        tag_id = self.next_tag_id
        self._tables.put_tag(txn, tag_id, encode_tag(tag.text, tag.kind, tag.canonical))
        self.next_tag_id += 1
        if tag_id >= len(self._counts):
            self._counts = np.pad(self._counts, (0, max(GROWTH, tag_id)))
        return tag_id

    def _reserve(self, n: int) -> None:
        if self.next_entry_id + n > len(self._live):
            self._live = np.pad(self._live, (0, max(GROWTH, self.next_entry_id, n)))

    def _checked(self, n: int, vectors: Vectors | None) -> Vectors:
        """Return the vectors if they are `[n, D]` and finite. Raises `BadVector`; the writer stays usable."""
        rows = np.zeros((0, self.fingerprint.dimension), np.float32) if vectors is None else vectors
        if rows.shape != (n, self.fingerprint.dimension):
            raise BadVector(
                f"vectors of shape {list(rows.shape)} for [{n}, {self.fingerprint.dimension}] of store "
                f"'{self.name}'"
            )
        if not np.isfinite(rows).all():
            raise BadVector(
                f"a vector for store '{self.name}' holds NaN or infinity: the encoder, or what it was given, "
                "is broken"
            )
        return rows

    @property
    def _next_number(self) -> int:
        """Number of the version that comes next."""
        return self.parent.number + 1 if self.parent else self._first_number


def _same(draft: Draft, entry: Entry) -> bool:
    """Whether an entry holds what a draft brings; its tags follow from that."""
    return (draft.sha256, draft.captions, dict(draft.metadata)) == (
        entry.sha256,
        entry.captions,
        dict(entry.metadata),
    )
