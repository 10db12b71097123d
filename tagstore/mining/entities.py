"""Proper names in a caption: spaCy's named entities, and capitalised names that it misses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tagstore.mining import lexicon
from tagstore.mining.noun_phrases import CONFIDENCE
from tagstore.mining.nouns import singular
from tagstore.mining.parse import Parse

LABELS = frozenset({"PERSON", "FAC", "ORG", "GPE", "LOC", "PRODUCT", "EVENT", "WORK_OF_ART", "NORP"})
_TRIM = frozenset({"the", "a", "an", "'s", "'", '"', "no", "his", "her", "its", "this", "that"})


@dataclass(frozen=True, slots=True)
class Name:
    """Words `first` to `last` of a parse, both included, as one proper name."""

    first: int
    last: int
    label: str
    confidence: float


def proper_names(p: Parse, doc: Any, common: frozenset[str]) -> list[Name]:
    """The proper names of a caption in order, no two over the same word; `common` holds lower-case nouns."""
    names: list[Name] = []
    for entity in doc.ents:
        if entity.label_ in LABELS:
            first, last = _trim(p, p.word_of[entity.start], p.word_of[entity.end - 1])
            if first <= last and _is_name(p, first, last, entity.label_, common):
                names.append(Name(first, last, entity.label_, CONFIDENCE["ner"]))
    taken = {i for name in names for i in range(name.first, name.last + 1)}
    words = [i for i in range(len(p)) if p.lower[i].isalpha() and len(p.lower[i]) > 3]
    # where every word is capitalised, a capital does not mark a name
    if 2 * sum(_is_capitalised(p, i) for i in words) <= len(words) + 2:
        names.extend(_capitalised_names(p, taken, common))
    names = [_with_monument(p, name) for name in names]
    return _merge_adjacent(p, sorted(names, key=lambda name: name.first))


def _merge_adjacent(p: Parse, names: list[Name]) -> list[Name]:
    """ "Dr." and "Seuss", "Joe" and "Cafe" of "Joe's Cafe" are one name each."""
    merged: list[Name] = []
    for name in names:
        before = merged[-1] if merged else None
        if before and p.lower[before.last + 1 : name.first] in ([], ["'s"]):
            label = name.label or before.label
            merged[-1] = Name(before.first, name.last, label, max(before.confidence, name.confidence))
        else:
            merged.append(name)
    return merged


def _with_monument(p: Parse, name: Name) -> Name:
    """ "Statue of Liberty", of which the recogniser takes the last word."""
    monument = name.first - 2
    if (
        monument >= 0
        and p.lower[monument + 1] == "of"
        and _is_capitalised(p, monument)
        and p.lower[monument] in lexicon.MONUMENTS
    ):
        return Name(monument, name.last, "FAC", name.confidence)
    return name


def _trim(p: Parse, first: int, last: int) -> tuple[int, int]:
    """The span without articles, punctuation and lower-case words at either end."""
    while first <= last and (p.lower[first] in _TRIM or not _is_capitalised(p, first)):
        first += 1
    while first <= last and (
        p.lower[last] in _TRIM or not _is_capitalised(p, last) or not p.lower[last][-1].isalnum()
    ):
        last -= 1
    return first, last


def _is_capitalised(p: Parse, i: int) -> bool:
    return p.text[i][0].isupper()


def _is_name(p: Parse, first: int, last: int, label: str, common: frozenset[str]) -> bool:
    if label == "NORP" and p.tag[last] in ("JJ", "NNS", "NNP"):  # "Asian" is an adjective here, no name
        return False
    if first < last:
        kind = " ".join(p.lower[first : last + 1]) in lexicon.LEXICAL  # "Granny Smith"
        return not kind and not _is_common_noun(p, first, last, common)
    if singular(p.lower[first]) in lexicon.COMMONS or p.lower[first] in lexicon.COLOURS:
        return False
    return (
        first > 0 or singular(p.lower[0]) not in common
    )  # the first word of a sentence is always capitalised


def _is_common_noun(p: Parse, first: int, last: int, common: frozenset[str]) -> bool:
    """Whether a capitalised span is no name: "a Mexican Restaurant", "white Dress Shirts"."""
    counted = first > 0 and (p.lower[first - 1] in ("a", "an") or p.tag[first - 1] in ("JJ", "CD"))
    return counted and p.dep[last] != "compound" and singular(p.lower[last]) in common


def _capitalised_names(p: Parse, taken: set[int], common: frozenset[str]) -> Iterator[Name]:
    """Runs of capitalised proper nouns inside a sentence."""
    i = 1
    while i < len(p):
        last = i
        if _is_proper_noun(p, i) and i not in taken:
            while last + 1 < len(p) and last + 1 not in taken and _is_proper_noun(p, last + 1):
                last += 1
            kind = f"{p.lower[i - 1]} {p.lower[last]}" in lexicon.LEXICAL  # "Granny Smith apples"
            counted = kind or (
                last == i and p.tag[i - 1] in ("CD", "JJ") and singular(p.lower[i]) in common
            )  # "Four Musicians"
            if not counted and not (last > i and _is_common_noun(p, i, last, common)):
                yield Name(i, last, "", CONFIDENCE["capitals"])
        i = last + 1


def _is_proper_noun(p: Parse, i: int) -> bool:
    begins = p.text[i - 1] in (".", "!", "?", ":", '"')
    return (
        p.tag[i] in ("NNP", "NNPS")
        and _is_capitalised(p, i)
        and len(p.lower[i]) > 1
        and singular(p.lower[i]) not in lexicon.COMMONS
        and not begins
    )
