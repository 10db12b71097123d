"""Stores made without images: vectors in groups of look-alikes, tags by Zipf's law.

A vector is a coarse centre, moved to a fine centre, then moved a little: entries of a fine centre have cosine
0.90 with each other. A query is an entry moved by a tenth, so its first neighbour is that entry, and the next
ones are the entry's look-alikes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tagstore.indexing import faiss_index
from tagstore.mining import MergedTag
from tagstore.storage.staging import Draft
from tagstore.storage.version import Version
from tagstore.storage.writer import Writer
from tagstore.types import Fingerprint

STORE = "bench"
COARSE_CENTRES, LOOK_ALIKES, WORDS, BATCH = 1000, 20, 200_000, 4096
FINE_DISTANCE, ENTRY_DISTANCE, QUERY_DISTANCE = 0.7, 0.333, 0.1
"""Lengths of the random moves: coarse to fine centre, fine centre to entry, entry to query."""


def fingerprint(dimension: int) -> Fingerprint:
    return Fingerprint("bench", "00", {}, False, True, dimension)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def _noise(rng: np.random.Generator, n: int, dimension: int) -> NDArray[np.float32]:
    return rng.standard_normal((n, dimension), dtype=np.float32) / np.float32(dimension**0.5)


def vectors(n: int, dimension: int) -> Iterator[NDArray[np.float32]]:
    """Unit rows in batches; equal arguments give equal rows."""
    coarse = _unit(np.random.default_rng(0).standard_normal((COARSE_CENTRES, dimension), dtype=np.float32))
    for start in range(0, n, BATCH):
        rng = np.random.default_rng(start + 1)
        size = min(BATCH, n - start)
        groups = -(-size // LOOK_ALIKES)
        centres = coarse[rng.integers(COARSE_CENTRES, size=groups)]
        fine = _unit(centres + FINE_DISTANCE * _noise(rng, groups, dimension))
        entries = np.repeat(fine, LOOK_ALIKES, axis=0)[:size]
        yield _unit(entries + ENTRY_DISTANCE * _noise(rng, size, dimension))


def queries(n: int, entries: int, dimension: int, seed: int = 7) -> NDArray[np.float32]:
    """`[n, dimension]` near-duplicates of entries, from the first batches of a store of `entries`."""
    rng = np.random.default_rng(seed)
    pool = np.concatenate([batch for batch, _ in zip(vectors(entries, dimension), range(8), strict=False)])
    return _unit(pool[rng.integers(len(pool), size=n)] + QUERY_DISTANCE * _noise(rng, n, dimension))


def build(root: Path, n: int, dimension: int, store: str = STORE) -> Version:
    """Write a store under a directory, with the index that ingests make."""
    with Writer(root, store, fingerprint(dimension), sync="batch") as writer:
        start = 0
        for batch in vectors(n, dimension):
            tags = np.random.default_rng(start).zipf(1.3, (len(batch), 5)) % WORDS
            writer.append([_draft(start + i, row.tolist()) for i, row in enumerate(tags)], batch)
            start += len(batch)
        rng = np.random.default_rng(3)
        while texts := writer.new_tags(limit=4096):
            writer.embed_tags(_unit(rng.standard_normal((len(texts), dimension), dtype=np.float32)))
        return writer.commit(operation="ingest", indexer=faiss_index.extend)


def _draft(i: int, tags: list[int]) -> Draft:
    words = [f"word{tag}" for tag in dict.fromkeys(tags)]
    merged = tuple(MergedTag(word, "object", word, 0.9, 1, ((0, 0, len(word)),)) for word in words)
    return Draft(f"{i:012d}", hashlib.sha256(str(i).encode()).digest(), i, (" ".join(words),), merged)
