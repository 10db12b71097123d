"""Reprocessing of a store: vectors by another encoder, or tags by another miner or vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.encoding.encoder import Encoder, load_encoder, load_encoder_of
from tagstore.encoding.images import decoding
from tagstore.errors import BadImage, InvalidInput, NotFound
from tagstore.indexing import faiss_index
from tagstore.mining import MergedTag, Miner, Rules, identity, load_miner, load_rules, merge
from tagstore.readers import Columns, read
from tagstore.storage.grounding import ground as learn_from_pictures
from tagstore.storage.snapshot import Snapshot
from tagstore.storage.staging import Draft
from tagstore.storage.version import Version
from tagstore.storage.writer import Writer
from tagstore.types import Entry, Pair, Rejected


def reembed(
    root: str | Path, store: str, encoder: str | Encoder, *, sources: Sequence[str] = (), device: str = "auto"
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
        if writer.tag_embeddings:
            learn_from_pictures(writer)
        embed_rest(writer)
        return writer.commit(operation="retag", miner=about, indexer=faiss_index.extend)


def ground(root: str | Path, store: str) -> Version:
    """Commit a version whose tag embeddings are learnt from the store's own pictures, not read from words.

    The relevance of a tag then says how much a picture looks like those that carry the tag. Later ingests and
    retags of the store learn all embeddings anew.

    Raises `InvalidInput` for a store of fewer than two entries.
    """
    with Writer(root, store) as writer:
        if np.count_nonzero(writer.live) < 2:
            raise InvalidInput(f"store '{store}' has too few pictures to learn from: at least 2")
        learn_from_pictures(writer)
        return writer.commit(operation="ground", indexer=faiss_index.extend)


def embed_rest(writer: Writer, encoder: Encoder | None = None) -> None:
    """Embed the tags that have no embedding in the writer's space yet; a grounded store learns all anew."""
    if writer.tag_embeddings and writer.new_tags(limit=1):
        learn_from_pictures(writer)
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


def _mined(
    snapshot: Snapshot, miner: Miner, rules: Rules
) -> Iterator[tuple[NDArray[np.int64], list[Entry], list[tuple[MergedTag, ...]]]]:
    live = snapshot.live()
    for start in range(0, len(live), 1024):
        ids = live[start : start + 1024]
        entries = list(snapshot.entries(ids))
        pairs = (Pair(e.key, b"", e.captions, e.metadata, e.origin) for e in entries)
        yield ids, entries, [rules.apply(merge(tags)) for tags in miner.mine(pairs)]


def _pixels(encoder: Encoder, entry: Entry, image: bytes) -> NDArray[np.uint8]:
    try:
        with decoding(image) as picture:
            return encoder.prepare(picture)
    except BadImage as error:
        raise BadImage(f"{entry.key}: {error}") from error
