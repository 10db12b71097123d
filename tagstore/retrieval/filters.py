"""Filters by metadata: which entries of a version have the values that a request asks for, as bits.

Metadata stands in the entries' records, so the first request of a filter reads all of them, once. Records
that cannot fit are told by a search for the value's bytes; only the others are decoded. The bits are kept for
the next request, 1/8 byte an entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from tagstore.errors import InvalidInput
from tagstore.metadata_filter import filter_texts
from tagstore.storage.rows import Allowed
from tagstore.storage.store import Snapshot

FILTER_BYTES = 64 << 20
"""Bits of filters kept for a version: 512 filters of a million entries."""
MAX_FIELDS = 32


class Filters:
    """The filters of one version. Safe for threads."""

    def __init__(self, snapshot: Snapshot, live: Allowed) -> None:
        self._snapshot, self._live = snapshot, live
        self._kept: LRUCache[tuple[tuple[str, str], ...], Allowed] = LRUCache(
            max(FILTER_BYTES, len(live.bits)), getsizeof=lambda allowed: len(allowed.bits)
        )
        self._lock = Lock()

    def find(self, where: Mapping[str, str]) -> Allowed:
        """The entries whose metadata has all these values. Raises `InvalidInput` for more than `MAX_FIELDS`
        of them."""
        if len(where) > MAX_FIELDS:
            raise InvalidInput(f"where names {len(where)} fields: at most {MAX_FIELDS}")
        where = filter_texts(where)
        key = tuple(sorted(where.items()))
        with self._lock:
            found = self._kept.get(key)
        if found is None:
            found = Allowed.of(self._read(where))
            with self._lock:
                self._kept[key] = found
        return found

    def _read(self, where: Mapping[str, str]) -> NDArray[np.uint8]:
        matching = np.zeros(8 * len(self._live.bits), bool)
        matching[self._snapshot.with_metadata(self._live.ids(), where)] = True
        return np.packbits(matching, bitorder="little")
