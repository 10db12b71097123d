"""Product titles ("Puma Men White T-shirt"), which are no sentences and have a small grammar of their own.

BRAND (LINE) GENDER (LINE) COLOUR DESCRIPTOR ... PRODUCT CODE
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tagstore.mining import lexicon
from tagstore.mining.noun_phrases import CONFIDENCE, Phrase
from tagstore.mining.nouns import singular

SOURCE = 0.9  # factor on the score: a title says less surely than a sentence which word describes which

_WORD = re.compile(r"&|[^\W_](?:[\w.'’/-]*[\w'’.])?")
_CONNECTORS = frozenset({"and", "&", "of", "by", "the", "de", "la"})
_POSTMODIFIERS = frozenset({"with", "for", "from", "in", "on", "pack", "set", "combo"})
_SENTENCE_WORDS = frozenset({
    "a", "an", "is", "are", "was", "at", "to", "his", "her", "their", "its", "while", "near", "into",
})  # fmt: skip
_GENDER_FORMS = {
    "man": "men", "mens": "men", "woman": "women", "womens": "women", "boy": "boys", "girl": "girls",
    "kid": "kids", "infants": "infant",
}  # fmt: skip
_CODE = re.compile(r".*\d.*|[IVX]+|[A-Z]{1,2}\d*")


class Title:
    """The words of a title: `text`, `lower`, `start`, `end`."""

    def __init__(self, source: str) -> None:
        words = source.split()
        capitals = sum(not word[0].islower() for word in words)
        matches = list(_WORD.finditer(source)) if 2 * capitals > len(words) > 2 else []
        self.text = [m.group() for m in matches]
        self.lower = [m.group().lower().replace("’", "'") for m in matches]
        self.start = [m.start() for m in matches]
        self.end = [m.end() for m in matches]
        self.head = self._head() if self._is_title() else -1

    def __bool__(self) -> bool:
        """Whether this is a product title and not a sentence."""
        return self.head >= 0

    def _is_title(self) -> bool:
        content = [w for w in self.text if w.lower() not in _CONNECTORS | _POSTMODIFIERS]
        names_gender = any(
            word in lexicon.GENDERS and self.text[i][0].isupper() for i, word in enumerate(self.lower[1:4], 1)
        )
        if len(content) < 3 or (not names_gender and any(word in _SENTENCE_WORDS for word in self.lower)):
            return False
        if sum(not w[0].islower() for w in content) < 0.8 * len(content):
            return False
        return any(
            word in lexicon.GENDERS
            or word in lexicon.COLOURS
            or word in lexicon.TINTS
            or word in lexicon.DESCRIPTORS
            for word in self.lower
        )

    def _head(self) -> int:
        """The word that names the product, or -1.

        It is the last known product before "with ..." or "pack of ...", or, after a gender, the last word.
        """
        stop = next(
            (
                i
                for i, word in enumerate(self.lower)
                if i > 1 and word in _POSTMODIFIERS and self.lower[i + 1 : i + 2] != []
            ),
            len(self.lower),
        )
        if stop < len(self.lower) and self.lower[stop] == "set" and self.lower[stop + 1] != "of":
            stop = len(self.lower)
        for i in range(stop - 1, 0, -1):
            if self.lower[i] in lexicon.PRODUCTS and not (
                self.lower[i] in lexicon.TINTS and i + 1 < stop and self.lower[i + 1] in lexicon.PRODUCTS
            ):
                return i
        if not any(word in lexicon.GENDERS for word in self.lower[1:]):
            return -1
        for i in range(stop - 1, 0, -1):
            if not (self._is_descriptor(i) or _CODE.fullmatch(self.text[i]) or self.lower[i] in _CONNECTORS):
                return i
        return -1

    def _is_descriptor(self, i: int) -> bool:
        return any(
            self.lower[i] in words
            for words in (lexicon.GENDERS, lexicon.COLOURS, lexicon.TINTS, lexicon.DESCRIPTORS, lexicon.PARTS)
        )

    def brand(self) -> int:
        """The number of words of the brand at the beginning; 0 if the title begins with a description."""
        marker = next(
            (
                i
                for i in range(1, self.head + 1)
                if self._is_descriptor(i) or self.text[i][0].isdigit() or i == self.head
            ),
            self.head,
        )
        if self.lower[0] in lexicon.GENDERS | lexicon.DESCRIPTORS or (self._is_descriptor(0) and marker == 1):
            return 0
        while marker > 1 and self.lower[marker - 1] in lexicon.SHADES | _CONNECTORS:
            marker -= 1
        linked = next((i for i in range(1, marker) if self.lower[i] in _CONNECTORS), 0)
        if linked:
            end = next((i for i in range(linked + 1, marker) if self.lower[i] not in _CONNECTORS), linked) + 1
            return min(end, marker) if end - linked > 1 else 1
        most = 3 if self.lower[marker] in lexicon.GENDERS else 2
        return marker if marker <= most else 1


def title_phrases(t: Title) -> Iterator[Phrase]:
    """The brand, the product, and its attributes."""
    brand = t.brand()
    if brand:
        end = t.end[brand - 1]
        text = " ".join(t.text[:brand])
        yield Phrase(text, "entity", t.start[0], end, SOURCE * CONFIDENCE["brand"], text.casefold(), "BRAND")
    first = t.head
    while first - 1 >= max(brand, 1) and f"{t.lower[first - 1]} {t.lower[first]}" in lexicon.LEXICAL:
        first -= 1
    name = " ".join(t.lower[first : t.head + 1])
    yield Phrase(name, "object", t.start[first], t.end[t.head], SOURCE * CONFIDENCE["object"], singular(name))
    seen = set()
    i = brand
    while i < len(t.lower):
        word = t.lower[i]
        if first <= i <= t.head:
            i += 1
            continue
        last = i
        if (
            word in lexicon.SHADES
            and i + 1 < len(t.lower)
            and (t.lower[i + 1] in lexicon.COLOURS or t.lower[i + 1] == "white")
        ):
            last = i + 1
        words = " ".join(t.lower[i : last + 1])
        if word in lexicon.GENDERS:
            words = _GENDER_FORMS.get(
                word.removesuffix("'s").removesuffix("'"), word.removesuffix("'s").removesuffix("'")
            )
        is_attribute = last > i or (t._is_descriptor(i) and t.lower[i + 1 : i + 2] != ["up"])
        part = _described_part(t, last, first)
        if is_attribute and word not in lexicon.PARTS and words not in seen:
            if part and word not in lexicon.GENDERS:
                yield _attribute(t, i, last, part, part, words)
            else:
                seen.add(words)
                yield _attribute(t, i, last, first, t.head, words)
        elif word in lexicon.PARTS and i < first:
            yield Phrase(word, "object", t.start[i], t.end[i], SOURCE * CONFIDENCE["object"], singular(word))
        i = last + 1


def _described_part(t: Title, last: int, first: int) -> int:
    """The part of the product (collar, sleeve) that the colour ending at word `last` describes, or 0."""
    i = last + 1
    while i < first and (t.lower[i] in ("&", "and") or t.lower[i] in lexicon.COLOURS):
        i += 1
    return i if i < first and t.lower[i] in lexicon.PARTS else 0


def _attribute(t: Title, i: int, last: int, first: int, head: int, words: str) -> Phrase:
    name = " ".join(t.lower[first : head + 1])
    modifier = (
        f"{words}'s"
        if words in ("men", "women")
        else f"{words}'"
        if words in ("boys", "girls", "kids")
        else words
    )
    start, end = min(t.start[i], t.start[first]), max(t.end[last], t.end[head])
    return Phrase(
        f"{modifier} {name}",
        "attribute",
        start,
        end,
        SOURCE * CONFIDENCE["attribute"],
        f"{words} {singular(name)}",
    )
