"""Import of a bundle as a new store, which appears only when all of the bundle is read and checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from tagstore.bundles.archive import ArchiveReader, Member
from tagstore.bundles.images import ImageFolder, image_folder, unpack
from tagstore.bundles.manifest import (
    BATCH,
    EMBEDDINGS,
    ENTRIES,
    ENTRY,
    MANIFEST,
    MAX_MANIFEST,
    SIGNATURE,
    TAG,
    TAGS,
    VECTORS,
    BundleInfo,
    check_rows,
    fits,
    from_json,
)
from tagstore.bundles.signature import BYTES, check, public_key
from tagstore.errors import AlreadyExists, Busy, Damaged, InvalidInput, NotFound
from tagstore.indexing import faiss_index
from tagstore.readers import Columns
from tagstore.storage.environments import forget, writing
from tagstore.storage.generations import sync_directory, writer_lock
from tagstore.storage.restorer import Restorer
from tagstore.storage.store import Store, check_name
from tagstore.storage.version import Version
from tagstore.types import Entry, EntryTag
from tagstore.upkeep.verify import verify

IMPORTING = ".importing"
"""Folder in which stores are built, under the root."""
BATCH_BYTES = 4 << 20
"""Bytes of lines after which a batch of records ends early."""

T = TypeVar("T")


def inspect(path: str | Path) -> BundleInfo:
    """Read the manifest of a bundle, and nothing behind it; no signature is checked."""
    with opened(path) as archive:
        return BundleInfo.from_manifest(archive.small(MANIFEST, MAX_MANIFEST))


def import_(
    root: str | Path,
    path: str | Path,
    *,
    store: str | None = None,
    key: str | Path | None = None,
    max_bytes: int | None = None,
    images: str | Path | None = None,
) -> Version:
    """Make a new store of a bundle; its one version has the number, ids and answers of the exported one.

    The store is built in a hidden folder, verified, and then renamed in one step. An import that is cut off
    leaves nothing to be seen, and the next one into the same root removes its leftovers. One import runs in a
    root at a time.

    Args:
        root: directory of the stores; made if it isn't there.
        path: the bundle.
        store: name of the new store; the one it was exported from if not given.
        key: PEM file of an Ed25519 public key that must have signed the bundle.
        max_bytes: refuse a bundle that unpacks to more.
        images: a new or empty folder to unpack the images to, which the store then names as its source. They
            are checked in any case.

    Raises:
        AlreadyExists: there is a store of that name, or something in the folder for images.
        InvalidInput: no bundle, one that breaks the rules, one not signed by `key`, or one that is too large.
        Damaged: bytes are missing or changed, or the signature is not that of the content.
        NotFound: no bundle or key there.
        Busy: another process imports into the same root.
        WriteFailed: the disk is full or broken.
    """
    root = Path(root)
    demanded = public_key(key) if key else ""
    with opened(path) as archive:
        manifest = archive.small(MANIFEST, MAX_MANIFEST)
        info = BundleInfo.from_manifest(manifest)
        _check_signature(archive, info, manifest, demanded)
        name = check_name(store or info.store)
        with writing(str(root)):
            root.mkdir(parents=True, exist_ok=True)
            _check_room(root, info, max_bytes)
        with writing(str(root)), build_folder(root) as folder, image_folder(images, info) as pictures:
            if (root / name).exists():
                raise AlreadyExists(
                    f"there is a store '{name}' already: import under another name, or drop it first"
                )
            source = _source(path, info, manifest) | (pictures.source() if pictures else {})
            _build(folder, name, archive, info, source, pictures)
            archive.end()
            if problems := verify(folder, name, full=True):
                raise Damaged(
                    f"the store made of {path} is not sound: {problems[0].what} ({len(problems)} problems); "
                    "nothing was imported"
                )
            if pictures:
                pictures.finish()
            try:
                (folder / name).rename(root / name)
            except OSError as error:
                if pictures:
                    shutil.rmtree(pictures.path)
                raise AlreadyExists(
                    f"{root / name} has come up meanwhile: import under another name"
                ) from error
            sync_directory(root)
    return Store(root, name).snapshot().version


def _build(
    build_folder: Path,
    name: str,
    archive: ArchiveReader,
    info: BundleInfo,
    source: Mapping[str, Any],
    pictures: ImageFolder | None,
) -> None:
    """Make the store of a bundle, complete, and close it."""

    def member(file: str) -> AbstractContextManager[Member]:
        return archive.member(file, info.files[file]["bytes"], info.files[file]["sha256"])

    first = info.version, info.next_entry_id, info.next_tag_id
    with Restorer(build_folder, name, info.fingerprint, *first) as writer:
        with member(TAGS) as file:
            for tags in _batches((value, size) for value, size, _ in _records(file, TAG, info.next_tag_id)):
                with _naming(TAGS):
                    writer.put_tags((t["id"], t["text"], t["kind"], t["canonical"]) for t in tags)
            _check_count(TAGS, len(writer.tag_ids), info.unique_tags)
        with member(EMBEDDINGS) as file:
            _put_rows(writer, "embeddings", writer.tag_ids, file)
        with member(ENTRIES) as file:
            for entries in _batches(entries_in(file, info.next_entry_id)):
                with _naming(ENTRIES):
                    writer.put_entries(entries)
            _check_count(ENTRIES, len(writer.entry_ids), info.entries)
            _check_count(f"tags in {ENTRIES}", int(writer.counts.sum(dtype=np.int64)), info.tags)
            _check_count(
                f"different tags in {ENTRIES}", int(np.count_nonzero(writer.counts)), info.unique_tags
            )
        with member(VECTORS) as file:
            _put_rows(writer, "vectors", writer.entry_ids, file)
        unpack(archive, info, writer.entries(), pictures)
        writer.tag_embeddings = info.tag_embeddings
        writer.commit(operation="import", source=source, miner=info.miner, indexer=faiss_index.extend)
    writer.close()


def _put_rows(writer: Restorer, table: str, ids: NDArray[np.int64], member: Member) -> None:
    """Write the rows of ascending ids as they come."""
    dimension = writer.fingerprint.dimension
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        rows = np.frombuffer(member.read(len(batch) * dimension * 2), "<f2").reshape(-1, dimension)
        check_rows(rows, batch, writer.fingerprint, member.name)
        writer.put_rows(table, batch, rows)


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Put the name of a file before what is wrong with it."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(f"{file}: {error}") from None


def entries_in(member: Member, end: int) -> Iterator[tuple[Entry, int]]:
    """Yield each entry of a member with the bytes of its line; their ids are below `end`."""
    for value, size, where in _records(member, ENTRY, end):
        if any(last < first for _, _, mentions in value["tags"] for _, first, last in mentions):
            raise InvalidInput(f"{where} has a tag that ends before it starts")
        entry = Entry(
            entry_id=value["id"],
            key=value["key"],
            sha256=bytes.fromhex(value["sha256"]),
            perceptual_hash=int(value["perceptual_hash"], 16),
            captions=tuple(value["captions"]),
            tags=tuple(
                EntryTag(i, score / 255, tuple((c, s, e) for c, s, e in mentions))
                for i, score, mentions in value["tags"]
            ),
            metadata=value["metadata"],
            origin=value["origin"],
        )
        yield entry, size


def _records(member: Member, shape: dict[str, Any], end: int) -> Iterator[tuple[dict[str, Any], int, str]]:
    """Yield each line as (value, bytes, position for messages)."""
    previous = -1
    for number, line in enumerate(member.lines(), 1):
        where = f"{member.name}, line {number}"
        value = from_json(line, where)
        if not fits(value, shape):
            raise InvalidInput(
                f"{where} does not have the fields and types that it should have: {', '.join(shape)}"
            )
        if not previous < value["id"] < end:
            raise InvalidInput(
                f"{where} has id {value['id']} after {previous}: ids ascend, and stay below {end}"
            )
        previous = value["id"]
        yield value, len(line), where


def _batches(records: Iterable[tuple[T, int]]) -> Iterator[list[T]]:
    batch: list[T] = []
    batch_bytes = 0
    for record, size in records:
        batch.append(record)
        batch_bytes += size
        if len(batch) == BATCH or batch_bytes > BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
    yield batch


def _source(path: str | Path, info: BundleInfo, manifest: bytes) -> dict[str, Any]:
    """What the version says of its source.

    Paths that a bundle names are for people to read; nothing follows them.
    """
    this = {
        name: getattr(info, name) for name in ("store", "version", "created", "licence", "note", "signer")
    }
    this["manifest_sha256"] = sha256(manifest).hexdigest()
    origin = {"sources": list(info.sources), "bundles": [*info.bundles, this]}
    return {
        "path": os.path.abspath(path),
        "format": "bundle",
        "columns": asdict(Columns()),
        "allow_outside": False,
        "bundle": origin,
    }


def _check_count(what: str, actual: int, expected: int) -> None:
    if actual != expected:
        raise InvalidInput(f"{what}: there are {actual}, {MANIFEST} says {expected}")


def _check_room(root: Path, info: BundleInfo, max_bytes: int | None) -> None:
    size = sum(file["bytes"] for file in info.files.values()) + info.image_bytes
    if max_bytes is not None and size > max_bytes:
        raise InvalidInput(f"the bundle unpacks to {size} bytes, {max_bytes} are allowed")
    size += info.files[VECTORS]["bytes"]  # the index holds them again
    free = shutil.disk_usage(root).free
    if size > free:
        raise InvalidInput(f"the bundle needs {size} bytes in {root}, {free} are free")


def _check_signature(archive: ArchiveReader, info: BundleInfo, manifest: bytes, demanded: str) -> None:
    if demanded and not info.signer:
        raise InvalidInput(
            "the bundle is not signed, and a signature is demanded: get a signed one, or import without a key"
        )
    if demanded and demanded != info.signer:
        raise InvalidInput(f"the bundle is signed by {info.signer}, the key demanded is {demanded}")
    if info.signer:
        check(manifest, archive.small(SIGNATURE, BYTES), info.signer)


@contextmanager
def opened(path: str | Path) -> Iterator[ArchiveReader]:
    """Open a bundle to read. Raises `NotFound`."""
    try:
        file = Path(path).open("rb")  # noqa: SIM115  closed below
    except OSError as error:
        raise NotFound(f"cannot read the bundle {path}: {error.strerror}") from error
    with file:
        yield ArchiveReader(file, str(path))


@contextmanager
def build_folder(root: Path) -> Iterator[Path]:
    """A hidden folder under a root, locked by this process; empty at first, and emptied at the end."""
    folder = root / IMPORTING
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(writer_lock(folder))
        except Busy:
            raise Busy(
                f"another import into {root} is under way: wait for it to end, then try again"
            ) from None
        stack.callback(_empty, folder)
        _empty(folder)
        yield folder


def _empty(folder: Path) -> None:
    for store in folder.iterdir():
        if store.is_dir():
            for database in store.glob("db-*"):
                forget(database)
            shutil.rmtree(store)
