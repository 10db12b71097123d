"""Export of a version to a bundle.

The content is read twice: first for the checksums at the head of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.bundles.archive import MAX_LINE, ArchiveWriter
from tagstore.bundles.images import GatheredImages
from tagstore.bundles.manifest import (
    BATCH,
    EMBEDDINGS,
    ENTRIES,
    MANIFEST,
    SIGNATURE,
    TAGS,
    VECTORS,
    BundleInfo,
    check_rows,
    to_json,
)
from tagstore.bundles.signature import Signer
from tagstore.errors import InvalidInput
from tagstore.storage.checksums import check_sound
from tagstore.storage.environments import writing
from tagstore.storage.snapshot import Snapshot
from tagstore.storage.store import Store
from tagstore.storage.version import Version
from tagstore.types import Vectors

MAX_ORIGINS_BYTES = 1 << 20
"""Bytes of the sources in a manifest, and of the bundles in it, at most: the newest that fit are named."""


def export(
    root: str | Path,
    store: str,
    path: str | Path,
    *,
    version: int | None = None,
    licence: str = "",
    note: str = "",
    key: str | Path | None = None,
    images: bool = False,
    sources: Sequence[str] = (),
) -> BundleInfo:
    """Write a version to a file, which appears complete or not at all and replaces one of its name.

    Memory does not grow with the store.

    Args:
        root: directory of the stores.
        store: name of the store.
        path: the file to write.
        version: number of the version; the current one if not given.
        licence: under which the content may be used, for the manifest: an SPDX identifier, a text or a URL.
        note: a text for the manifest.
        key: PEM file of an Ed25519 private key to sign with.
        images: include the images. They are read again from where they were ingested and must have the bytes
            they had; while they are gathered they take their size once more on the disk of `path`.
        sources: where to read the images instead.

    Raises:
        NotFound: no such store, version or key, or no directory to write to.
        InvalidInput: a bundle cannot hold something of the version, or an image is missing.
        Damaged: the store is not what was committed.
        Busy: another process writes the same file.
        WriteFailed: the disk is full or broken.
    """
    snapshot = Store(root, store).snapshot(version)
    signer = Signer(key) if key else None
    # the checksums of a bundle must not vouch for damaged records
    check_sound(snapshot, set(), "run `tagstore verify`")
    with ExitStack() as stack:
        stack.enter_context(writing(str(path)))
        archive = stack.enter_context(ArchiveWriter(path))
        pictures = (
            stack.enter_context(GatheredImages(snapshot, sources, Path(path).parent)) if images else None
        )
        info = _describe(snapshot, licence, note, signer.public if signer else "", pictures)
        manifest = info.manifest()
        archive.put(MANIFEST, len(manifest), [manifest])
        if signer:
            signature = signer.sign(manifest)
            archive.put(SIGNATURE, len(signature), [signature])
        for name, pieces in _contents(snapshot).items():
            archive.put(name, info.files[name]["bytes"], pieces)
        for name, image in pictures or ():
            archive.put(name, len(image), [image])
    return replace(info, sha256=archive.sha256)


def _describe(
    snapshot: Snapshot, licence: str, note: str, signer: str, pictures: GatheredImages | None
) -> BundleInfo:
    files = {}
    for name, pieces in _contents(snapshot).items():
        digest, size = sha256(), 0
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
        files[name] = {"bytes": size, "sha256": digest.hexdigest()}
    version = snapshot.version
    sources: list[Any] = []
    bundles: list[Any] = []
    for read in snapshot.sources():
        origin = read.get("bundle", {"sources": [read], "bundles": []})
        sources += [source for source in origin["sources"] if source not in sources]
        bundles += [bundle for bundle in origin["bundles"] if bundle not in bundles]
    shared = {f.name: getattr(version, f.name) for f in fields(Version) if f.name in BundleInfo.__slots__}
    return BundleInfo(
        **shared,
        store=snapshot.store.name,
        version=version.number,
        licence=licence,
        note=note,
        sources=_newest(sources),
        bundles=_newest(bundles),
        signer=signer,
        images=pictures is not None,
        image_bytes=pictures.size if pictures else 0,
        files=files,
    )


def _newest(records: list[Any]) -> list[Any]:
    """The last of the records whose JSON has at most `MAX_ORIGINS_BYTES` together."""
    size = 0
    for n, record in enumerate(reversed(records)):
        size += len(to_json(record, MANIFEST))
        if size > MAX_ORIGINS_BYTES:
            return records[len(records) - n :]
    return records


def _contents(snapshot: Snapshot) -> dict[str, Iterator[bytes]]:
    """The content of every file, in pieces."""
    tag_ids, entry_ids = np.array(snapshot.vocabulary(), np.int64), snapshot.live()
    return {
        TAGS: _tag_lines(snapshot, tag_ids),
        EMBEDDINGS: _rows(snapshot, EMBEDDINGS, snapshot.embeddings, tag_ids),
        ENTRIES: _entry_lines(snapshot, entry_ids),
        VECTORS: _rows(snapshot, VECTORS, snapshot.vectors, entry_ids),
    }


def _tag_lines(snapshot: Snapshot, ids: NDArray[np.int64]) -> Iterator[bytes]:
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH].tolist()
        for i, (text, kind, canonical) in zip(batch, snapshot.tags(batch), strict=True):
            yield _line({"id": i, "text": text, "kind": kind, "canonical": canonical}, f"tag {i}")


def _entry_lines(snapshot: Snapshot, ids: NDArray[np.int64]) -> Iterator[bytes]:
    for entry in snapshot.entries(ids):
        value = {
            "id": entry.entry_id,
            "key": entry.key,
            "sha256": entry.sha256.hex(),
            "perceptual_hash": f"{entry.perceptual_hash:016x}",
            "captions": entry.captions,
            "tags": [(tag.tag_id, round(tag.score * 255), tag.mentions) for tag in entry.tags],
            "metadata": entry.metadata,
            "origin": entry.origin,
        }
        yield _line(value, f"entry {entry.entry_id} ({entry.key[:100]})")


def _line(value: dict[str, Any], what: str) -> bytes:
    data = to_json(value, what) + b"\n"
    if len(data) > MAX_LINE:
        raise InvalidInput(f"{what} takes {len(data)} bytes in a bundle, {MAX_LINE} is the most")
    return data


def _rows(
    snapshot: Snapshot, name: str, gather: Callable[[NDArray[np.int64]], Vectors], ids: NDArray[np.int64]
) -> Iterator[bytes]:
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        rows = gather(batch)
        check_rows(rows, batch, snapshot.version.fingerprint, name)
        yield rows.astype("<f2").tobytes()  # exact: the store keeps float16
