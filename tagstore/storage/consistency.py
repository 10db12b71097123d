"""Checks that the tables of a store agree with each other, and rebuilding of its lookup tables."""

from __future__ import annotations

from collections.abc import Iterator

from lmdb.verify import VerifyError
from lmdb.verify import verify as verify_pages

from tagstore.errors import Damaged
from tagstore.storage.codec import decode_hot, decode_tag, unseal
from tagstore.storage.database import Database
from tagstore.storage.tables import U64, TableWriter, key_of, tag_key, unpack_ids
from tagstore.storage.writer import Writer


def page_faults(store: Database) -> list[str]:
    """Check LMDB's own pages: structure, order of keys, and that every page is either in use or free."""
    database = str(store.generation / "data.mdb")
    with store.env.begin():  # while this reads, no writer reuses the pages that are walked
        try:
            # a second look: a commit between its reads of the file's end and of its head would mislead it
            return list(verify_pages(database) and verify_pages(database))
        except VerifyError as error:
            return [str(error)]


def lookup_faults(store: Database) -> Iterator[str]:
    """Check that the tables of keys and tags lead to every entry and tag, and to nothing else."""
    with store.env.begin() as txn:
        entries = 0
        with txn.cursor(store.db["entries"]) as cursor:
            for entry_id, record in cursor:
                entries += 1
                number, (key, _) = U64.unpack(entry_id)[0], decode_hot(record)
                if number not in unpack_ids(txn.get(key_of(key), db=store.db["keys"])):
                    yield f"the table of keys does not lead to entry {number} ({key})"
                    return
        with txn.cursor(store.db["keys"]) as cursor:
            reached = sum(len(ids) // U64.size for _, ids in cursor)
        if reached != entries:
            yield f"the table of keys leads to {reached} entries, there are {entries}"
        with txn.cursor(store.db["tags"]) as cursor:
            for tag_id, record in cursor:
                _, kind, canonical = decode_tag(record)
                if txn.get(tag_key(kind, canonical), db=store.db["tag_ids"]) != tag_id:
                    yield f"the table of tags does not lead to tag {U64.unpack(tag_id)[0]}"
                    return
        if txn.stat(store.db["tags"])["entries"] != txn.stat(store.db["tag_ids"])["entries"]:
            yield "the table of tags leads to tags that are not there"


def json_faults(store: Database) -> Iterator[str]:
    """Check the records that are JSON against their checksums."""
    with store.env.begin() as txn:
        for name in ("quarantine", "sources", "takedowns", "meta"):
            with txn.cursor(store.db[name]) as cursor:
                for key, value in cursor:
                    try:
                        unseal(key, value)
                    except Damaged as error:
                        yield f"{name}: {error}"


def rebuild_lookups(writer: Writer) -> None:
    """Build the tables of keys and of tags again from the records."""
    db = writer.db
    tables = TableWriter(db)
    with writer.transaction() as txn:
        for name in ("keys", "tag_ids"):
            txn.drop(db[name], delete=False)
        with txn.cursor(db["entries"]) as cursor:
            for entry_id, record in cursor:
                tables.put_key(txn, U64.unpack(entry_id)[0], decode_hot(record)[0])
        with txn.cursor(db["tags"]) as cursor:
            for tag_id, record in cursor:
                tables.put_tag_id(txn, U64.unpack(tag_id)[0], record)
