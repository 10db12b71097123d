"""Rows of one picture, a caption each, as many data sets write them: one pair with all captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from tagstore.types import Pair, Rejected

MAX_JOINED = 1000
"""Captions that are joined at most, so that memory stays bounded whatever a table says."""


def rows_together(rows: Iterable[Pair | Rejected]) -> Iterator[Pair | Rejected]:
    """Join rows that follow one another and have the same key and image; metadata is the first row's.

    Rows of a key that stand apart stay apart, because finding them would take memory for all keys: the second
    is refused as a duplicate when it is written.
    """
    held: Pair | None = None
    captions: dict[str, None] = {}
    for row in rows:
        same = held is not None and isinstance(row, Pair) and (row.key, row.image) == (held.key, held.image)
        if same and len(captions) < MAX_JOINED:
            assert isinstance(row, Pair)
            captions |= dict.fromkeys(row.captions)
            continue
        if held is not None:
            yield replace(held, captions=tuple(captions))
        held, captions = (row, dict.fromkeys(row.captions)) if isinstance(row, Pair) else (None, {})
        if held is None:
            yield row
    if held is not None:
        yield replace(held, captions=tuple(captions))
