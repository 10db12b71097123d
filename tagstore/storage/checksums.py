"""Checksums over the parts of a version: taken at its commit, compared by `verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import Damaged
from tagstore.storage.database import Database
from tagstore.storage.environments import trim
from tagstore.storage.rows import BLOCK_ROWS, blocks_there, read_block
from tagstore.storage.snapshot import Snapshot
from tagstore.storage.tables import U64
from tagstore.storage.version import Range, Version

MERGE_SIZE_RATIO = 2
"""A range is merged with what follows it unless it is more than this many times as long."""
IDS_AT_ONCE = 64 * BLOCK_ROWS
"""Records read in one transaction: a long one keeps freed pages of the database from being used again."""
FILE_PIECE = 1 << 20
"""Bytes of a file that are read at once."""
ARRAYS = ("live", "counts")
"""What one checksum covers as a whole."""


def ranges_of(
    store: Database,
    parent: Version | None,
    version: Version,
    arrays: Mapping[str, NDArray[Any]],
    embedded: int,
) -> dict[str, list[Range]]:
    """The checksums of a version that is about to be committed: its parent's, and those of what came since.

    Args:
        arrays: of the version, as they are stored.
        embedded: how many tags have an embedding in its space. After a rollback to another encoder these are
            not all; a later ingest writes the rest.
    """
    known = parent.ranges if parent else {}
    same_space = parent is not None and parent.space == version.space
    result: dict[str, list[Range]] = {}
    ends = {
        "entries": version.next_entry_id,
        "vectors": version.next_entry_id,
        "tags": version.next_tag_id,
        "embeddings": embedded,
    }
    for name, end in ends.items():
        ranges = list(known.get(name, [])) if same_space or name in ("entries", "tags") else []
        for first, stop in _spans(store, name, version, ranges[-1].end if ranges else 0, end):
            # like the carry of a binary counter, which keeps the record of a version short
            while (
                ranges
                and ranges[-1].end == first
                and ranges[-1].end - ranges[-1].first <= MERGE_SIZE_RATIO * (stop - first)
            ):
                last = ranges.pop()
                if _checksum(store, name, version, last.first, last.end) != last.sha256:
                    raise Damaged(
                        f"{name} {last.first} to {last.end - 1} of store '{store.name}' are not what was "
                        "committed: nothing is built on them. Run `tagstore verify`, restore the store from "
                        "a copy"
                    )
                first = last.first
            ranges.append(Range(first, stop, _checksum(store, name, version, first, stop)))
        result[name] = ranges
    for name, array in arrays.items():
        end = version.next_entry_id if name == "live" else version.next_tag_id
        result[name] = [Range(0, end, sha256(array.tobytes()).hexdigest())]
    return result


def broken(snapshot: Snapshot, seen: set[object]) -> Iterator[tuple[str, Range]]:
    """The parts of a version that are not what was committed.

    `seen` holds the ranges that were compared before, since versions share them.
    """
    for name, span in unseen(snapshot.version, seen):
        if not is_committed(snapshot, name, span):
            yield name, span


def unseen(version: Version, seen: set[object]) -> Iterator[tuple[str, Range]]:
    """Yield the parts of a version that have a checksum, except those in `seen`, and add them to it."""
    for name, ranges in version.ranges.items():
        for span in ranges:
            if name not in ARRAYS:
                mark = (name, version.space if name in ("vectors", "embeddings") else None, span)
                if mark in seen:
                    continue
                seen.add(mark)
            yield name, span


def is_committed(
    snapshot: Snapshot, name: str, span: Range, read: Callable[[int], None] = lambda size: None
) -> bool:
    """Compare a part of a version with its checksum.

    Args: read: called with the number of bytes of each piece that was read.
    """
    if name in ARRAYS:
        data = snapshot.array(name, np.uint8).tobytes()
        read(len(data))
        return sha256(data).hexdigest() == span.sha256
    return _checksum(snapshot.store, name, snapshot.version, span.first, span.end, read) == span.sha256


def file_fault(
    path: Path, about: Mapping[str, Any], read: Callable[[int], None] = lambda size: None
) -> str | None:
    """Return what is wrong with a file of an index, None if nothing is; `read` as for `is_committed`."""
    digest = sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(FILE_PIECE):
                digest.update(piece)
                read(len(piece))
            length = file.tell()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if length != about["bytes"]:
        return f"is {length} bytes long instead of {about['bytes']}"
    return None if digest.hexdigest() == about["sha256"] else "does not fit its checksum"


def check_sound(snapshot: Snapshot, seen: set[object], advice: str) -> None:
    """Raises `Damaged` with an advice unless a version is what was committed; `seen` as for `broken`."""
    for name, span in broken(snapshot, seen):
        raise Damaged(
            f"{name} {span.first} to {span.end - 1} of store '{snapshot.store.name}' are not what version "
            f"{snapshot.version.number} committed: {advice}"
        )


def _spans(store: Database, name: str, version: Version, first: int, end: int) -> list[tuple[int, int]]:
    """The parts of a range that have a checksum: all of it, but for rows only where blocks of them are there.

    Ids without rows, which an import or a compaction leaves, take no time however many they are.
    """
    if name in ("entries", "tags"):
        return [(first, end)] if first < end else []
    spans: list[tuple[int, int]] = []
    for block in blocks_there(store.env, store.db[name], version.space, first // BLOCK_ROWS, end):
        start, stop = max(first, block * BLOCK_ROWS), min(end, (block + 1) * BLOCK_ROWS)
        if spans and spans[-1][1] == start:
            spans[-1] = spans[-1][0], stop
        else:
            spans.append((start, stop))
    return spans


def _checksum(
    store: Database,
    name: str,
    version: Version,
    first: int,
    end: int,
    read: Callable[[int], None] = lambda size: None,
) -> str:
    """sha256 of a range: of ids and records for entries and tags, of rows for vectors and embeddings."""
    digest = sha256()
    while first < end:
        stop = min(end, (first // IDS_AT_ONCE + 1) * IDS_AT_ONCE)
        with store.env.begin(buffers=True) as txn:
            if name in ("entries", "tags"):
                size = _add_records(digest, txn, store.db[name], first, stop)
            else:
                size = _add_rows(digest, txn, store.db[name], version, first, stop)
        trim(store.env)
        read(size)
        first = stop
    return digest.hexdigest()


def _add_records(digest: Any, txn: Any, table: Any, first: int, end: int) -> int:
    """Add records to a digest; returns their bytes."""
    size = 0
    with txn.cursor(table) as cursor:
        for key, value in cursor if cursor.set_range(U64.pack(first)) else ():
            if U64.unpack(key)[0] >= end:
                break
            digest.update(key)
            digest.update(value)
            size += len(key) + len(value)
    return size


def _add_rows(digest: Any, txn: Any, table: Any, version: Version, first: int, end: int) -> int:
    """Add rows to a digest; returns their bytes."""
    width = version.fingerprint.dimension * 2
    for block in range(first // BLOCK_ROWS, -(-end // BLOCK_ROWS)):
        base = block * BLOCK_ROWS
        start, stop = max(0, first - base), min(BLOCK_ROWS, end - base)
        rows = read_block(txn, table, version.space, block, width // 2)[start:stop]
        # a row that was never written becomes zeros when a later row of its block is written
        digest.update(rows.tobytes().ljust((stop - start) * width, b"\0"))
    return (end - first) * width
