"""What stands behind the last version: drafts on their way in, how far their ingest got, and what an interrupted one left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tagstore.mining import MergedTag
from tagstore.storage.codec import decode_entry, decode_tag
from tagstore.storage.store import SPACE, U64, Store, key_of, tag_key, unpack_ids
from tagstore.types import KINDS

Sync = Literal["full", "batch"]
"""When appends reach the disk: `full`, each before it returns; `batch`, all of them at the commit. A commit is durable either way."""


@dataclass(frozen=True, slots=True)
class Draft:
    """An entry that has no id yet."""

    key: str
    sha256: bytes
    perceptual_hash: int
    captions: tuple[str, ...]
    tags: tuple[MergedTag, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


@dataclass(slots=True)
class Progress:
    """How far an unfinished ingest got: written with every append, read by the ingest that takes it up again."""

    identity: str
    """What makes two ingests the same: source, miner, encoder, options."""
    pairs: int = 0
    """Consumed from the source, in its order."""
    digest: str = ""
    """Running sha256 over them."""
    added: int = 0
    unchanged: int = 0
    rejected: int = 0
    next_entry_id: int = 0
    next_tag_id: int = 0


def sweep_staged(
    store: Store,
    keep: Progress | None,
    next_entry_id: int,
    next_tag_id: int,
    next_page: int,
    next_space: int,
    number: int,
) -> None:
    """Remove what was appended behind the last version, all of it or what lies beyond the progress to keep, and index files of no version.

    Args:
        next_entry_id, next_tag_id, next_page, next_space: where the last version ends.
        number: of the version that comes next.
    """
    db = store.db
    first_entry = keep.next_entry_id if keep else next_entry_id
    first_tag = keep.next_tag_id if keep else next_tag_id
    with store.env.begin(write=True) as txn:
        for entry_id, data in _beyond(txn, db["entries"], first_entry):
            key = key_of(decode_entry(entry_id, data).key)
            kept = b"".join(
                U64.pack(i) for i in unpack_ids(txn.get(key, db=db["keys"]) or b"") if i < first_entry
            )
            if kept:
                txn.put(key, kept, db=db["keys"])
            else:
                txn.delete(key, db=db["keys"])
            txn.delete(U64.pack(entry_id), db=db["entries"])
        for tag_id, data in _beyond(txn, db["tags"], first_tag):
            _, kind, canonical = decode_tag(data)
            txn.delete(tag_key(KINDS.index(kind), canonical), db=db["tag_ids"])
            txn.delete(U64.pack(tag_id), db=db["tags"])
        for page_id, _ in _beyond(txn, db["pages"], next_page):
            txn.delete(U64.pack(page_id), db=db["pages"])
        with txn.cursor(db["quarantine"]) as cursor:
            if cursor.set_range(U64.pack(number) + U64.pack(keep.rejected if keep else 0)):
                while cursor.delete():
                    pass
        if not keep:
            txn.delete(b"ingest", db=db["meta"])
            for name in (
                "vectors",
                "embeddings",
            ):  # of a reembedding that was cut off: the next one may have another dimension
                for block, _ in _beyond(txn, db[name], next_space << SPACE):
                    txn.delete(U64.pack(block), db=db[name])
    for path in store.index_directory.glob("*"):
        # by the number of the version that a file was made for: to read what all versions name would take longer with every commit
        made_for = path.name.partition("-")[0]
        if path.suffix == ".tmp" or not made_for.isdigit() or int(made_for) >= number:
            path.unlink()


def _beyond(txn: Any, db: Any, first: int) -> Iterator[tuple[int, bytes]]:
    """Records from an id on, each looked up anew, so that they can be deleted on the way."""
    with txn.cursor(db) as cursor:
        while cursor.set_range(U64.pack(first)):
            key, value = cursor.item()
            yield U64.unpack(key)[0], value
