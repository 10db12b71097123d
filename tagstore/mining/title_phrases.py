"""The tags of a product title: its brand, the product, and what the title says of it."""

from __future__ import annotations

from collections.abc import Iterator

from tagstore.mining import lexicon
from tagstore.mining.noun_phrases import CONFIDENCE, Phrase
from tagstore.mining.nouns import singular
from tagstore.mining.titles import Title

SOURCE = 0.9  # factor on the score: a title says less surely than a sentence which word describes which

_GENDER_FORMS = {
    "man": "men", "mens": "men", "woman": "women", "womens": "women", "boy": "boys", "girl": "girls",
    "kid": "kids", "infants": "infant",
}  # fmt: skip


def title_phrases(t: Title) -> Iterator[Phrase]:
    """The brand, the product, and its attributes."""
    brand_first, brand_last = t.brand()
    if brand_last:
        text = " ".join(t.text[brand_first:brand_last])
        start, end = t.start[brand_first], t.end[brand_last - 1]
        yield Phrase(text, "entity", start, end, SOURCE * CONFIDENCE["brand"], text.casefold(), "BRAND")
    name = " ".join(t.lower[t.first : t.head + 1])
    yield Phrase(
        name, "object", t.start[t.first], t.end[t.head], SOURCE * CONFIDENCE["object"], singular(name)
    )
    seen = set()
    i = 0
    while i < len(t.lower):
        if brand_first <= i < brand_last or t.first <= i <= t.head or t.is_aside(i):
            i += 1
            continue
        word, last = t.lower[i], i + _joined(t, i)
        words = " ".join(t.lower[i : last + 1])
        if word in lexicon.GENDERS:
            words = _GENDER_FORMS.get(
                word.removesuffix("'s").removesuffix("'"), word.removesuffix("'s").removesuffix("'")
            )
        is_attribute = (
            last > i or t.is_adjective(i) or (t.is_descriptor(i) and t.lower[i + 1 : i + 2] != ["up"])
        )
        part = _described_part(t, last)
        if is_attribute and word not in lexicon.PARTS and words not in seen:
            if part and word not in lexicon.GENDERS:
                yield _attribute(t, i, last, part, part, words)
            else:
                seen.add(words)
                yield _attribute(t, i, last, t.first, t.head, words)
        elif i < t.first and (
            word in lexicon.PARTS or (word in lexicon.CONTAINERS and t.lower[i + 1] == "of")
        ):
            yield Phrase(word, "object", t.start[i], t.end[i], SOURCE * CONFIDENCE["object"], singular(word))
        i = last + 1


def _joined(t: Title, i: int) -> int:
    """How many words after word `i` belong to its description: "light grey", "stainless steel"."""
    after = t.lower[i + 1] if i + 1 < len(t.lower) and t.segment[i + 1] == t.segment[i] else ""
    shade = t.lower[i] in lexicon.SHADES and (after in lexicon.COLOURS or after == "white")
    return int(shade or f"{t.lower[i]} {after}" in lexicon.DESCRIPTORS)


def _described_part(t: Title, last: int) -> int:
    """The part of the product (collar, sleeve) that the colour ending at word `last` describes, or 0."""
    i = last + 1
    while i < t.first and (t.lower[i] in ("&", "and") or t.lower[i] in lexicon.COLOURS):
        i += 1
    return i if i < t.first and t.lower[i] in lexicon.PARTS else 0


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
