"""Rows of float16 in blocks: the image vectors of entries and the text embeddings of tags.

A block holds the rows of 255 consecutive ids in one space, which is one encoder's vectors. Rows that were
never written read as zeros if a later row of their block was, else they are missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.errors import Damaged
from tagstore.storage.tables import U64
from tagstore.types import Vectors

BLOCK_ROWS = 255
"""Rows of a block: with LMDB's header of 16 bytes they still fit the whole pages that 256 rows would fill."""
SPACE_SHIFT = 48
"""Bits of a block's number in its key, below those of its space."""
ROW_FETCH_LIMIT = 1 << 14
"""Rows up to which they are read one by one; more, or those of consecutive ids, are read by block."""


def block_key(space: int, block: int) -> bytes:
    """The key of a block."""
    return U64.pack(space << SPACE_SHIFT | block)


def read_block(txn: Any, table: Any, space: int, block: int, dimension: int) -> NDArray[np.float16]:
    """The rows that a block holds, `[n, D]` with n up to 255."""
    return np.frombuffer(txn.get(block_key(space, block), db=table) or b"", np.float16).reshape(-1, dimension)


def blocks_there(env: Any, table: Any, space: int, first: int, end_row: int) -> Iterator[int]:
    """Numbers of the blocks of a space that are there, from block `first` on, up to the row `end_row`."""
    with env.begin() as txn, txn.cursor(table) as cursor:
        if cursor.set_range(block_key(space, first)):
            for key in cursor.iternext(values=False):
                block = U64.unpack(key)[0] - (space << SPACE_SHIFT)
                if block * BLOCK_ROWS >= end_row:
                    return
                yield block


def put_rows(
    txn: Any, table: Any, space: int, ids: NDArray[np.int64], rows: NDArray[Any], *, keep_tail: bool = False
) -> None:
    """Write the rows `[n, D]` of ids; what a block holds behind the last of them goes, unless `keep_tail`."""
    dimension = rows.shape[1]
    blocks, offsets = np.divmod(ids, BLOCK_ROWS)
    for block in np.unique(blocks).tolist():
        here = blocks == block
        old = read_block(txn, table, space, block, dimension)
        count = max(int(offsets[here].max()) + 1, len(old) if keep_tail else 0)
        new = np.zeros((count, dimension), np.float16)
        new[: len(old)] = old[:count]
        new[offsets[here]] = rows[here]
        txn.put(block_key(space, block), new.tobytes(), db=table)


