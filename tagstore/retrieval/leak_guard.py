"""The leak guard: which entries the queries of a request must not find.

A training query that finds its own image, or a copy of it, teaches a model to copy tags instead of weighing
them. Keys and ids are looked up once a request. Hashes are compared with those in the records of the
candidates: that costs nothing where it is not asked for, and needs no table of hashes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import InvalidInput
from tagstore.storage.rows import Allowed
from tagstore.storage.store import Snapshot
from tagstore.types import Exclude, Identity


class Guard:
    """An `Exclude` made ready for the queries of one request.

    Raises `InvalidInput` where the identity of a query lacks what is to be compared: to leave it unguarded
    would be a silent leak."""

    def __init__(
        self,
        exclude: Exclude,
        identities: Sequence[Identity],
        queries: int,
        snapshot: Snapshot,
        live: Allowed,
    ) -> None:
        self._snapshot = snapshot
        identities = identities or [Identity()] * queries
        self._check_known(exclude, identities)
        excluded = _live_ids(snapshot, exclude.keys, live) + list(exclude.entry_ids)
        self._excluded = np.unique(np.array([i for i in excluded if i >= 0], np.int64))
        self._own_ids = self._digests = self._hashes = None
        if exclude.key:
            self._own_ids = np.array(_live_ids(snapshot, [i.key for i in identities], live), np.int64)
        if exclude.sha256:
            self._digests = np.frombuffer(b"".join(i.sha256 for i in identities), np.uint64).reshape(-1, 4)
        self._distance = exclude.hash_distance
        if self._distance >= 0:
            self._hashes = np.array([i.perceptual_hash for i in identities], np.uint64)

    @staticmethod
    def _check_known(exclude: Exclude, identities: Sequence[Identity]) -> None:
        for compared, name, known in (
            (exclude.key, "key", [bool(i.key) for i in identities]),
            (exclude.sha256, "sha256", [bool(i.sha256) for i in identities]),
            (
                exclude.hash_distance >= 0,
                "perceptual_hash",
                [i.perceptual_hash is not None for i in identities],
            ),
        ):
            if compared and not all(known):
                raise InvalidInput(
                    f"entries are to be excluded by {name}, but that of query {known.index(False)} "
                    "is not known: give it in its identity"
                )

    def allows(self, queries: NDArray[np.int64], candidates: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which of the candidates `[n, m]` of n queries, given by position in the request, may be
        neighbours."""
        allowed = np.ones(candidates.shape, bool)
        if len(self._excluded):
            allowed = ~np.isin(candidates, self._excluded)
        if self._own_ids is not None:
            allowed &= candidates != self._own_ids[queries][:, None]
        if self._digests is not None or self._hashes is not None:
            entry_ids, places = np.unique(candidates, return_inverse=True)
            places = places.reshape(candidates.shape)
            digests, hashes = self._snapshot.hashes(entry_ids.tolist())
            if self._digests is not None:
                allowed &= (digests[places] != self._digests[queries][:, None]).any(axis=-1)
            if self._hashes is not None:
                differing = np.bitwise_count(hashes[places] ^ self._hashes[queries][:, None])
                allowed &= differing > self._distance
        return allowed


def _live_ids(snapshot: Snapshot, keys: Iterable[str], live: Allowed) -> list[int]:
    """Return the id of the entry that has each key in this version, -1 where there is none."""
    return [
        next((i for i in reversed(ids) if live.holds(np.array([i]))[0]), -1)
        for ids in snapshot.ids_of_keys(keys)
    ]
