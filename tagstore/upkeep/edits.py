"""Changes to an existing store: delete, roll back, compare, tag or embed again, rename, drop and bring back.

Everything that changes the content commits a version; a committed version is never touched.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.encoding.encoder import Encoder, load_encoder, load_encoder_of
from tagstore.encoding.images import decode
from tagstore.errors import AlreadyExists, BadImage, InvalidInput, NotFound
from tagstore.indexing import faiss_index
from tagstore.mining import MergedTag, Miner, Rules, identity, load_miner, load_rules, merge
from tagstore.readers import Columns, read
from tagstore.storage.environments import forget, writing
from tagstore.storage.generations import generation, writer_lock
from tagstore.storage.staging import Draft
from tagstore.storage.store import Snapshot, Store, check_name
from tagstore.storage.version import Version
from tagstore.storage.writer import Writer
from tagstore.types import Entry, Kind, Pair, Rejected

DROPPED = ".dropped"
"""Folder of the dropped stores, under the root."""
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
    """Metadata fields and their values as text; all must fit."""

    def find(self, snapshot: Snapshot) -> Iterator[Entry]:
        """The selected entries of a version: looked up by key alone, or found by a pass over all entries."""
        self.check()
        if self.sha256 or self.near or self.where:
            yield from (entry for entry in snapshot.entries() if self.fits(entry))
        else:
            ids = {i for key in self.keys if (i := snapshot.find(key)) is not None}
            yield from snapshot.entries(np.array(sorted(ids), np.int64))

    def check(self) -> None:
        """Raises `InvalidInput` if nothing is selected, or a sha256 is malformed."""
        if not (self.keys or self.sha256 or self.near or self.where):
            raise InvalidInput(
                "nothing is selected: say which entries, by key, sha256, perceptual hash or metadata"
            )
        for digest in self.sha256:
            if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
                raise InvalidInput(f"'{digest}' is no sha256: 64 hexadecimal digits")

    def fits(self, entry: Entry) -> bool:
        """Whether an entry is selected."""
        return (
            entry.key in self.keys
            or entry.sha256.hex() in (digest.lower() for digest in self.sha256)
            or any((entry.perceptual_hash ^ h).bit_count() <= bits for h, bits in self.near)
            or bool(
                self.where
                and all(str(entry.metadata.get(name)) == value for name, value in self.where.items())
            )
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


def reembed(
    root: str | Path,
    store: str,
    encoder: str | Encoder,
    *,
    sources: Sequence[str] = (),
    device: str = "auto",
) -> Version:
    """Commit a version whose vectors another encoder makes from the original images.

    The version before it is served until then. Images are read again from where the store's ingests read
    them, or from `sources`. Raises `InvalidInput` if an entry is not found there by its key, with the bytes
    it had.
    """
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder, device=device)
    with Writer(root, store, encoder.fingerprint, new_space=True) as writer:
        parent = writer.store.snapshot()
        if parent.version.fingerprint.digest == encoder.fingerprint.digest:
            raise InvalidInput(f"store '{store}' already holds vectors of {encoder.fingerprint}")
        images = originals(parent, sources)
        while batch := [(e.entry_id, _pixels(encoder, e, image)) for e, image in islice(images, 256)]:
            pixels = np.stack([pixels for _, pixels in batch])
            writer.put_vectors([entry_id for entry_id, _ in batch], encoder.encode_images(pixels))
        embed_rest(writer, encoder)
        return writer.commit(operation="reembed", indexer=faiss_index.extend)


def originals(snapshot: Snapshot, sources: Sequence[str] = ()) -> Iterator[tuple[Entry, bytes]]:
    """Yield every entry of a version with its encoded image, from the store's own sources or from `sources`.

    A store keeps no images, only their sha256, so each image has the key and the bytes that were ingested.
    Raises `InvalidInput` at the end if entries have no image, `NotFound` for a source that is not there.
    """
    missing = snapshot.live_mask().copy()
    unread: list[str] = []
    for path, options in [(path, {}) for path in sources] or list(_recorded(snapshot)):
        if not missing.any():
            return
        try:
            for pair in read(path, **options):
                entry_id = None if isinstance(pair, Rejected) else snapshot.find(pair.key)
                if entry_id is None or isinstance(pair, Rejected) or not missing[entry_id]:
                    continue
                entry = snapshot.entry(entry_id)
                if entry.sha256 == sha256(pair.image).digest():
                    missing[entry_id] = False
                    yield entry, pair.image
        except (NotFound, InvalidInput) as error:
            if sources:
                raise
            unread.append(str(error))
    if missing.any():
        first = snapshot.entry(int(np.flatnonzero(missing)[0]))
        raise InvalidInput(
            f"{int(missing.sum())} of {snapshot.version.entries} entries of store '{snapshot.store.name}' "
            f"have no image where it was ingested from, the first: {first.key} (read from "
            f"{first.origin or 'a place that was not recorded'}). "
            + "".join(f"{text}. " for text in unread[:3])
            + "A store keeps no images: name with --source a place that has them under these keys, or one "
            "unpacked from a bundle"
        )


def retag(
    root: str | Path, store: str, *, miner: str | Miner = "rules", vocabulary: Rules | None = None
) -> Version:
    """Commit a version whose tags are mined again from the stored captions and metadata.

    Reads and embeds no image; only tags that the store never had get a text embedding. With a minimum count,
    captions are mined twice: once to count. Raises `InvalidInput` if miner and vocabulary are those of the
    current version.
    """
    miner = load_miner(miner) if isinstance(miner, str) else miner
    rules = vocabulary or load_rules()
    about = identity(miner, rules)
    with Writer(root, store) as writer:
        snapshot = writer.store.snapshot()
        if snapshot.version.miner == about:
            raise InvalidInput(
                f"the tags of store '{store}' were made by this miner with this vocabulary already"
            )
        rare: frozenset[tuple[str, str]] = frozenset()
        if rules.minimum > 1:
            counts = Counter(
                (tag.kind, tag.canonical)
                for _, _, mined in _mined(snapshot, miner, rules)
                for tags in mined
                for tag in tags
            )
            rare = frozenset(tag for tag, count in counts.items() if count < rules.minimum)
        for ids, entries, mined in _mined(snapshot, miner, rules):
            kept = [tuple(tag for tag in tags if (tag.kind, tag.canonical) not in rare) for tags in mined]
            drafts = [
                Draft(e.key, e.sha256, e.perceptual_hash, e.captions, tags, e.metadata, e.origin)
                for e, tags in zip(entries, kept, strict=True)
            ]
            writer.append(drafts, snapshot.vectors(ids))
        embed_rest(writer)
        return writer.commit(operation="retag", miner=about, indexer=faiss_index.extend)


def _mined(
    snapshot: Snapshot, miner: Miner, rules: Rules
) -> Iterator[tuple[NDArray[np.int64], list[Entry], list[tuple[MergedTag, ...]]]]:
    live = snapshot.live()
    for start in range(0, len(live), 1024):
        ids = live[start : start + 1024]
        entries = list(snapshot.entries(ids))
        pairs = (Pair(e.key, b"", e.captions, e.metadata, e.origin) for e in entries)
        yield ids, entries, [rules.apply(merge(tags)) for tags in miner.mine(pairs)]


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
        source.rename(dropped / f"{store}@{int(time.time())}")
        for old in dropped.iterdir():
            if int(old.name.rpartition("@")[2]) < time.time() - UNDO_DAYS * 86400:
                shutil.rmtree(old)
    return UNDO_DAYS


def undrop(root: str | Path, store: str) -> None:
    """Bring back the store that was last dropped under a name."""
    candidates = (Path(root) / DROPPED).glob(f"{check_name(store)}@*")
    newest = max(candidates, key=lambda path: int(path.name.rpartition("@")[2]), default=None)
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


def _directory(root: str | Path, store: str) -> Path:
    return Store(root, store).directory


def embed_rest(writer: Writer, encoder: Encoder | None = None) -> None:
    """Embed the tags that have no embedding in the writer's space yet."""
    while texts := writer.new_tags(limit=4096):
        encoder = encoder or load_encoder_of(writer.fingerprint)
        writer.embed_tags(encoder.encode_texts(texts))


def _recorded(snapshot: Snapshot) -> Iterator[tuple[str, dict[str, Any]]]:
    """Paths that ingests read, newest first, with their options; bundles are left out."""
    seen: list[Mapping[str, Any]] = []
    for source in reversed(snapshot.sources()):
        if "path" not in source or source["format"] == "bundle" or source in seen:
            continue
        seen.append(source)
        columns = source["columns"]
        caption = columns["caption"] if isinstance(columns["caption"], str) else tuple(columns["caption"])
        options = {k: source[k] for k in ("format", "allow_outside")}
        yield source["path"], {**options, "columns": Columns(columns["image"], caption, columns["key"])}


def _pixels(encoder: Encoder, entry: Entry, image: bytes) -> NDArray[np.uint8]:
    try:
        return encoder.prepare(decode(image))
    except BadImage as error:
        raise BadImage(f"{entry.key}: {error}") from error