@dataclass(frozen=True, slots=True)
class Allowed:
    """A set of entry ids, as bits: bit i (little endian in its byte) for entry i."""

    bits: NDArray[np.uint8]
    count: int

    @classmethod
    def of(cls, bits: NDArray[np.uint8]) -> Allowed:
        """Make the set of the ids whose bit is set."""
        return cls(bits, int(np.bitwise_count(bits).sum(dtype=np.int64)))

    def ids(self) -> NDArray[np.int64]:
        """Return the members, ascending."""
        return np.flatnonzero(np.unpackbits(self.bits, bitorder="little")).astype(np.int64)

    def between(self, first: int, end: int) -> int:
        """Count the members in `[first, end)`."""
        end = min(end, 8 * len(self.bits))
        if first >= end:
            return 0
        bits = np.unpackbits(self.bits[first // 8 : -(-end // 8)], bitorder="little")
        return int(np.count_nonzero(bits[first % 8 : first % 8 + end - first]))

    def holds(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which of the ids are members; negative ids and those beyond the bits are not."""
        inside = (ids >= 0) & (ids < 8 * len(self.bits))
        safe = np.where(inside, ids, 0)
        bits = self.bits[safe >> 3] >> (safe & 7).astype(np.uint8) & 1
        held: NDArray[np.bool_] = inside & bits.astype(bool)
        return held


class RowReader:
    """Reads the rows of one table in one space. Raises `Damaged` where a row is missing."""

    def __init__(self, env: Any, table: Any, space: int, dimension: int, what: str) -> None:
        self._env, self._table, self._space, self._dimension = env, table, space, dimension
        self._what = what
        """Whose rows they are, for the error of a row that is missing."""

    def gather(self, ids: NDArray[np.int64]) -> Vectors:
        """Rows of ids in their order, `[n, D]` float32 in memory of their own."""
        dense = len(ids) > BLOCK_ROWS and abs(int(ids[-1]) - int(ids[0])) < 4 * len(ids)
        if len(ids) <= ROW_FETCH_LIMIT and not dense:
            return self._gather_singly(ids.tolist())
        out = np.empty((len(ids), self._dimension), np.float32)
        blocks, offsets = np.divmod(ids, BLOCK_ROWS)
        with self._env.begin(buffers=True) as txn:
            for block in np.unique(blocks).tolist():
                here = blocks == block
                rows = read_block(txn, self._table, self._space, block, self._dimension)
                if len(rows) <= offsets[here].max():
                    raise Damaged(f"{self._what} have lost rows of block {block}")
                out[here] = rows[offsets[here]]
        return out

    def _gather_singly(self, ids: list[int]) -> Vectors:
        width, space, pack = 2 * self._dimension, self._space << SPACE_SHIFT, U64.pack
        rows = []
        with self._env.begin(db=self._table, buffers=True) as txn:
            get = txn.get
            for i in ids:
                offset = i % BLOCK_ROWS * width
                block = get(pack(space | i // BLOCK_ROWS))
                if block is None or len(block) < offset + width:
                    raise Damaged(f"{self._what} have lost row {i}")
                rows.append(block[offset : offset + width])
            # joined while the transaction lasts: the rows are the map's own memory
            halves = np.frombuffer(b"".join(rows), np.float16)
        return widened(halves).reshape(len(ids), self._dimension)

    def scan(self, runs: Iterable[range], allowed: Allowed) -> Iterator[tuple[NDArray[np.int64], Vectors]]:
        """Yield the allowed ids of each run and their rows as float32; the next run reuses the memory."""
        dimension = self._dimension
        halves = np.empty((0, dimension), np.int32)
        with self._env.begin(buffers=True) as txn:
            for run in runs:
                ids = np.arange(run.start, run.stop)
                kept = allowed.holds(ids)
                if not kept.any():
                    continue
                if len(halves) < len(run):
                    halves = np.empty((len(run), dimension), np.int32)
                for block in range(run.start // BLOCK_ROWS, -(-run.stop // BLOCK_ROWS)):
                    base = block * BLOCK_ROWS
                    start, stop = max(run.start, base), min(run.stop, base + BLOCK_ROWS)
                    data = txn.get(block_key(self._space, block), db=self._table)
                    held = 0 if data is None else len(data) // (2 * dimension)
                    end = min(stop, base + held)
                    if end < stop and kept[max(end, start) - run.start : stop - run.start].any():
                        raise Damaged(f"{self._what} have lost rows of block {block}")
                    if end > start:
                        stored = np.frombuffer(data, np.int16, count=(end - base) * dimension)
                        halves[start - run.start : end - run.start] = stored.reshape(-1, dimension)[
                            start - base :
                        ]
                rows = halves[: len(run)]
                yield (ids, _widen_in_place(rows)) if kept.all() else (ids[kept], _widen_in_place(rows[kept]))


_HALF = np.array(0x8FFFE000, np.uint32).view(np.int32)
_SCALE = np.float32(2.0**112)


def widened(rows: NDArray[np.float16]) -> Vectors:
    """`rows.astype(float32)`, several times as fast; finite numbers only."""
    return _widen_in_place(np.ascontiguousarray(rows).view(np.int16).astype(np.int32))


def _widen_in_place(halves: NDArray[np.int32]) -> Vectors:
    """float32 of float16 bits that are sign-extended to 32, in the same memory.

    The exponents of the two formats differ by 112; the product also gives subnormal numbers their value.
    """
    np.left_shift(halves, 13, out=halves)
    np.bitwise_and(halves, _HALF, out=halves)
    rows = halves.view(np.float32)
    np.multiply(rows, _SCALE, out=rows)
    return rows
