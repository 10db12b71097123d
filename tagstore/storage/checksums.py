"""Checksums over what a version consists of: taken at its commit, compared by `verify`."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import Damaged
from tagstore.storage.lmdb_files import trim
from tagstore.storage.store import ROWS, U64, Range, Snapshot, Store, Version, block_key

MERGE = 2
"""A range is merged with what follows it unless it is more than this many times as long."""


def ranges_of(
    store: Store,
    parent: Version | None,
    space: int,
    next_entry_id: int,
    next_tag_id: int,
    embedded: int,
    dimension: int,
    live: NDArray[np.uint8],
    counts: NDArray[np.int32],
) -> dict[str, list[Range]]:
    """The parent's checksums and those of what came since, of a version that is about to be committed.

    `embedded` is how many tags have an embedding in this space: after a rollback to another encoder fewer than there are, and the rows of
    the rest will only be written by a later ingest.
    """
    old = parent.ranges if parent else {}
    same_space = parent is not None and parent.space == space
    found: dict[str, list[Range]] = {}
    ends = {"entries": next_entry_id, "vectors": next_entry_id, "tags": next_tag_id, "embeddings": embedded}
    for name, end in ends.items():
        ranges = list(old.get(name, [])) if same_space or name in ("entries", "tags") else []
        first = ranges[-1].end if ranges else 0
        if first < end:
            # as a binary counter carries, so that a version's record stays short however many commits there were
            while ranges and ranges[-1].end - ranges[-1].first <= MERGE * (end - first):
                last = ranges.pop()
                if checksum(store, name, space, last.first, last.end, dimension) != last.sha256:
                    raise Damaged(
                        f"{name} {last.first} to {last.end - 1} of store '{store.name}' are not what was committed: nothing is built on "
                        "them. Run `tagstore verify`, restore the store from a copy"
                    )
                first = last.first
            ranges.append(Range(first, end, checksum(store, name, space, first, end, dimension)))
        found[name] = ranges
    found["live"] = [Range(0, next_entry_id, sha256(live.tobytes()).hexdigest())]
    found["counts"] = [Range(0, next_tag_id, sha256(counts.tobytes()).hexdigest())]
    return found


def broken(snapshot: Snapshot, seen: set[object]) -> Iterator[tuple[str, Range]]:
    """The parts of a version that are not what was committed. `seen` holds the ranges that were looked at before: versions share them."""
    version = snapshot.version
    for name, ranges in version.ranges.items():
        for r in ranges:
            if name in ("live", "counts"):
                found = sha256(snapshot.array(name, np.uint8).tobytes()).hexdigest()
            elif (mark := (name, version.space if name in ("vectors", "embeddings") else None, r)) in seen:
                continue
            else:
                seen.add(mark)
                found = checksum(snapshot.store, name, version.space, r.first, r.end, snapshot.dimension)
            if found != r.sha256:
                yield name, r


def checksum(store: Store, name: str, space: int, first: int, end: int, dimension: int) -> str:
    """sha256 over the records of a range, as they stand: id and bytes of entries and tags, rows of vectors and embeddings."""
    digest = sha256()
    with store.env.begin(buffers=True) as txn, txn.cursor(store.db[name]) as cursor:
        if name in ("entries", "tags"):
            found = cursor.set_range(U64.pack(first))
            for n, (key, value) in enumerate(cursor if found else ()):
                if U64.unpack(key)[0] >= end:
                    break
                digest.update(key)
                digest.update(value)
                if n % 65536 == 0:
                    trim(store.env)
        else:
            width = dimension * 2
            for block in range(first // ROWS, -(-end // ROWS)):
                data = txn.get(block_key(space, block), db=store.db[name]) or b""
                start, stop = max(0, first - block * ROWS), min(ROWS, end - block * ROWS)
                # rows that this space never had read as zeros, as they will when a later row of the block is written
                digest.update(bytes(data[start * width : stop * width]).ljust((stop - start) * width, b"\0"))
                if block % 256 == 0:
                    trim(store.env)
    return digest.hexdigest()
