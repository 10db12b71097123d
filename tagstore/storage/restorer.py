"""The writer of an import: it keeps the ids that records bring, where `Writer` gives new ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import InvalidInput
from tagstore.storage.codec import encode_entry, encode_tag
from tagstore.storage.environments import forget
from tagstore.storage.rows import put_rows
from tagstore.storage.writer import Writer
from tagstore.types import Entry, Fingerprint, Kind


class Restorer(Writer):
    """A writer of a new store whose first version has a given number, over ids that were given elsewhere.

    Args:
        number: of the version that the commit makes.
        next_entry_id, next_tag_id: where its ids end.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        fingerprint: Fingerprint,
        number: int,
        next_entry_id: int,
        next_tag_id: int,
    ) -> None:
        super().__init__(root, name, fingerprint, sync="batch")
        self._first_number = number
        self._ends = next_entry_id, next_tag_id

    def __enter__(self) -> Restorer:
        super().__enter__()
        self.next_entry_id, self.next_tag_id = self._ends
        self._live, self._known = np.zeros(self.next_entry_id, bool), np.zeros(self.next_tag_id, bool)
        self._counts = np.zeros(self.next_tag_id, np.int32)
        self._embedded = self.next_tag_id
        return self

    @property
    def entry_ids(self) -> NDArray[np.int64]:
        """Ids of the entries that were written, ascending."""
        return np.flatnonzero(self.live)

    @property
    def tag_ids(self) -> NDArray[np.int64]:
        """Ids of the tags that were written, ascending."""
        return np.flatnonzero(self._known)

    def put_tags(self, tags: Iterable[tuple[int, str, Kind, str]]) -> None:
        """Write tags, each (id, text, kind, canonical form), ids ascending.

        Raises `InvalidInput` for a duplicate.
        """
        with self.transaction() as txn:
            for tag_id, text, kind, canonical in tags:
                if not self._tables.put_tag(txn, tag_id, encode_tag(text, kind, canonical)):
                    raise InvalidInput(f"tag {tag_id}, {kind} '{canonical[:100]}', is there twice")
                self._known[tag_id] = True

    def put_entries(self, entries: Iterable[Entry]) -> None:
        """Write entries, ids ascending.

        Raises `InvalidInput` for a duplicate key or tag, or an unknown tag.
        """
        with self.transaction() as txn:
            for entry in entries:
                ids = [tag.tag_id for tag in entry.tags]
                if len(set(ids)) != len(ids) or not all(i < self.next_tag_id and self._known[i] for i in ids):
                    raise InvalidInput(
                        f"entry {entry.entry_id} carries a tag twice, or one that is not in the vocabulary"
                    )
                if self._live_id(txn, entry.key) is not None:
                    raise InvalidInput(
                        f"the key of entry {entry.entry_id}, '{entry.key[:100]}', is there twice"
                    )
                self._tables.put_entry(txn, entry.entry_id, encode_entry(entry), entry.key)
                self._count_in(entry)

    def put_rows(self, table: str, ids: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Write the rows `[n, D]` of ids of "vectors" or "embeddings", ids ascending."""
        with self.transaction() as txn:
            put_rows(txn, self.db[table], self.space, ids, rows)

    def entries(self) -> Iterator[Entry]:
        """The entries that were written, ids ascending."""
        return self.store.entries(self.entry_ids)

    def close(self) -> None:
        """Close the database after the context: LMDB must not hold a file whose directory will move."""
        forget(self.store.generation)
        self.env.close()
