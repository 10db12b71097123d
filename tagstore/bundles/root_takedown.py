"""Takedown over a root: copies of what is taken down are found in its stores, dropped stores and bundles.

What can be reached is removed if the caller consents, everything else is named; the record lists both. The
copies go first, the entries themselves last: a takedown that was cut off finds them again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from tagstore.bundles.importing import IMPORTING, build_folder, entries_in, opened
from tagstore.bundles.manifest import EMBEDDINGS, ENTRIES, MANIFEST, MAX_MANIFEST, SIGNATURE, TAGS, BundleInfo
from tagstore.bundles.signature import BYTES
from tagstore.errors import Damaged, NotFound, TagstoreError
from tagstore.storage.environments import forget, writing
from tagstore.storage.generations import generation, sync_directory
from tagstore.storage.store import DROPPED, Store, dropped_names, store_names
from tagstore.types import Entry
from tagstore.upkeep.edits import Selection
from tagstore.upkeep.takedown import Takedown, purge

LIKENESS_BITS = 4
"""Bits in which the perceptual hashes of pictures that look the same may differ."""
_ZSTD = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class Copy:
    """A place under the root that holds copies of entries that are taken down, or what looks like them."""

    where: str
    """In words, without a key or a caption: it goes into the record."""
    path: Path
    """Directory of a store or of a dropped store, or file of a bundle."""
    keys: tuple[str, ...] = ()
    """Of entries that are the same: the same picture, or the same key with the same captions."""
    alike: tuple[str, ...] = ()
    """Of entries that only look like them. They are named, and never removed."""
    fault: str = ""
    """Why the place could not be searched."""


Consent = Callable[[Sequence[Copy]], bool]
"""Told of the copies that can be removed, says whether they shall be."""


def take_down(
    root: str | Path,
    store: str,
    selection: Selection,
    *,
    reason: str,
    who: str = "",
    consent: Consent = lambda copies: False,
) -> Takedown:
    """Take entries of a store down as `purge` does, and with consent their copies under the root.

    Copies in stores and dropped stores are purged, with a record there; bundles that hold one are deleted.
    The record names what was removed and what is left: without consent, all copies; always, what only looks
    like them, what cannot be searched, and what cannot be removed, because it is being written or read-only.

    Raises what `purge` raises.
    """
    root = Path(root)
    removed: list[str] = []
    left = _leftover_imports(root)
    own: tuple[str, ...] = ()
    copies = find_copies(root, store, selection)
    removable = [copy for copy in copies if copy.keys]
    agreed = bool(removable) and consent(removable)
    for copy in copies:
        if copy.keys:
            what = f"{copy.where}: {len(copy.keys)} the same"
            fault = "not agreed to"
            if agreed and copy.path == root / store:
                own, fault = copy.keys, ""
            elif agreed:
                fault = _removal_fault(copy, reason, who)
            (left.append(f"{what}: {fault}") if fault else removed.append(what))
        if copy.alike and copy.path.exists():  # a bundle that was deleted holds nothing any more
            left.append(f"{copy.where}: {len(copy.alike)} that look like them")
        if copy.fault:
            left.append(f"{copy.where}: cannot be searched: {copy.fault}")
    selection = replace(selection, keys=[*selection.keys, *own])
    return purge(root, store, selection, reason=reason, who=who, removed=removed, left=left)


def find_copies(root: str | Path, store: str, selection: Selection) -> list[Copy]:
    """List the places under a root that hold copies of the selected entries, or what looks like them.

    Other entries of the store itself are among them, and places that cannot be searched.

    Raises `NotFound` if no entry of any version of the store fits.
    """
    root = Path(root)
    selection.check()
    entries = Store(root, store).all_entries
    keys = {entry.key for entry in entries() if selection.fits(entry)}
    if not keys:
        raise NotFound(f"no entry of any version of store '{store}' fits: nothing was taken down")
    marks = _Marks([entry for entry in entries() if entry.key in keys])
    places: list[tuple[str, Path, Callable[[], Iterable[Entry]]]] = [
        (f"store '{name}'", root / name, partial(_stored, root, name)) for name in store_names(root)
    ]
    for name in dropped_names(root):
        path = root / DROPPED / name
        places.append((f"dropped store '{name}'", path, partial(_stored, path.parent, name)))
    for path in _bundle_files(root):
        places.append((f"bundle '{path.relative_to(root)}'", path, partial(bundle_entries, path)))
    copies = [marks.search(*place, without=keys if place[1] == root / store else set()) for place in places]
    return [copy for copy in copies if copy.keys or copy.alike or copy.fault]


def bundle_entries(path: Path) -> Iterator[Entry]:
    """Yield the entries of a bundle. Raises `InvalidInput` or `Damaged` if it cannot be read."""
    with opened(path) as archive:
        info = BundleInfo.from_manifest(archive.small(MANIFEST, MAX_MANIFEST))
        if info.signer:
            archive.small(SIGNATURE, BYTES)
        for name in (TAGS, EMBEDDINGS, ENTRIES):
            with archive.member(name, info.files[name]["bytes"], info.files[name]["sha256"]) as member:
                if name == ENTRIES:
                    yield from (entry for entry, _ in entries_in(member, info.next_entry_id))


class _Marks:
    """What the entries that are taken down are recognised by."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._images, self._texts, hashes = set(), set(), set()
        for entry in entries:
            self._images.add(entry.sha256)
            self._texts.add((entry.key, entry.captions))
            hashes.add(entry.perceptual_hash)
        self._hashes = np.array(sorted(hashes), np.uint64)

    def search(
        self, where: str, path: Path, entries: Callable[[], Iterable[Entry]], *, without: set[str]
    ) -> Copy:
        """Search a place, but for the entries of some keys."""
        same: dict[str, None] = {}
        alike: dict[str, None] = {}
        fault = ""
        try:
            for entry in entries():
                if entry.key in without:
                    continue
                if entry.sha256 in self._images or (entry.key, entry.captions) in self._texts:
                    same[entry.key] = None
                elif np.bitwise_count(self._hashes ^ np.uint64(entry.perceptual_hash)).min() <= LIKENESS_BITS:
                    alike[entry.key] = None
        except (TagstoreError, OSError) as error:
            fault = str(error)
        return Copy(where, path, tuple(same), tuple(key for key in alike if key not in same), fault)


