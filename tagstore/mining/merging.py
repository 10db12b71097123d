"""Merge equal tags of an image's captions into one, with a count and every place that it was read from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from tagstore.types import Kind, Tag


@dataclass(frozen=True, slots=True)
class MergedTag:
    """All tags of one image that share kind and canonical form."""

    text: str
    """The most frequent surface form; the first of several."""
    kind: Kind
    canonical: str
    score: float
    """The best score among the merged tags."""
    count: int
    """How many tags were merged."""
    provenance: tuple[tuple[int, int, int], ...]
    """`(caption, start, end)` of each, in order of reading; caption -1 is metadata."""


def merge(tags: Iterable[Tag]) -> tuple[MergedTag, ...]:
    """Merge the tags of one image by `(kind, canonical)`, in order of first appearance."""
    groups: dict[tuple[str, str], list[Tag]] = {}
    for tag in tags:
        groups.setdefault((tag.kind, tag.canonical), []).append(tag)
    return tuple(
        MergedTag(
            text=Counter(tag.text for tag in same).most_common(1)[0][0],
            kind=same[0].kind,
            canonical=canonical,
            score=max(tag.score for tag in same),
            count=len(same),
            provenance=tuple((tag.caption, *tag.span) for tag in same),
        )
        for (_, canonical), same in groups.items()
    )
