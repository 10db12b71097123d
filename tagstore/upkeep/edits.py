"""Changes to an existing store: delete, roll back, compare, rename, drop and bring back.

Everything that changes the content commits a version; a committed version is never touched.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import numpy as np

from tagstore.errors import AlreadyExists, InvalidInput, NotFound
from tagstore.indexing import faiss_index
from tagstore.metadata_filter import fits
from tagstore.storage.environments import forget, writing
from tagstore.storage.generations import generation, writer_lock
from tagstore.storage.snapshot import Snapshot
from tagstore.storage.store import DROPPED, Store, check_name
from tagstore.storage.version import Version
from tagstore.storage.writer import Writer
from tagstore.types import Entry, Kind
from tagstore.upkeep.reprocessing import embed_rest

HASH_BITS = 64
"""Bits of a perceptual hash."""
UNDO_DAYS = 7.0
"""Days for which a dropped store can be brought back."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which entries an operation is for: those that fit any one of these."""

    keys: Sequence[str] = ()
    sha256: Sequence[str] = ()
    """Of encoded images, hex."""
    near: Sequence[tuple[int, int]] = ()
    """(perceptual hash, bits it may differ by) pairs."""
    where: Mapping[str, str] = field(default_factory=dict)
    """Metadata fields and their values as text (`storage.metadata_filter`); all must fit."""

    def find(self, snapshot: Snapshot) -> Iterator[Entry]:
        """The selected entries of a version: looked up by key alone, or found by a pass over all entries."""
        self.check()
        if self.sha256 or self.near or self.where:
            yield from (entry for entry in snapshot.entries() if self.fits(entry))
        else:
            ids = {i for key in self.keys if (i := snapshot.find(key)) is not None}
            yield from snapshot.entries(np.array(sorted(ids), np.int64))

    def check(self) -> None:
        """Raises `InvalidInput` if nothing is selected, or a sha256 or a distance is none."""
        if not (self.keys or self.sha256 or self.near or self.where):
            raise InvalidInput(
                "nothing is selected: say which entries, by key, sha256, perceptual hash or metadata"
            )
        for digest in self.sha256:
            if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
                raise InvalidInput(f"'{digest}' is no sha256: 64 hexadecimal digits")
        for _, distance in self.near:
            if not 0 <= distance <= HASH_BITS:
                raise InvalidInput(
                    f"the distance is {distance}: perceptual hashes have {HASH_BITS} bits, so it is 0 to "
                    f"{HASH_BITS}"
                )

    def fits(self, entry: Entry) -> bool:
        """Whether an entry is selected."""
        return (
            entry.key in self.keys
            or entry.sha256.hex() in (digest.lower() for digest in self.sha256)
            or any((entry.perceptual_hash ^ h).bit_count() <= bits for h, bits in self.near)
            or bool(self.where and fits(entry.metadata, self.where))
        )


def delete(root: str | Path, store: str, selection: Selection) -> tuple[Version, list[str]]:
    """Commit a version without the selected entries; returns it and their keys.

    Raises `NotFound` if none fits.
    """
    with Writer(root, store) as writer:
        entries = list(selection.find(writer.store.snapshot()))
        if not entries:
            raise NotFound(f"no entry of store '{store}' fits: nothing was deleted")
        writer.delete([entry.entry_id for entry in entries])
        embed_rest(writer)
        version = writer.commit(operation="delete", indexer=faiss_index.extend)
        return version, [entry.key for entry in entries]


def rollback(root: str | Path, store: str, version: int) -> Version:
    """Commit a version that holds what an old one held: one small transaction, whatever the store's size."""
    with Writer(root, store) as writer:
        return writer.rollback(version)


@dataclass(frozen=True, slots=True)
class Diff:
    """The difference between two versions."""

    before: int
    after: int
    added: list[str]
    """Keys."""
    removed: list[str]
    changed: list[str]
    """Keys that both versions have, with different entries."""
    tags: list[tuple[str, Kind, int, int]]
    """(text, kind, count before, count after) of each tag whose counts differ; 0 if it is not there."""


def diff(root: str | Path, store: str, before: int, after: int) -> Diff:
    """Compare the entries and tags of two versions. Memory grows with the difference, not with the store."""
    opened = Store(root, store)
    old, new = opened.snapshot(before), opened.snapshot(after)
    old_ids, new_ids = old.live(), new.live()
    removed = {e.key for e in old.entries(np.setdiff1d(old_ids, new_ids))}
    added = {e.key for e in new.entries(np.setdiff1d(new_ids, old_ids))}
    old_counts, new_counts = old.counts(), new.counts()
    n = max(len(old_counts), len(new_counts))
    counts = np.stack([np.pad(c, (0, n - len(c))) for c in (old_counts, new_counts)])
    ids = np.flatnonzero(counts[0] != counts[1])
    tags = (new if len(new_counts) == n else old).tags(ids.tolist())
    return Diff(
        before,
        after,
        added=sorted(added - removed),
        removed=sorted(removed - added),
        changed=sorted(added & removed),
        tags=[
            (text, kind, int(counts[0, i]), int(counts[1, i]))
            for i, (text, kind, _) in zip(ids.tolist(), tags, strict=True)
        ],
    )


def rename(root: str | Path, store: str, to: str) -> None:
    """Give a store another name. Servers find it under the new one at the next request."""
    source, target = _directory(root, store), Path(root) / check_name(to)
    if target.exists():
        raise AlreadyExists(f"there is a store '{to}' already: choose another name, or drop it first")
    with writing(str(target)), writer_lock(source):
        forget(generation(source))
        source.rename(target)


def drop(root: str | Path, store: str) -> float:
    """Take a store away; returns for how many days `undrop` can bring it back.

    Older ones are removed for good.
    """
    source = _directory(root, store)
    dropped = Path(root) / DROPPED
    with writing(str(dropped)), writer_lock(source):
        forget(generation(source))
        dropped.mkdir(exist_ok=True)
        when = int(time.time())
        while (dropped / f"{store}@{when}").exists():
            when += 1
        source.rename(dropped / f"{store}@{when}")
        for old in dropped.iterdir():
            if _dropped_at(old) < time.time() - UNDO_DAYS * 86400:
                shutil.rmtree(old)
    return UNDO_DAYS


def undrop(root: str | Path, store: str) -> None:
    """Bring back the store that was last dropped under a name."""
    paths = (Path(root) / DROPPED).glob(f"{check_name(store)}@*")
    newest = max((path for path in paths if _dropped_at(path) < inf), key=_dropped_at, default=None)
    if newest is None:
        raise NotFound(
            f"no dropped store '{store}' under {root}: it was never dropped, or more than {UNDO_DAYS:g} days "
            "ago"
        )
    target = Path(root) / store
    if target.exists():
        raise AlreadyExists(f"there is a store '{store}' again: rename that one first")
    with writing(str(target)):
        newest.rename(target)


def _dropped_at(path: Path) -> float:
    """Return when a store was dropped, in seconds; infinity for a path that no drop has made."""
    when = path.name.rpartition("@")[2]
    return int(when) if when.isdecimal() else inf


def _directory(root: str | Path, store: str) -> Path:
    return Store(root, store).directory
