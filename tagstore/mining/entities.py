"""Proper names in a caption: spaCy's named entities, cleaned, and capitalised names that it misses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tagstore.mining import lexicon as lx
from tagstore.mining.parse import Parse

LABELS = frozenset({"PERSON", "FAC", "ORG", "GPE", "LOC", "PRODUCT", "EVENT", "WORK_OF_ART", "NORP"})
_TRIM = frozenset({"the", "a", "an", "'s", "'", '"', "no", "his", "her", "its", "this", "that"})
CONFIDENCE = {"ner": 0.8, "capitals": 0.7}


@dataclass(frozen=True, slots=True)
class Name:
    """Words `first` to `last` of a parse, both included, as one proper name."""

    first: int
    last: int
    label: str
    confidence: float


def names(p: Parse, doc: Any) -> Iterator[Name]:
    """Entities in order of place, never two over the same word."""
    taken: set[int] = set()
    found: list[Name] = []
    for entity in doc.ents:
        if entity.label_ not in LABELS:
            continue
        first, last = p.word_of[entity.start], p.word_of[entity.end - 1]
        while first <= last and p.low[first] in _TRIM:
            first += 1
        while first <= last and (p.low[last] in _TRIM or not p.low[last][-1].isalnum()):
            last -= 1
        while first <= last and not _capital(p, last):
            last -= 1
        while first <= last and not _capital(p, first):
            first += 1
        if first > last or not _is_name(p, first, last, entity.label_):
            continue
        found.append(Name(first, last, entity.label_, CONFIDENCE["ner"]))
        taken.update(range(first, last + 1))
    i = 1
    while i < len(p):
        last = i
        if _missed(p, i) and i not in taken:
            while last + 1 < len(p) and last + 1 not in taken and _missed(p, last + 1):
                last += 1
            found.append(Name(i, last, "", CONFIDENCE["capitals"]))
        i = last + 1
    yield from sorted(found, key=lambda name: name.first)


def _capital(p: Parse, i: int) -> bool:
    return p.text[i][0].isupper()


def _is_name(p: Parse, first: int, last: int, label: str) -> bool:
    if label == "NORP" and p.tag[last] in ("JJ", "NNS", "NNP"):
        return False
    if first == last:
        if p.low[first] in lx.COMMONS or p.low[first] in lx.COLOURS:
            return False
        if first == 0 and p.tag[first] not in ("NNP", "NNPS"):
            return False
        if first == 0 and p.text[first + 1 : first + 2] and p.dep[first] == "nsubj" and label == "PERSON":
            return True
    return True


def _missed(p: Parse, i: int) -> bool:
    """A capitalised proper noun inside a sentence."""
    low = p.low[i]
    return (
        p.tag[i] in ("NNP", "NNPS")
        and _capital(p, i)
        and low not in lx.COMMONS
        and len(low) > 1
        and p.text[i - 1] not in (".", "!", "?", ":")
    )
