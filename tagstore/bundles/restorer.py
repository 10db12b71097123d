"""The writer of an import: it takes records under the ids that they have, where `Writer` gives them new ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.bundles.archive import Member
from tagstore.bundles.manifest import BATCH, ENTRIES, TAGS, BundleInfo, check_rows
from tagstore.errors import InvalidInput
from tagstore.records import encode_tag
from tagstore.store import ROWS, U64, block_key, key_of, tag_key
from tagstore.types import KINDS, Entry
from tagstore.writer import Writer


class Restorer(Writer):
    """A writer that keeps the number and the ids that a bundle brings."""

    def __init__(self, root: Path, name: str, info: BundleInfo) -> None:
        super().__init__(root, name, info.fingerprint)
        self._bundle = info

    def __enter__(self) -> Restorer:
        super().__enter__()
        self.next_entry_id, self.next_tag_id = self._bundle.next_entry_id, self._bundle.next_tag_id
        self._live = np.zeros(self.next_entry_id, bool)
        self._counts = np.zeros(self.next_tag_id, np.int32)
        self._known = np.zeros(self.next_tag_id, bool)
        self._embedded = self.next_tag_id
        return self

    def _number(self) -> int:
        return self._bundle.version if self.parent is None else super()._number()

    @property
    def entry_ids(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.live)

    @property
    def tag_ids(self) -> NDArray[np.int64]:
        return np.flatnonzero(self._known)

    def put_tags(self, tags: list[dict[str, Any]]) -> None:
        """Write tags in ascending order of their ids."""
        with self.env.begin(write=True) as txn:
            for tag in tags:
                tag_id = U64.pack(tag["id"])
                if not txn.put(tag_key(KINDS.index(tag["kind"]), tag["canonical"]), tag_id, db=self.db["tag_ids"], overwrite=False):
                    raise InvalidInput(f"{TAGS}: tag {tag['id']}, {tag['kind']} '{tag['canonical'][:100]}', is there twice")
                txn.put(tag_id, encode_tag(tag["text"], tag["kind"], tag["canonical"]), db=self.db["tags"], append=True)
                self._known[tag["id"]] = True

    def put_entries(self, entries: list[tuple[Entry, bytes]]) -> None:
        """Write entries, each with its record, in ascending order of their ids."""
        with self.env.begin(write=True) as txn:
            for entry, record in entries:
                ids = [tag.tag_id for tag in entry.tags]
                if len(set(ids)) != len(ids) or not all(i < self.next_tag_id and self._known[i] for i in ids):
                    raise InvalidInput(f"{ENTRIES}: entry {entry.entry_id} carries a tag twice, or one that is not in {TAGS}")
                if not txn.put(key_of(entry.key), U64.pack(entry.entry_id), db=self.db["keys"], overwrite=False):
                    raise InvalidInput(f"{ENTRIES}: the key of entry {entry.entry_id}, '{entry.key[:100]}', is there twice")
                txn.put(U64.pack(entry.entry_id), record, db=self.db["entries"], append=True)
                self._live[entry.entry_id] = True
                self._count(ids, 1)

    def put_rows(self, db: str, ids: NDArray[np.int64], member: Member) -> None:
        """Write the rows of ascending ids as they come, a block at a time; rows that belong to no id are zero."""
        dimension = self.fingerprint.dimension
        blocks, starts = np.unique(ids // ROWS, return_index=True)
        edges = [*starts.tolist(), len(ids)]
        runs = list(zip(blocks.tolist(), edges[:-1], edges[1:], strict=True))
        for at in range(0, len(runs), BATCH // ROWS):
            with self.env.begin(write=True) as txn:
                for block, start, end in runs[at : at + BATCH // ROWS]:
                    rows = np.frombuffer(member.read((end - start) * dimension * 2), "<f2").reshape(-1, dimension)
                    check_rows(rows, ids[start:end], self.fingerprint, member.name)
                    offsets = ids[start:end] % ROWS
                    whole = np.zeros((int(offsets[-1]) + 1, dimension), np.float16)
                    whole[offsets] = rows
                    txn.put(block_key(self.space, block), whole.tobytes(), db=self.db[db])
