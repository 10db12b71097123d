"""From an answer and the tags of similar pictures to the same answer with one tag put in that is not true."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from tagstore.mining.nouns import singular
from tagstore.mining.vocabulary import Rules
from tagstore.preferences.vocabulary import Spoken, attribute_fits, name_fits, object_fits
from tagstore.types import Kind, Tag

_VOWEL = re.compile(r"(?!uni|use|usu|eu|one\b)[aeiou]|hour|heir", re.IGNORECASE)
"""Beginnings of words that "an" stands before."""
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tag of neighbours, in canonical form."""

    text: str
    kind: Kind
    canonical: str
    relevance: float
    """As the store says."""
    may_be_put_in: bool
    """False if the store itself says that it may be true, or misread."""


@dataclass(frozen=True, slots=True)
class Swap:
    """An answer in which one tag stands where another, true one stood."""

    text: str
    """The answer."""
    kind: Kind
    true: str
    absent: str
    """The tag that was put in."""


def words(text: str, rules: Rules) -> set[str]:
    """The words of a text in canonical form, and pairs of them that follow one another."""
    singles = [rules.preferred("object", singular(word.lower())) for word in _WORD.findall(text)]
    return {*singles, *(f"{a} {b}" for a, b in pairwise(singles))}


def swap(
    answer: str,
    mentions: Sequence[Tag],
    retrieved: Sequence[Candidate],
    spoken: Spoken,
    rules: Rules,
    *,
    seed: str,
) -> Swap | None:
    """Put an absent tag where a true one stands, in all places that it stands; None if none fits.

    Args:
        mentions: tags of the answer, with their places in it.
        retrieved: tags of the neighbours.
        spoken: what is known to be true of the picture, or spoken of at least.
        seed: which of the pairs of tags that fit is taken follows from it.
    """
    relevance = {(tag.kind, tag.canonical): tag.relevance for tag in retrieved}
    candidates = [tag for tag in retrieved if tag.may_be_put_in]
    choices: list[tuple[str, Kind, Candidate]] = []
    for kind, true in sorted({(tag.kind, rules.preferred(tag.kind, tag.canonical)) for tag in mentions}):
        fits = _rule(kind)
        if fits is None:
            continue
        # what fits the picture better than the tag that is true may be true as well
        ceiling = relevance.get((kind, true), float("inf"))
        for other in candidates:
            if other.kind == kind and other.relevance < ceiling and fits(true, other.canonical, spoken):
                choices.append((true, kind, other))
    random.Random(seed).shuffle(choices)
    for true, kind, other in choices:
        places = [
            tag.span
            for tag in mentions
            if tag.kind == kind and rules.preferred(kind, tag.canonical) == true and tag.span != (0, 0)
        ]
        text = _replaced(answer, places, kind, other)
        if text is not None:
            return Swap(text, kind, true, other.canonical)
    return None


def _rule(kind: Kind) -> Callable[[str, str, Spoken], bool] | None:
    if kind == "object":
        return object_fits
    if kind == "attribute":
        return attribute_fits
    if kind in ("entity", "custom"):
        return lambda true, absent, spoken: true != absent and name_fits(absent, spoken)
    return None


def _replaced(answer: str, places: Sequence[tuple[int, int]], kind: Kind, other: Candidate) -> str | None:
    """The answer with a tag at these places; None if it cannot be written there in the same number."""
    text = answer
    for start, end in sorted(set(places), reverse=True):
        written = _as_written(answer[start:end], kind, other)
        if written is None:
            return None
        before = _with_article(text[:start], written)
        text = before + written + text[end:]
    return text if places and text != answer else None


def _as_written(surface: str, kind: Kind, other: Candidate) -> str | None:
    """A tag as it is written where `surface` stood: singular or plural, capitalised or not."""
    if kind in ("entity", "custom"):
        return other.text
    if kind == "attribute":
        quality, thing = other.canonical.rpartition(" ")[0], surface.split()[-1]
        if singular(thing.lower()) != other.canonical.rpartition(" ")[2]:
            return None  # "cars are red": the thing is not the last word
        written: str | None = f"{quality} {thing}"
    else:
        plural = singular(surface.lower()) != surface.lower()
        written = _plural(other.canonical) if plural else other.canonical
    if written and surface[:1].isupper():
        return written[:1].upper() + written[1:]
    return written


@lru_cache(maxsize=4096)
def _plural(noun: str) -> str | None:
    """The plural of a noun, if it is one whose singular is known to be the noun again."""
    endings = [noun + "s", noun + "es"]
    if re.search(r"(s|x|z|ch|sh)$", noun):
        endings.reverse()
    if re.search(r"[^aeiou]y$", noun):
        endings = [noun[:-1] + "ies"]
    if re.search(r"\b(wo)?man$", noun):
        endings = [noun[:-3] + "men"]
    return next((plural for plural in endings if singular(plural) == noun), None)


def _with_article(before: str, word: str) -> str:
    """What stands before a word, with "a" or "an" as it asks for."""
    article = re.search(r"\b([Aa])n?(\s+)$", before)
    if not article:
        return before
    n = "n" if _VOWEL.match(word) else ""
    return before[: article.start()] + article.group(1) + n + article.group(2)
