"""Taking entries down for good: from every version, from disk, and proving that nothing of them is left."""

from __future__ import annotations

import getpass
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import Damaged, NotFound
from tagstore.storage.rewrite import rewrite
from tagstore.storage.store import Snapshot, Store
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
        meant = [entry for entry in writer.store.entries() if selection.fits(entry)]
        keys = {entry.key for entry in meant}
        # a key stands for its picture in all versions: what it was before is taken down too
        doomed = [entry for entry in writer.store.entries() if entry.key in keys]
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
        version = rewrite(writer, kept, "purge", index_copy, without=keys, takedown=asdict(takedown))
        captions, images = {c for e in doomed for c in e.captions}, {e.sha256.hex() for e in doomed}
        for other in Store(root, store).entries():
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
        writer.put_takedown(version.number, asdict(takedown))
        return takedown


def takedowns(root: str | Path, store: str) -> list[Takedown]:
    """All takedowns of a store, oldest first."""
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
    """Where anything of these still is in a store, in any version, slack or derived file; empty if nowhere.

    Args:
        keys, captions: as text. One of fewer than 8 bytes, or one that is part of a text that remains, is looked for in the records
            only: it is in the files by right.
        images: sha256 of encoded images, hex.
        vectors: float16 rows as bytes.
    """
    opened = Store(root, store)
    found = []
    for entry in opened.entries():
        what = [f"key {entry.key}"] if entry.key in keys else []
        what += [f"a caption of {entry.key}" for caption in entry.captions if caption in captions]
        what += [f"the image of {entry.key}"] if entry.sha256.hex() in images else []
        found += [f"entry {entry.entry_id}: {w}" for w in what]
    names = {t.encode(): f"text '{t[:40]}'" for t in (*keys, *captions)}
    texts = set(names)
    names |= {bytes.fromhex(h): f"image hash {h[:12]}" for h in images} | dict.fromkeys(vectors, "a vector")
    needles = [needle for needle in names if len(needle) >= MIN_NEEDLE_BYTES]
    traced = [
        (path, needle)
        for path in sorted(opened.directory.rglob("*"))
        if path.is_file()
        for needle in _needles_in(path, needles)
    ]
    # "photo-1" is in "photo-12": of a text that is part of what remains, only the records can say that it is gone, and did above
    shared = opened.within_records({needle for _, needle in traced if needle in texts})
    found += [f"{path}: {names[needle]}" for path, needle in traced if needle not in shared]
    return found


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
