"""Product titles ("Puma Men White T-shirt"), which are no sentences and have a small grammar of their own.

BRAND (LINE) GENDER (LINE) COLOUR DESCRIPTOR ... PRODUCT CODE
DESCRIPTOR ... PRODUCT for WHOM by BRAND, SIZE - COLOUR/COLOUR
"""

from __future__ import annotations

import re

from tagstore.mining import lexicon
from tagstore.mining.nouns import singular
from tagstore.mining.parse import common_adjectives, common_nouns

# a slash joins two words, but not two figures: "Blue/Grey", "3/4 pant"
_WORD = re.compile(r"&|[^\W_](?:(?:[\w.'’-]|(?<=\d)/(?=\d))*[\w'’.])?")
_SEPARATOR = re.compile(r"[,;|()]|\s[-–]\s")
_UNITS = (
    r"(?:ml|cl|dl|l|litres?|liters?|g|kg|mg|oz|lbs?|mm|cm|m|km|ft|inch(?:es)?|in|w|v|mah|kwh|gb|tb|mp|hz|"
    r"seaters?|pieces?|pcs|pc|count|ct|tabs|sheets|bags|rolls|portions?|servings?)"
)
_SIZES = re.compile(
    r"\b\d+(?:[.,]\d+)?(?: ?[x×] ?\d+(?:[.,]\d+)?)+ ?(?:" + _UNITS + r"\b)?"
    r"|\b\d+(?:[.,]\d+)?[ -]?" + _UNITS + r"\b(?! of\b)"
    r"|\b\d+:\d+\b|\b[WL]\d{2}\b|\b(?:UK|EU|US) ?\d+(?:\.\d)?\b"
    r"|\bsize:? (?:\d+(?:\.\d)?|[smlx]{1,4})\b|\b(?:king|queen|twin|full|double|single|one) size\b",
    re.IGNORECASE,
)
_PACKS = re.compile(
    r"\b(?:combo )?(?:pack|set|box|bundle|lot) of (?:\d+|two|three|four|five|six|ten|twelve)\b"
    r"|\bcombo pack\b",
    re.IGNORECASE,
)
CONNECTORS = frozenset({"and", "&", "of", "by", "the", "de", "la"})
_POSTMODIFIERS = frozenset({"with", "for", "from", "in", "on", "pack", "set", "combo"})
_PURPOSES = frozenset({"with", "for", "from", "on", "of"})
"""Words after which a title no longer speaks of the product itself."""
_LISTING_WORDS = frozenset({"for", "by", "with"})
_SENTENCE_WORDS = frozenset({
    "a", "an", "is", "are", "was", "at", "to", "his", "her", "their", "its", "while", "near", "into",
})  # fmt: skip
_CODE = re.compile(r".*\d.*|[IVX]+|[A-Z]{1,2}\d*")
_NO_NAMES = lexicon.CONTAINERS | lexicon.MEASURES | lexicon.ADJECTIVES


