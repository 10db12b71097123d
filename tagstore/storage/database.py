"""One generation of a store's database, opened to read: what does not depend on a version."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import Damaged, NotFound
from tagstore.storage.codec import decode_entry, unseal
from tagstore.storage.environments import identity_of, release
from tagstore.storage.file_length import check_open
from tagstore.storage.generations import generation
from tagstore.storage.tables import U64, open_tables
from tagstore.types import Entry

ENTRY_BATCH = 1024
"""Entries read in one transaction."""


class Database:
    """A generation of a store's database, current or not. Cheap to open; holds no transaction.

    Args:
        name: of the store.
        directory: of the store.
        generation: directory of the database.
        env: the LMDB environment in it.

    Raises `NotFound` if nothing was ever committed to it.
    """

    def __init__(self, name: str, directory: Path, generation: Path, env: Any) -> None:
        self.name, self.directory, self.generation, self.env = name, directory, generation, env
        self._identity = identity_of(generation)
        self.db = open_tables(self.env)
        self.state()  # raises if there is none

    @property
    def index_directory(self) -> Path:
        """Where the index files of this generation are."""
        return self.generation / "index"

    def state(self) -> dict[str, Any]:
        """The record that names the current version. Raises `NotFound` if nothing was ever committed."""
        with self.env.begin() as txn:
            data = txn.get(b"state", db=self.db["meta"])
        if data is None:
            raise NotFound(
                f"store '{self.name}' was created but nothing was ever committed to it: run `tagstore "
                "ingest` again"
            )
        return unseal(b"state", data)

    def is_current(self) -> bool:
        """Tell whether the store still has this database: a compaction or a restored copy replaces it."""
        try:
            return generation(self.directory) == self.generation and self.in_place()
        except NotFound:
            return False

    def in_place(self) -> bool:
        """Tell whether the file at this database's path is the open one: a restored copy is another file."""
        return identity_of(self.generation) == self._identity

    def check_length(self) -> None:
        """Raise `Damaged` if the file was cut off since it was opened: reading beyond its end is SIGBUS."""
        check_open(self.env, str(self.generation))

    def release(self) -> None:
        """Let go of the environment, whose files may be gone; it closes when its last reader lets go."""
        release(self.env)

    def last_transaction(self) -> int:
        """Number of the last transaction that was committed: it grows with every change of the database."""
        return int(self.env.info()["last_txnid"])

    def entries(self, ids: NDArray[np.int64]) -> Iterator[Entry]:
        """Entries of ids, of any version, in bounded memory. Raises `Damaged` if one is missing."""
        for start in range(0, len(ids), ENTRY_BATCH):
            batch = ids[start : start + ENTRY_BATCH].tolist()
            with self.env.begin(db=self.db["entries"]) as txn:
                records = [txn.get(U64.pack(i)) for i in batch]
            for i, record in zip(batch, records, strict=True):
                if record is None:
                    raise Damaged(f"store '{self.name}' has lost entry {i}")
                yield decode_entry(i, record)

    def all_entries(self) -> Iterator[Entry]:
        """Every entry that is stored, of any version or none, in bounded memory."""
        first = 0
        while True:
            with self.env.begin() as txn, txn.cursor(self.db["entries"]) as cursor:
                records = islice(cursor, ENTRY_BATCH) if cursor.set_range(U64.pack(first)) else ()
                batch = [(U64.unpack(key)[0], record) for key, record in records]
            if not batch:
                return
            yield from (decode_entry(i, record) for i, record in batch)
            first = batch[-1][0] + 1

    def takedowns(self) -> list[dict[str, Any]]:
        """The records of all takedowns, oldest first."""
        with self.env.begin() as txn, txn.cursor(self.db["takedowns"]) as cursor:
            return [unseal(key, value) for key, value in cursor]

    def within_records(self, needles: set[bytes]) -> set[bytes]:
        """Those of the byte strings that are part of an entry, of a tag or of the description of a source."""
        present: set[bytes] = set()
        for table in ("entries", "tags", "sources") if needles else ():
            with self.env.begin() as txn, txn.cursor(self.db[table]) as cursor:
                for _, value in cursor:
                    present |= {needle for needle in needles - present if needle in value}
        return present
