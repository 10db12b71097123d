"""Product titles ("Puma Men White T-shirt"): no sentence to parse, so a small grammar of their own.

BRAND (LINE) GENDER (LINE) COLOUR DESCRIPTOR ... PRODUCT CODE
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tagstore.mining import lexicon as lx
from tagstore.mining.noun_phrases import CONFIDENCE, Found
from tagstore.mining.nouns import singular

SOURCE = 0.9  # a title says less surely than a sentence what belongs to what

_WORD = re.compile(r"&|[^\W_](?:[\w.'’/-]*[\w'’.])?")
_LINKS = frozenset({"and", "&", "of", "by", "the", "de", "la"})
_STOP = frozenset({"with", "for", "from", "in", "on", "pack", "set", "combo"})
_SENTENCE = frozenset(
    {"a", "an", "is", "are", "was", "at", "to", "his", "her", "their", "its", "while", "near", "into"}
)
_NATURAL = {
    "man": "men",
    "mens": "men",
    "woman": "women",
    "womens": "women",
    "boy": "boys",
    "girl": "girls",
    "kid": "kids",
    "infants": "infant",
}
_CODE = re.compile(r".*\d.*|[IVX]+|[A-Z]{1,2}\d*")


class Title:
    """The words of a title: `text`, `low`, `start`, `end`."""

    def __init__(self, source: str) -> None:
        words = source.split()
        capitals = sum(not word[0].islower() for word in words)
        matches = list(_WORD.finditer(source)) if 2 * capitals > len(words) > 2 else []
        self.text = [m.group() for m in matches]
        self.low = [m.group().lower().replace("’", "'") for m in matches]
        self.start = [m.start() for m in matches]
        self.end = [m.end() for m in matches]
        self.head = self._head() if self._looks() else -1

    def __bool__(self) -> bool:
        """Whether this is a product title and not a sentence."""
        return self.head >= 0

    def _looks(self) -> bool:
        content = [w for w in self.text if w.lower() not in _LINKS | _STOP]
        made_for = any(
            low in lx.GENDERS and self.text[i][0].isupper() for i, low in enumerate(self.low[1:4], 1)
        )
        if len(content) < 3 or (not made_for and any(low in _SENTENCE for low in self.low)):
            return False
        if sum(not w[0].islower() for w in content) < 0.8 * len(content):
            return False
        return any(
            low in lx.GENDERS or low in lx.COLOURS or low in lx.TINTS or low in lx.DESCRIPTORS
            for low in self.low
        )

    def _head(self) -> int:
        """The word that names the product: the last known one before "with ..." or "pack of ...", or, after a gender, the last word."""
        stop = next(
            (i for i, low in enumerate(self.low) if i > 1 and low in _STOP and self.low[i + 1 : i + 2] != []),
            len(self.low),
        )
        if stop < len(self.low) and self.low[stop] == "set" and self.low[stop + 1] != "of":
            stop = len(self.low)
        for i in range(stop - 1, 0, -1):
            if self.low[i] in lx.PRODUCTS and not (
                self.low[i] in lx.TINTS and i + 1 < stop and self.low[i + 1] in lx.PRODUCTS
            ):
                return i
        if not any(low in lx.GENDERS for low in self.low[1:]):
            return -1
        for i in range(stop - 1, 0, -1):
            if not (self._marks(i) or _CODE.fullmatch(self.text[i]) or self.low[i] in _LINKS):
                return i
        return -1

    def _marks(self, i: int) -> bool:
        return any(
            self.low[i] in words for words in (lx.GENDERS, lx.COLOURS, lx.TINTS, lx.DESCRIPTORS, lx.PARTS)
        )

    def brand(self) -> int:
        """How many words at the beginning are the brand; 0 if the title begins with what it describes."""
        marker = next(
            (
                i
                for i in range(1, self.head + 1)
                if self._marks(i) or self.text[i][0].isdigit() or i == self.head
            ),
            self.head,
        )
        if self.low[0] in lx.GENDERS | lx.DESCRIPTORS or (self._marks(0) and marker == 1):
            return 0
        while marker > 1 and self.low[marker - 1] in lx.SHADES | _LINKS:
            marker -= 1
        linked = next((i for i in range(1, marker) if self.low[i] in _LINKS), 0)
        if linked:
            end = next((i for i in range(linked + 1, marker) if self.low[i] not in _LINKS), linked) + 1
            return min(end, marker) if end - linked > 1 else 1
        most = 3 if self.low[marker] in lx.GENDERS else 2
        return marker if marker <= most else 1


def title_phrases(t: Title) -> Iterator[Found]:
    """Brand, product, and what is said of it."""
    brand = t.brand()
    if brand:
        end = t.end[brand - 1]
        text = " ".join(t.text[:brand])
        yield Found(text, "entity", t.start[0], end, SOURCE * CONFIDENCE["brand"], text.casefold(), "BRAND")
    first = t.head
    while first - 1 >= max(brand, 1) and f"{t.low[first - 1]} {t.low[first]}" in lx.LEXICAL:
        first -= 1
    name = " ".join(t.low[first : t.head + 1])
    yield Found(name, "object", t.start[first], t.end[t.head], SOURCE * CONFIDENCE["object"], singular(name))
    seen = set()
    i = brand
    while i < len(t.low):
        low = t.low[i]
        if first <= i <= t.head:
            i += 1
            continue
        last = i
        if (
            low in lx.SHADES
            and i + 1 < len(t.low)
            and (t.low[i + 1] in lx.COLOURS or t.low[i + 1] == "white")
        ):
            last = i + 1
        words = " ".join(t.low[i : last + 1])
        if low in lx.GENDERS:
            words = _NATURAL.get(
                low.removesuffix("'s").removesuffix("'"), low.removesuffix("'s").removesuffix("'")
            )
        described = last > i or (t._marks(i) and t.low[i + 1 : i + 2] != ["up"])
        part = _part(t, last, first)
        if described and low not in lx.PARTS and words not in seen:
            if part and low not in lx.GENDERS:
                yield _said(t, i, last, part, part, words)
            else:
                seen.add(words)
                yield _said(t, i, last, first, t.head, words)
        elif low in lx.PARTS and i < first:
            yield Found(low, "object", t.start[i], t.end[i], SOURCE * CONFIDENCE["object"], singular(low))
        i = last + 1


def _part(t: Title, last: int, first: int) -> int:
    """The part of the product that the colour ending at word `last` belongs to, or 0."""
    i = last + 1
    while i < first and (t.low[i] in ("&", "and") or t.low[i] in lx.COLOURS):
        i += 1
    return i if i < first and t.low[i] in lx.PARTS else 0


def _said(t: Title, i: int, last: int, first: int, head: int, words: str) -> Found:
    name = " ".join(t.low[first : head + 1])
    shown = (
        f"{words}'s"
        if words in ("men", "women")
        else f"{words}'"
        if words in ("boys", "girls", "kids")
        else words
    )
    start, end = min(t.start[i], t.start[first]), max(t.end[last], t.end[head])
    return Found(
        f"{shown} {name}",
        "attribute",
        start,
        end,
        SOURCE * CONFIDENCE["attribute"],
        f"{words} {singular(name)}",
    )
