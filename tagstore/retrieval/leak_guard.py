"""The leak guard: which entries the queries of a request must not find.

A training query that finds its own image, or a copy of it, teaches a model to copy tags instead of weighing them. Keys and ids
are looked up once a request; hashes are compared with those in the records of the candidates, so that it costs nothing where it
is not asked for, and needs no table of hashes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import InvalidInput
from tagstore.indexing.protocol import Allowed
from tagstore.storage.codec import decode_hashes
from tagstore.storage.store import U64, Snapshot, key_of, unpack_ids
from tagstore.types import Exclude, Identity

MAX_EXCLUDED = 10_000
"""Keys and entry ids of one request."""
NOBODY = Exclude()


def check_exclude(exclude: Exclude, identities: Sequence[Identity], queries: int) -> None:
    """Raises `InvalidInput` for a guard that could not keep out what it is asked to."""
    if identities and len(identities) != queries:
        raise InvalidInput(
            f"{len(identities)} identities for {queries} queries: pass one for each, images first, or none"
        )
    if len(exclude.keys) + len(exclude.entry_ids) > MAX_EXCLUDED:
        raise InvalidInput(
            f"{len(exclude.keys) + len(exclude.entry_ids)} keys and entry ids to exclude: at most {MAX_EXCLUDED} in one request; "
            "what must never be found is better filtered by its metadata, or deleted"
        )
    if not -1 <= exclude.hash_distance <= 64:
        raise InvalidInput(
            f"exclude.hash_distance is {exclude.hash_distance}: 0 to 64 bits, or -1 to leave it out"
        )
    for i, identity in enumerate(identities):
        if len(identity.sha256) not in (0, 32):
            raise InvalidInput(
                f"the sha256 of query {i} has {len(identity.sha256)} bytes: pass all 32, or none"
            )
        if identity.perceptual_hash is not None and not 0 <= identity.perceptual_hash < 1 << 64:
            raise InvalidInput(
                f"the perceptual hash of query {i} is {identity.perceptual_hash}: it has 64 bits, unsigned"
            )


class Guard:
    """An `Exclude` made ready for the queries of one request.

    Raises `InvalidInput` where the identity of a query lacks what is to be compared: leaving it unguarded would be a silent leak.
    """

    def __init__(
        self,
        exclude: Exclude,
        identities: Sequence[Identity],
        queries: int,
        snapshot: Snapshot,
        live: Allowed,
    ) -> None:
        check_exclude(exclude, identities, queries)
        self._snapshot = snapshot
        self._bits = exclude.hash_distance
        own = identities or [Identity()] * queries
        for asked, name, there in (
            (exclude.key, "key", [bool(i.key) for i in own]),
            (exclude.sha256, "sha256", [bool(i.sha256) for i in own]),
            (exclude.hash_distance >= 0, "perceptual_hash", [i.perceptual_hash is not None for i in own]),
        ):
            if asked and not all(there):
                raise InvalidInput(
                    f"entries are to be excluded by {name}, but that of query {there.index(False)} is not known: give it in its identity"
                )
        known = _live_ids(snapshot, exclude.keys, live) + list(exclude.entry_ids)
        self.everywhere = np.unique(np.array([i for i in known if i >= 0], np.int64))
        self._own = (
            np.array(_live_ids(snapshot, [i.key for i in own], live), np.int64) if exclude.key else None
        )
        self._sha256 = (
            np.frombuffer(b"".join(i.sha256 for i in own), np.uint64).reshape(-1, 4)
            if exclude.sha256
            else None
        )
        self._perceptual = np.array([i.perceptual_hash for i in own], np.uint64) if self._bits >= 0 else None

    def kept(self, queries: NDArray[np.int64], found: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the candidates `[n, m]` of some queries (by their number in the request) may be found."""
        kept = ~np.isin(found, self.everywhere) if len(self.everywhere) else np.ones(found.shape, bool)
        if self._own is not None:
            kept &= found != self._own[queries][:, None]
        if self._sha256 is not None or self._perceptual is not None:
            unique, where = np.unique(found, return_inverse=True)
            where = where.reshape(found.shape)
            digests, hashes = _hashes(self._snapshot, unique.tolist())
            if self._sha256 is not None:
                kept &= (digests[where] != self._sha256[queries][:, None]).any(axis=-1)
            if self._perceptual is not None:
                kept &= np.bitwise_count(hashes[where] ^ self._perceptual[queries][:, None]) > self._bits
        return kept


def _live_ids(snapshot: Snapshot, keys: Iterable[str], live: Allowed) -> list[int]:
    """Id of the entry that has each key in this version, -1 where there is none."""
    with snapshot.store.env.begin() as txn:
        db = snapshot.store.db["keys"]
        had = [unpack_ids(txn.get(key_of(key), db=db) or b"") for key in keys]
    return [next((i for i in reversed(ids) if live.holds(np.array([i]))[0]), -1) for ids in had]


def _hashes(snapshot: Snapshot, entry_ids: Iterable[int]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """sha256 `[n, 4]` (the bytes, as they lie) and perceptual hash `[n]` of entries' images."""
    with snapshot.store.env.begin(buffers=True) as txn:
        db = snapshot.store.db["entries"]
        found = [decode_hashes(txn.get(U64.pack(i), db=db)) for i in entry_ids]
    digests = np.frombuffer(b"".join(digest for digest, _ in found), np.uint64).reshape(-1, 4)
    return digests, np.frombuffer(b"".join(perceptual for _, perceptual in found), ">u8").astype(np.uint64)
