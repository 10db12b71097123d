"""Merge equal tags of an image's captions into one, with a count and every place that it was read from.

Miners are anybody's, and so are the captions: what a store keeps of a tag is bounded and plain text.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tagstore.plain_text import MAX_ENTRY_TAGS, MAX_TAG_CHARS, one_line
from tagstore.types import Kind, Tag

log = logging.getLogger(__name__)


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
    """Merge the tags of one image by `(kind, canonical)`, in order of first appearance.

    A tag without text, of more than `MAX_TAG_CHARS` characters or without a score in [0, 1] is left out, and
    so is what comes behind the first `MAX_ENTRY_TAGS`.
    """
    groups: dict[tuple[str, str], list[Tag]] = {}
    refused = 0
    for tag in tags:
        plain = _plain(tag)
        key = (tag.kind, plain.canonical)
        if not _within_bounds(plain) or (len(groups) == MAX_ENTRY_TAGS and key not in groups):
            refused += 1
        else:
            groups.setdefault(key, []).append(plain)
    if refused:
        log.info("%d tags of an image are left out: empty, too long, too many, or of no score", refused)
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


def _plain(tag: Tag) -> Tag:
    text, canonical = one_line(tag.text), one_line(tag.canonical)
    if (text, canonical) == (tag.text, tag.canonical):
        return tag
    return replace(tag, text=text, canonical=canonical)


def _within_bounds(tag: Tag) -> bool:
    # NaN is in no interval
    return all(0 < len(text) <= MAX_TAG_CHARS for text in (tag.text, tag.canonical)) and 0 <= tag.score <= 1
