"""The writer of an import: it takes records under the ids that they have, where `Writer` gives them new ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.bundles.archive import Member
from tagstore.bundles.manifest import BATCH, ENTRIES, TAGS, BundleInfo, check_rows
from tagstore.errors import InvalidInput
from tagstore.storage.codec import decode_entry
from tagstore.storage.store import U64
from tagstore.storage.writer import Writer
from tagstore.types import Entry


class Restorer(Writer):
    """A writer that keeps the number and the ids that a bundle brings."""

    def __init__(self, root: Path, name: str, info: BundleInfo) -> None:
        super().__init__(root, name, info.fingerprint, sync="batch")
        self._bundle = info

    def __enter__(self) -> Restorer:
        super().__enter__()
        self.start_at(self._bundle.version, self._bundle.next_entry_id, self._bundle.next_tag_id)
        self._known = np.zeros(self.next_tag_id, bool)
        return self

    @property
    def entry_ids(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.live)

    @property
    def tag_ids(self) -> NDArray[np.int64]:
        return np.flatnonzero(self._known)

    def put_tags(self, tags: list[dict[str, Any]]) -> None:
        """Write tags in ascending order of their ids."""
        with self.transaction() as txn:
            for tag in tags:
                if not self._put_tag(txn, tag["id"], tag["text"], tag["kind"], tag["canonical"]):
                    raise InvalidInput(
                        f"{TAGS}: tag {tag['id']}, {tag['kind']} '{tag['canonical'][:100]}', is there twice"
                    )
                self._known[tag["id"]] = True

    def put_entries(self, entries: list[tuple[Entry, bytes]]) -> None:
        """Write entries, each with its record, in ascending order of their ids."""
        with self.transaction() as txn:
            for entry, record in entries:
                ids = [tag.tag_id for tag in entry.tags]
                if len(set(ids)) != len(ids) or not all(i < self.next_tag_id and self._known[i] for i in ids):
                    raise InvalidInput(
                        f"{ENTRIES}: entry {entry.entry_id} carries a tag twice, or one that is not in {TAGS}"
                    )
                if self._live_id(txn, entry.key) is not None:
                    raise InvalidInput(
                        f"{ENTRIES}: the key of entry {entry.entry_id}, '{entry.key[:100]}', is there twice"
                    )
                self._put_entry(txn, entry, record)

    def entries(self) -> Iterator[Entry]:
        """What was put, ids ascending."""
        ids = self.entry_ids
        for start in range(0, len(ids), BATCH):
            with self.env.begin() as txn:
                found = [
                    (i, txn.get(U64.pack(i), db=self.db["entries"]))
                    for i in ids[start : start + BATCH].tolist()
                ]
            yield from (decode_entry(i, data) for i, data in found)

    def put_rows(self, db: str, ids: NDArray[np.int64], member: Member) -> None:
        """Write the rows of ascending ids as they come; rows that belong to no id are zero."""
        dimension = self.fingerprint.dimension
        for start in range(0, len(ids), BATCH):
            some = ids[start : start + BATCH]
            rows = np.frombuffer(member.read(len(some) * dimension * 2), "<f2").reshape(-1, dimension)
            check_rows(rows, some, self.fingerprint, member.name)
            with self.transaction() as txn:
                self._put_rows(txn, db, some, rows)
