"""Gives the tags of a store embeddings that are learnt from its own pictures (`encoding.grounding`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.encoding import grounding
from tagstore.storage.snapshot import Snapshot
from tagstore.storage.writer import Writer
from tagstore.types import Vectors

ENTRIES_AT_ONCE = 1 << 12
"""Entries whose tags are in memory as Python's objects."""


def pictures(snapshot: Snapshot, ids: NDArray[np.int64]) -> Iterator[tuple[Vectors, Sequence[Sequence[int]]]]:
    """Yield vectors and tag ids of entries, in pieces."""
    for start in range(0, len(ids), ENTRIES_AT_ONCE):
        piece = ids[start : start + ENTRIES_AT_ONCE]
        yield snapshot.vectors(piece), [tags for _, tags in snapshot.keys_and_tags(piece.tolist())]


def ground(writer: Writer) -> None:
    """Learn the embeddings of all tags from the entries that live, those that are staged included.

    They are staged in a space of their own, since those of older versions stay as they are; the vectors are
    copied into it.
    """
    ids = np.flatnonzero(writer.live)
    staged = Snapshot(writer.store, writer.draft_version("ground", {}))
    embeddings = grounding.learn(lambda: pictures(staged, ids), writer.next_tag_id, staged.dimension)
    if writer.begin_space(about(len(ids))):
        for piece, vectors in staged.vector_blocks(ids):
            writer.put_vectors(piece.tolist(), vectors)
    for rows in embeddings:
        writer.embed_tags(rows)


def about(pictures: int) -> dict[str, Any]:
    """What a version says of embeddings that were learnt from so many pictures."""
    return {"learnt from": "pictures", "pictures": pictures, "prior": grounding.PRIOR}
