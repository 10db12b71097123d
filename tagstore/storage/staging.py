"""What is appended behind the last version: drafts, an ingest's progress, and sweeping of leftovers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tagstore.mining import MergedTag
from tagstore.storage.database import Database
from tagstore.storage.rows import SPACE_SHIFT
from tagstore.storage.tables import U64, TableWriter, records_from
from tagstore.types import Entry, EntryTag

Sync = Literal["full", "batch"]
"""When appends reach the disk: `full`, each before it returns; `batch`, all of them at the commit.

A commit is durable either way.
"""


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

    def entry(self, entry_id: int, tags: tuple[EntryTag, ...]) -> Entry:
        """The entry that the draft becomes under an id, with tags of the vocabulary."""
        return Entry(
            entry_id,
            self.key,
            self.sha256,
            self.perceptual_hash,
            self.captions,
            tags,
            self.metadata,
            self.origin,
        )


@dataclass(slots=True)
class Progress:
    """How far an unfinished ingest got: written with every append, read by the ingest that resumes it."""

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
    store: Database, tables: TableWriter, keep: Progress | None, state: Mapping[str, Any], number: int
) -> None:
    """Remove what was appended behind the last version, and index files of no version.

    Args:
        keep: progress of an ingest to resume: only what lies beyond it is removed.
        state: state of the store, which tells where the last version ends.
        number: of the version that comes next.
    """
    db = store.db
    first_entry = keep.next_entry_id if keep else state["next_entry_id"]
    first_tag = keep.next_tag_id if keep else state["next_tag_id"]
    with store.env.begin(write=True) as txn:
        for entry_id, record in records_from(txn, db["entries"], first_entry):
            tables.delete_entry(txn, entry_id, record)
        for tag_id, record in records_from(txn, db["tags"], first_tag):
            tables.delete_tag(txn, tag_id, record)
        for page_id, _ in records_from(txn, db["pages"], tables.next_page):
            txn.delete(U64.pack(page_id), db=db["pages"])
        with txn.cursor(db["quarantine"]) as cursor:
            if cursor.set_range(U64.pack(number) + U64.pack(keep.rejected if keep else 0)):
                while cursor.delete():
                    pass
        if not keep:
            txn.delete(b"ingest", db=db["meta"])
            # of a reembedding that was cut off: the next one may have another dimension
            next_space = max(tables.spaces, default=-1) + 1
            for name in ("vectors", "embeddings"):
                for block, _ in records_from(txn, db[name], next_space << SPACE_SHIFT):
                    txn.delete(U64.pack(block), db=db[name])
    for path in store.index_directory.glob("*"):
        # judged by the number of the version a file was made for: reading the records of all versions would
        # take longer with every commit
        made_for = path.name.partition("-")[0]
        if path.suffix == ".tmp" or not made_for.isdigit() or int(made_for) >= number:
            path.unlink()
