"""Taking entries down for good: from every version, from disk, and proving that nothing of them is left."""

from __future__ import annotations

import getpass
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import Damaged, NotFound
from tagstore.storage.environments import writing
from tagstore.storage.generations import sweep
from tagstore.storage.rewrite import rewrite
from tagstore.storage.snapshot import Snapshot
from tagstore.storage.store import Store
from tagstore.storage.version import Version, now
from tagstore.storage.writer import Writer
from tagstore.upkeep.compact import index_copy
from tagstore.upkeep.edits import Selection

MIN_NEEDLE_BYTES = 8
"""Bytes below which a text would be found in any file by chance."""


@dataclass(frozen=True, slots=True)
class Takedown:
    """What was removed for good: kept with the store, without what it removed."""

    when: str
    who: str
    reason: str
    entries: int
    keys_sha256: list[str]
    """sha256 of each key, hex: with a key one can check that it was taken down."""
    versions_dropped: list[int]
    version: int
    """The version that the takedown made."""
    proof: str
    """What was searched for, where, and what was found."""
    removed: list[str] = field(default_factory=list)
    """Where else under the root copies of it were removed."""
    left: list[str] = field(default_factory=list)
    """Where else copies and pictures that look like it were found and left, or what could not be searched."""


def purge(
    root: str | Path,
    store: str,
    selection: Selection,
    *,
    reason: str,
    who: str = "",
    removed: Sequence[str] = (),
    left: Sequence[str] = (),
) -> Takedown:
    """Remove entries from the current version, from disk and from history, dropping the versions that had
    them.

    Then every file and record of the store is searched for their keys, captions, image hashes and vectors.
    Nothing beyond the store is looked at: see `bundles.root_takedown`.

    Args:
        removed, left: for the record: see `Takedown`.

    Raises:
        NotFound: no entry of any version fits.
        WriteFailed: they are taken down, but the files that held them could not be removed: try again.
        Damaged: a trace of them was found; the message says where.
    """
    selection.check()
    with Writer(root, store) as writer:
        keys = {entry.key for entry in writer.store.all_entries() if selection.fits(entry)}
        # earlier entries of the same keys are taken down too
        doomed = [entry for entry in writer.store.all_entries() if entry.key in keys]
        if not doomed:
            raise NotFound(f"no entry of any version of store '{store}' fits: nothing was taken down")
        ids = np.array([entry.entry_id for entry in doomed], np.int64)
        versions = writer.store.versions()
        kept = [v for v in versions if not len(_live(Snapshot(writer.store, v), ids))]
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
            removed=list(removed),
            left=list(left),
        )
        # the record is part of the commit that takes the entries down: a crash leaves both or neither
        version = rewrite(
            writer, kept, "purge", index_copy, without=keys, absent=ids, takedown=asdict(takedown)
        )
        with writing(f"{writer.directory} without its old database"):
            sweep(writer.directory)  # unlike a compaction, a takedown may not leave this to the next writer
        captions, images = {c for e in doomed for c in e.captions}, {e.sha256.hex() for e in doomed}
        for other in Store(root, store).all_entries():
            # another entry that says the same or shows the same picture keeps it
            vectors = [] if other.sha256.hex() in images else vectors
            captions.difference_update(other.captions)
            images.discard(other.sha256.hex())
        traces = prove_absent(
            root, store, keys=sorted(keys), captions=sorted(captions), images=sorted(images), vectors=vectors
        )
        if traces:
            raise Damaged(
                f"version {version.number} is without the entries, but their traces are not gone: "
                f"{'; '.join(traces[:5])}"
            )
        takedown = replace(
            takedown,
            proof=f"{len(keys)} keys, {len(captions)} captions, {len(images)} image hashes and "
            f"{len(vectors)} vectors that no other entry has were searched for in every file and record of "
            "the store: none "
            "found",
        )
        writer.put_takedown(version.number, asdict(takedown))
        return takedown


def takedowns(root: str | Path, store: str) -> list[Takedown]:
    """List all takedowns of a store, oldest first."""
    return [Takedown(**record) for record in Store(root, store).takedowns()]


def prove_absent(
    root: str | Path,
    store: str,
    *,
    keys: Sequence[str] = (),
    captions: Sequence[str] = (),
    images: Sequence[str] = (),
    vectors: Sequence[bytes] = (),
) -> list[str]:
    """List where any of these still is in a store: in any version, slack or derived file.

    Args:
        keys, captions: as text. One that is shorter than 8 bytes, or part of a text that remains, is searched
            for in the records only, since the files rightly contain it.
        images: sha256 of encoded images, hex.
        vectors: float16 rows as bytes.
    """
    opened = Store(root, store)
    traces = []
    for entry in opened.all_entries():
        parts = [f"key {entry.key}"] if entry.key in keys else []
        parts += [f"a caption of {entry.key}" for caption in entry.captions if caption in captions]
        parts += [f"the image of {entry.key}"] if entry.sha256.hex() in images else []
        traces += [f"entry {entry.entry_id}: {part}" for part in parts]
    names = {t.encode(): f"text '{t[:40]}'" for t in (*keys, *captions)}
    texts = set(names)
    names |= {bytes.fromhex(h): f"image hash {h[:12]}" for h in images} | dict.fromkeys(vectors, "a vector")
    needles = [needle for needle in names if len(needle) >= MIN_NEEDLE_BYTES]
    in_files = [(path, needle) for path in opened.files() for needle in _needles_in(path, needles)]
    # "photo-1" is in "photo-12": for a text within one that remains, the check of the records above must do
    shared = opened.within_records({needle for _, needle in in_files if needle in texts})
    return traces + [f"{path}: {names[needle]}" for path, needle in in_files if needle not in shared]


def _live(snapshot: Snapshot, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of the entries that a version has."""
    mask = snapshot.live_mask()
    ids = ids[ids < len(mask)]
    return ids[mask[ids]]


def _vectors(store: Store, versions: list[Version], ids: NDArray[np.int64]) -> list[bytes]:
    """The stored bytes of the entries' vectors, of every version that has them."""
    rows = set()
    for version in versions:
        snapshot = Snapshot(store, version)
        rows |= {row.astype(np.float16).tobytes() for row in snapshot.vectors(_live(snapshot, ids))}
    return sorted(rows)


def _needles_in(path: Path, needles: list[bytes], piece: int = 1 << 24) -> set[bytes]:
    """Those of the byte strings that a file contains."""
    present: set[bytes] = set()
    overlap = max(map(len, needles), default=1) - 1
    with path.open("rb") as file:
        before = b""
        while data := file.read(piece):
            window = before + data
            present |= {needle for needle in needles if needle in window}
            before = window[len(window) - overlap :] if overlap else b""
    return present
