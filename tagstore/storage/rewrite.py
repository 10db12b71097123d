"""Rewriting of a store: versions of it are copied into a fresh generation of the database.

LMDB reuses freed pages but neither shrinks its file nor wipes what was in them. So what remains is copied
record by record into a fresh generation; then the generations are switched in one atomic step. Until that
step the old one is untouched and served; readers that hold it keep it until they let go.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.encoding.grounding import learn
from tagstore.storage.checksums import check_sound, ranges_of
from tagstore.storage.codec import unseal
from tagstore.storage.database import Database
from tagstore.storage.environments import environment
from tagstore.storage.file_length import complete
from tagstore.storage.generations import new_generation, sweep, switch, sync_directory
from tagstore.storage.grounding import pictures
from tagstore.storage.rows import BLOCK_ROWS, block_key, put_rows, read_block
from tagstore.storage.snapshot import Snapshot
from tagstore.storage.tables import U64, TableWriter, arrays_of, open_tables
from tagstore.storage.version import Version
from tagstore.storage.writer import Writer

BATCH = 4096
"""Records copied in one transaction."""
BLOCK_BATCH = 256
"""Blocks of rows copied in one transaction."""

CopyIndexer = Callable[[Snapshot, Path], Mapping[str, Any]]
"""Builds an index for a copied version in a directory, of the kind that its record names."""
NO_IDS = np.zeros(0, np.int64)


def rewrite(
    writer: Writer,
    kept: list[Version],
    operation: str,
    indexer: CopyIndexer,
    *,
    without: Iterable[str] = (),
    absent: NDArray[np.int64] = NO_IDS,
    takedown: Mapping[str, Any] | None = None,
) -> Version:
    """Copy versions, and what the writer has as a new one, into a fresh generation; make that current.

    Args:
        without: keys whose refused pairs are not copied.
        absent: ids of entries that no file may contain. The index files of kept versions, whose answers must
            not change, are taken over as they are, except those that may contain one of these.
        takedown: a record to keep in the same commit.

    Raises `Damaged` if what is to be copied is not what was committed.
    """
    seen: set[object] = set()
    for version in [*kept, *([writer.parent] if writer.parent else [])]:
        advice = "a copy would hide that. Run `tagstore verify`, restore the store from a bundle or a copy"
        check_sound(Snapshot(writer.store, version), seen, advice)
    with writer.step():
        version = _Copy(writer, kept, operation, indexer, set(without), absent).write(takedown)
    with suppress(OSError):  # it is committed; the next writer removes what cannot be removed now
        sweep(writer.directory)
    writer.reopen()
    return version


class _Copy:
    """A fresh generation that is being written."""

    def __init__(
        self,
        writer: Writer,
        kept: list[Version],
        operation: str,
        indexer: CopyIndexer,
        without: set[str],
        absent: NDArray[np.int64],
    ) -> None:
        assert writer.parent is not None
        self._writer, self._old, self._indexer, self._without = writer, writer.store, indexer, without
        self._absent = absent
        self._new = replace(writer.draft_version(operation, {}), index=writer.parent.index)
        self._versions = [*kept, self._new]
        snapshots = [Snapshot(self._old, version) for version in kept]
        self._live = {s.version.number: s.live_mask() for s in snapshots} | {self._new.number: writer.live}
        self._counts = {s.version.number: s.counts() for s in snapshots} | {self._new.number: writer.counts}
        self._spaces = {version.space for version in self._versions}

    def write(self, takedown: Mapping[str, Any] | None) -> Version:
        """Copy everything, sync, and switch."""
        path = new_generation(self._writer.directory)
        self._env = environment(path, create=True)
        self._db = open_tables(self._env, create=True)
        state = self._old.state()
        embedded = {int(space): count for space, (_, count) in state["spaces"].items()}
        spaces = {int(k): v for k, v in state["spaces"].items() if int(k) in self._spaces}
        self._tables = TableWriter(self._db, 0, spaces)
        ends = state["next_entry_id"], state["next_tag_id"]
        with self._env.begin(write=True) as txn:
            self._tables.put_state(txn, 0, *ends)
        tags = _union(self._counts.values(), self._writer.next_tag_id)
        self._copy_records(
            "entries", _union(self._live.values(), self._writer.next_entry_id), self._tables.put_entry
        )
        self._copy_records("tags", tags, self._tables.put_tag)
        for space in sorted(self._spaces):
            masks = [self._live[version.number] for version in self._versions if version.space == space]
            self._copy_rows("vectors", space, _union(masks, self._writer.next_entry_id))
            if takedown and any(v.tag_embeddings for v in self._versions if v.space == space):
                self._learn(path, space, masks, embedded[space])
                continue
            # of every tag that stays, even if this space does not need it now: an ingest that finds a tag in
            # the table does not embed it again
            self._copy_rows("embeddings", space, tags & (np.arange(len(tags)) < embedded[space]))
        self._copy_json()
        if takedown:
            with self._env.begin(write=True) as txn:
                self._tables.put_json(txn, "takedowns", [self._new.number], takedown)
        database = Database(self._old.name, self._writer.directory, path, self._env)
        copied: Version | None = None
        for version in self._versions:
            copied = self._put_version(database, version, copied, embedded[version.space])
        with self._env.begin(write=True) as txn:
            self._tables.put_state(txn, self._new.number, *ends)
        self._env.sync(True)
        complete(self._env, str(path))
        switch(self._writer.directory, path)
        assert copied is not None
        return copied

    def _copy_records(
        self, table: str, needed: NDArray[np.bool_], put: Callable[[Any, int, bytes], object]
    ) -> None:
        ids = np.flatnonzero(needed)
        for start in range(0, len(ids), BATCH):
            with self._old.env.begin(db=self._old.db[table]) as source, self._env.begin(write=True) as target:
                for i in ids[start : start + BATCH].tolist():
                    put(target, i, source.get(U64.pack(i)))

    def _copy_rows(self, table: str, space: int, needed: NDArray[np.bool_]) -> None:
        """Copy the blocks that hold needed rows; the other rows of these become zero."""
        blocks = np.unique(np.flatnonzero(needed) // BLOCK_ROWS).tolist()
        dimension = next(v.fingerprint.dimension for v in self._versions if v.space == space)
        for start in range(0, len(blocks), BLOCK_BATCH):
            with self._old.env.begin() as source, self._env.begin(write=True) as target:
                for block in blocks[start : start + BLOCK_BATCH]:
                    kept = needed[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS]
                    rows = read_block(source, self._old.db[table], space, block, dimension)[
                        : len(kept)
                    ].copy()
                    rows[~kept[: len(rows)]] = 0
                    target.put(block_key(space, block), rows.tobytes(), db=self._db[table])

    def _learn(self, path: Path, space: int, masks: list[NDArray[np.bool_]], embedded: int) -> None:
        """Learn the embeddings of a grounded space again: those that were learnt still know what must go."""
        version = next(version for version in self._versions if version.space == space)
        snapshot = Snapshot(Database(self._old.name, self._writer.directory, path, self._env), version)
        ids = np.flatnonzero(_union(masks, self._writer.next_entry_id))
        first = 0
        for rows in learn(lambda: pictures(snapshot, ids), embedded, snapshot.dimension):
            with self._env.begin(write=True) as txn:
                put_rows(txn, self._db["embeddings"], space, np.arange(first, first + len(rows)), rows)
            first += len(rows)

    def _copy_json(self) -> None:
        """Copy the refused pairs of the versions that stay, and all sources and takedowns."""
        numbers = {U64.pack(version.number) for version in self._versions}
        with self._old.env.begin() as source, self._env.begin(write=True) as target:
            for table in ("quarantine", "sources", "takedowns"):
                with source.cursor(self._old.db[table]) as cursor:
                    for key, value in cursor:
                        if table == "quarantine" and (
                            key[:8] not in numbers or unseal(key, value)["key"] in self._without
                        ):
                            continue
                        target.put(key, value, db=self._db[table])

    def _put_version(
        self, database: Database, version: Version, parent: Version | None, embedded: int
    ) -> Version:
        """Write a version, with pages, checksums and an index of its own."""
        arrays = arrays_of(self._live[version.number], self._counts[version.number])
        with self._env.begin(write=True) as txn:
            pages = self._tables.put_arrays(txn, arrays, {})
        base = parent if parent is not None and parent.next_entry_id <= version.next_entry_id else None
        ranges = ranges_of(database, base, version, arrays, min(version.next_tag_id, embedded))
        version = replace(version, pages=pages, ranges=ranges)
        shared = version.number != self._new.number or self._is_without_slack(version)
        if not (shared and self._take_over(version, database.index_directory)):
            index = self._indexer(Snapshot(database, version), database.index_directory)
            version = replace(version, index=index)
        with self._env.begin(write=True) as txn:
            self._tables.put_version(txn, version)
        return version

    def _is_without_slack(self, version: Version) -> bool:
        """Whether the index is one sound file of just the entries of a version: no other would be smaller."""
        files = version.index["files"]
        if len(files) != 1 or files[0]["rows"] != np.count_nonzero(self._live[version.number]):
            return False
        try:
            with (self._old.index_directory / files[0]["file"]).open("rb") as file:
                return str(files[0]["sha256"]) == hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return False

    def _take_over(self, version: Version, directory: Path) -> bool:
        """Link the index files of a version into the new generation, if they are there and contain nothing of
        what must be absent."""
        directory.mkdir(exist_ok=True)
        for about in version.index["files"]:
            source, target = self._old.index_directory / about["file"], directory / about["file"]
            if not source.exists() or np.any(
                (about["first"] <= self._absent) & (self._absent < about["end"])
            ):
                return False
            if not target.exists():
                _link(source, target)
        sync_directory(directory)
        return True


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a filesystem without links
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def _union(arrays: Iterable[NDArray[Any]], n: int) -> NDArray[np.bool_]:
    """Which of `n` ids any of the arrays needs."""
    needed = np.zeros(n, bool)
    for array in arrays:
        needed[: len(array)] |= array.astype(bool)
    return needed