def _stored(root: Path, name: str) -> Iterator[Entry]:
    """The entries of a store, of any version."""
    store = Store(root, name)
    try:
        yield from store.all_entries()
    finally:
        if root.name == DROPPED:
            forget(store.generation)  # it may be brought back, under another path


def _bundle_files(root: Path) -> list[Path]:
    """Files under a root that may be bundles, partial ones of an export included."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("db-"))
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink() and _may_be_bundle(path):
                paths.append(path)
    return paths


def _may_be_bundle(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_ZSTD)) == _ZSTD
    except OSError:
        return True  # the search will say why it cannot be read


def _leftover_imports(root: Path) -> list[str]:
    """Remove what imports that were cut off left in the root; returns what cannot be removed."""
    if (root / IMPORTING).exists():
        try:
            with build_folder(root):
                pass
        except (TagstoreError, OSError) as error:
            return [f"an unfinished import: {error}"]
    return []


def _removal_fault(copy: Copy, reason: str, who: str) -> str:
    """Remove a copy from where it is; returns why it could not be."""
    try:
        if copy.path.is_dir():
            purge(copy.path.parent, copy.path.name, Selection(keys=copy.keys), reason=reason, who=who)
            if copy.path.parent.name == DROPPED:
                forget(generation(copy.path))
        else:
            with writing(str(copy.path)):
                copy.path.unlink()
                sync_directory(copy.path.parent)
    except Damaged:  # its message may quote what is taken down
        return "it is damaged or traces are left: run `tagstore verify` and `tagstore prove-absent`"
    except TagstoreError as error:
        return str(error)
    return ""
