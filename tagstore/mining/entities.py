"""Proper names in a caption: spaCy's named entities, cleaned, and capitalised names that it misses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tagstore.mining import lexicon as lx
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


def names(p: Parse, doc: Any, common: frozenset[str]) -> list[Name]:
    """Proper names in order of place, never two over the same word; `common` is a dictionary of lower-case nouns."""
    found: list[Name] = []
    for entity in doc.ents:
        if entity.label_ in LABELS:
            first, last = _trimmed(p, p.word_of[entity.start], p.word_of[entity.end - 1])
            if first <= last and _is_name(p, first, last, entity.label_, common):
                found.append(Name(first, last, entity.label_, CONFIDENCE["ner"]))
    taken = {i for name in found for i in range(name.first, name.last + 1)}
    words = [i for i in range(len(p)) if p.low[i].isalpha() and len(p.low[i]) > 3]
    if (
        2 * sum(_capital(p, i) for i in words) <= len(words) + 2
    ):  # where every word is capitalised, capitals say nothing
        found.extend(_missed(p, taken, common))
    return _united(p, sorted(found, key=lambda name: name.first))


def _united(p: Parse, found: list[Name]) -> list[Name]:
    """ "Dr." and "Seuss", "Joe" and "Cafe" of "Joe's Cafe" are one name each."""
    united: list[Name] = []
    for name in found:
        before = united[-1] if united else None
        if before and p.low[before.last + 1 : name.first] in ([], ["'s"]):
            label = name.label or before.label
            united[-1] = Name(before.first, name.last, label, max(before.confidence, name.confidence))
        else:
            united.append(name)
    return united


def _trimmed(p: Parse, first: int, last: int) -> tuple[int, int]:
    """Without articles, marks and lower-case words at either end."""
    while first <= last and (p.low[first] in _TRIM or not _capital(p, first)):
        first += 1
    while first <= last and (p.low[last] in _TRIM or not _capital(p, last) or not p.low[last][-1].isalnum()):
        last -= 1
    return first, last


def _capital(p: Parse, i: int) -> bool:
    return p.text[i][0].isupper()


def _is_name(p: Parse, first: int, last: int, label: str, common: frozenset[str]) -> bool:
    if label == "NORP" and p.tag[last] in ("JJ", "NNS", "NNP"):  # "Asian" describes, it names nothing
        return False
    if first < last:
        return not _is_thing(p, first, last, common)
    if singular(p.low[first]) in lx.COMMONS or p.low[first] in lx.COLOURS:
        return False
    return first > 0 or singular(p.low[0]) not in common  # a sentence begins with a capital whatever it says


def _is_thing(p: Parse, first: int, last: int, common: frozenset[str]) -> bool:
    """ "a Mexican Restaurant", "white Dress Shirts": things that someone wrote with capitals."""
    counted = first > 0 and (p.low[first - 1] in ("a", "an") or p.tag[first - 1] in ("JJ", "CD"))
    return counted and p.dep[last] != "compound" and singular(p.low[last]) in common


def _missed(p: Parse, taken: set[int], common: frozenset[str]) -> Iterator[Name]:
    """Runs of capitalised proper nouns inside a sentence."""
    i = 1
    while i < len(p):
        last = i
        if _proper(p, i) and i not in taken:
            while last + 1 < len(p) and last + 1 not in taken and _proper(p, last + 1):
                last += 1
            counted = (
                last == i and p.tag[i - 1] in ("CD", "JJ") and singular(p.low[i]) in common
            )  # "Four Musicians"
            if not counted and not (last > i and _is_thing(p, i, last, common)):
                yield Name(i, last, "", CONFIDENCE["capitals"])
        i = last + 1


def _proper(p: Parse, i: int) -> bool:
    begins = p.text[i - 1] in (".", "!", "?", ":", '"')
    return (
        p.tag[i] in ("NNP", "NNPS")
        and _capital(p, i)
        and len(p.low[i]) > 1
        and singular(p.low[i]) not in lx.COMMONS
        and not begins
    )