class Title:
    """The words of a title: `text`, `lower`, `start`, `end`, and the `segment` between separators."""

    def __init__(self, source: str) -> None:
        words = source.split()
        capitals = sum(not word[0].islower() for word in words)
        self.text: list[str] = []
        self.head = -1
        if not 2 * capitals > len(words) > 2:
            return
        bare = _SIZES.sub(_blank, source)
        self.has_size = bare != source
        text = _PACKS.sub(_blank, bare)
        self.has_pack = text != bare
        matches = list(_WORD.finditer(text))
        cuts = [m.start() for m in _SEPARATOR.finditer(text)]
        self.text = [m.group() for m in matches]
        self.lower = [m.group().lower().replace("’", "'") for m in matches]
        self.start = [m.start() for m in matches]
        self.end = [m.end() for m in matches]
        self.segment = [sum(cut < start for cut in cuts) for start in self.start]
        self.has_gender = any(word in lexicon.GENDERS for word in self.lower)
        # titles of shops say more than the fashion ones: sizes, parts behind separators, whom it is for
        self.is_listing = not self.has_gender and (
            self.has_size
            or self.has_pack
            or self.segment[-1:] > [0]
            or not _LISTING_WORDS.isdisjoint(self.lower)
        )
        self.head = self._head() if self._is_title() else -1
        self.first = self._name_start() if self.head >= 0 else -1

    def __bool__(self) -> bool:
        """Whether this is a product title and not a sentence."""
        return self.head >= 0

    def _is_title(self) -> bool:
        content = [w for w in self.text if w.lower() not in CONNECTORS | _POSTMODIFIERS]
        names_gender = any(
            word in lexicon.GENDERS and self.text[i][0].isupper() for i, word in enumerate(self.lower[1:4], 1)
        )
        if len(content) + self.has_size + self.has_pack < 3 or (
            not names_gender and any(word in _SENTENCE_WORDS for word in self.lower)
        ):
            return False
        if sum(not w[0].islower() for w in content) < 0.8 * len(content):
            return False
        return self.has_size or self.has_pack or any(map(self.is_descriptor, range(len(self.text))))

    def _head(self) -> int:
        """The word that names the product, or -1.

        It is the last known product before "with ..." or "for ...", of the first part that has one; after a
        gender, the last word; in a title that gives a size, the last noun of the first part.
        """
        stop = self._stop()
        parts = range(self.segment[stop - 1] + 1) if stop else ()
        for part in parts:
            words = [i for i in range(stop) if self.segment[i] == part]
            for i in reversed(words):
                tint = self.lower[i] in lexicon.TINTS and self.lower[i + 1 : i + 2] != []
                if self.lower[i] in lexicon.PRODUCTS and not (
                    (tint and i + 1 < stop and self.lower[i + 1] in lexicon.PRODUCTS)
                    or (i == 0 and self.has_gender)
                    or self.lower[i] in lexicon.COLOURS
                ):
                    return i
        if any(word in lexicon.GENDERS for word in self.lower[1:]):
            for i in range(stop - 1, 0, -1):
                if not (
                    self.is_descriptor(i) or _CODE.fullmatch(self.text[i]) or self.lower[i] in CONNECTORS
                ):
                    return i
        described = self.lower[0] in lexicon.DESCRIPTORS and not _LISTING_WORDS.isdisjoint(self.lower)
        if self.has_size or self.has_pack or described:
            for i in range(stop - 1, -1, -1):
                if self.segment[i] > 0 or not self._is_plain_noun(i):
                    continue
                # "Philips Airfryer XXL" has no product that is known
                unknown = i == 0 and any(
                    not self._is_known(j) for j in range(1, stop) if self.segment[j] == 0
                )
                return -1 if unknown else i
        return -1

    def _stop(self) -> int:
        """The first word that no longer names the product: "for" and the like."""
        for i, word in enumerate(self.lower):
            within = i > 1 or (i == 1 and self.text[i].islower() and word != "set")
            if not within or word not in _POSTMODIFIERS or self.lower[i + 1 : i + 2] == []:
                continue
            if word in ("set", "pack", "combo") and self.lower[i + 1] != "of":
                continue
            return i
        return len(self.lower)

    def _is_plain_noun(self, i: int) -> bool:
        word = self.lower[i]
        return (
            singular(word) in common_nouns()
            and not self.is_descriptor(i)
            and word not in _NO_NAMES
            and word not in CONNECTORS
        )

    def _name_start(self) -> int:
        """The first word of the product's name: "floor lamp", "t-shirt"."""
        first = self.head
        while first > 0 and self.segment[first - 1] == self.segment[first]:
            known = f"{self.lower[first - 1]} {self.lower[first]}" in lexicon.LEXICAL
            # lines of fashion are named with nouns too: "Puma Men Genesis Shoe"
            compound = self.is_listing and (
                self._is_plain_noun(first - 1) or self.lower[first - 1] in lexicon.PRODUCTS
            )
            if not (known or compound):
                break
            first -= 1
        return first

    def is_descriptor(self, i: int) -> bool:
        """Whether word `i` says what the product is like."""
        return any(
            self.lower[i] in words
            for words in (lexicon.GENDERS, lexicon.COLOURS, lexicon.TINTS, lexicon.DESCRIPTORS, lexicon.PARTS)
        )

    def is_adjective(self, i: int) -> bool:
        """Whether word `i`, before the product, is an adjective that the lexicon lacks: "Soft"."""
        word = self.lower[i]
        return (
            self.is_listing
            and i < self.first
            and word not in lexicon.VAGUE
            and (word in lexicon.ADJECTIVES or (word in common_adjectives() and word not in common_nouns()))
        )

    def brand(self) -> tuple[int, int]:
        """The words `[first, last)` of the brand; none of them if the title names none."""
        last = self._leading_brand()
        if last and not self.is_listing:
            return 0, last
        if last and not self._is_plain_word(0, last):
            return 0, min(last, self.first) if self.first else last
        for i in range(self.head + 1, len(self.lower) - 1):
            if self.lower[i] == "by":
                return i + 1, self._name_end(i + 1)
        for i in range(self.first):
            if self._is_unknown(i):
                end = i + 1
                while end < self.first and self._is_unknown(end):
                    end += 1
                return i, end
        return 0, 0

    def _leading_brand(self) -> int:
        marker = next(
            (
                i
                for i in range(1, self.head + 1)
                if self.is_descriptor(i) or self.text[i][0].isdigit() or i == self.head
            ),
            self.head,
        )
        if self.lower[0] in lexicon.GENDERS | lexicon.DESCRIPTORS or (self.is_descriptor(0) and marker == 1):
            return 0
        while marker > 1 and self.lower[marker - 1] in lexicon.SHADES | CONNECTORS:
            marker -= 1
        linked = next((i for i in range(1, marker) if self.lower[i] in CONNECTORS), 0)
        if linked:
            end = next((i for i in range(linked + 1, marker) if self.lower[i] not in CONNECTORS), linked) + 1
            return min(end, marker) if end - linked > 1 else 1
        most = 3 if self.lower[marker] in lexicon.GENDERS else 2
        return marker if marker <= most else 1

    def _is_plain_word(self, first: int, last: int) -> bool:
        """Whether the words before the product are no brand: "Garden Hose", "Organic Green Tea"."""
        word = self.lower[first]
        if first >= self.first or word in _NO_NAMES or self.is_adjective(first):
            return True
        return self.first < self.head and last >= self.first and self._is_known(first)

    def _is_known(self, i: int) -> bool:
        word = self.lower[i]
        plain = word.removesuffix("'s")
        return (
            self.is_descriptor(i)
            or word in CONNECTORS | _NO_NAMES | lexicon.SHADES | lexicon.PRODUCTS
            or singular(word) in common_nouns()
            or (word == plain and plain in common_adjectives())
        )

    def _is_unknown(self, i: int) -> bool:
        code = _CODE.fullmatch(self.text[i])
        return not (self._is_known(i) or code) and self.text[i][0].isupper()

    def _name_end(self, first: int) -> int:
        """The end of the name that begins at word `first`: capitals, up to a separator or a description."""
        i = first
        while (
            i < len(self.lower)
            and i < first + 3
            and self.segment[i] == self.segment[first]
            and self.text[i][0].isupper()
            and not (self.is_descriptor(i) and i > first)
        ):
            i += 1
        return i

    def is_aside(self, i: int) -> bool:
        """Whether word `i` speaks of something else: "for Red Wine", "with Dinosaur Print", "of Oak"."""
        if self.lower[i] in lexicon.GENDERS:
            return False
        for j in range(i - 1, self.head, -1):
            if self.segment[j] != self.segment[i]:
                return False
            if self.lower[j] in _PURPOSES:
                return True
        return False


def _blank(match: re.Match[str]) -> str:
    return " " * len(match.group())
