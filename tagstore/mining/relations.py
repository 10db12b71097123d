"""Relations between nouns: "man riding horse", "cat on table".

Off by default: there are many, and few occur twice."""

from __future__ import annotations

from collections.abc import Iterator

from tagstore.mining import lexicon
from tagstore.mining.denials import is_denied
from tagstore.mining.noun_phrases import (
    CONFIDENCE,
    Phrase,
    is_head,
    is_verb,
    is_visible,
    noun_phrase_at,
)
from tagstore.mining.parse import Parse

_PREPOSITIONS = frozenset({
    "in", "on", "under", "over", "above", "below", "behind", "beside", "near", "by", "inside", "outside",
    "with", "at", "through", "across", "against", "along", "around", "into", "onto",
})  # fmt: skip


def relation_phrases(p: Parse, named: frozenset[int]) -> Iterator[Phrase]:
    """Subject, verb and object; subject, verb, preposition and object; or noun, preposition and object."""
    for i in range(len(p)):
        if p.tag[i][:2] == "VB" and not any(p.dep[k] == "neg" for k in p.children[i]):
            for subject in _subjects(p, i):
                for word, target in _targets(p, i):
                    yield from _relation(p, subject, word, target, named)
        elif p.dep[i] == "prep" and p.lower[i] in _PREPOSITIONS and p.is_noun(p.head[i]):
            for target in _objects(p, i, "pobj"):
                yield from _relation(p, p.head[i], p.lower[i], target, named)


def _relation(p: Parse, subject: int, word: str, target: int, named: frozenset[int]) -> Iterator[Phrase]:
    ends = []
    for i in (subject, target):
        noun = noun_phrase_at(p, i, named)
        if (
            not is_head(p, i)
            or is_verb(p, i)
            or is_denied(p, i)
            or not is_visible(p, noun)
            or p.lower[i] in lexicon.MEASURES
        ):
            return
        ends.append(noun)
    first, last = ends
    start, end = min(p.start[first.first], p.start[last.first]), max(p.end[first.head], p.end[last.head])
    text, lemma = f"{first.text} {word} {last.text}", f"{first.lemma} {word} {last.lemma}"
    yield Phrase(text, "relation", start, end, CONFIDENCE["relation"], lemma)


def _subjects(p: Parse, verb: int) -> Iterator[int]:
    """The subjects of the verb at word `verb`."""
    if p.dep[verb] in ("acl", "relcl") and p.is_noun(p.head[verb]) and p.tag[verb] != "VBN":
        yield p.head[verb]
    if (
        p.dep[verb] in ("conj", "advcl", "xcomp")
        and p.child(verb, "nsubj") < 0
        and p.tag[p.head[verb]][:2] == "VB"
    ):
        yield from _objects(p, p.head[verb], "nsubj")
    yield from _objects(p, verb, "nsubj")


def _targets(p: Parse, verb: int) -> Iterator[tuple[str, int]]:
    """The objects of a verb, each with the verb, or the verb and preposition, that leads to it."""
    doing = progressive(p.lower[verb], p.tag[verb])
    for target in _objects(p, verb, "dobj"):
        yield doing, target
    for k in p.children[verb]:
        if p.dep[k] == "prep" and p.lower[k] in _PREPOSITIONS:
            for target in _objects(p, k, "pobj"):
                yield f"{doing} {p.lower[k]}", target


def _objects(p: Parse, i: int, dep: str) -> Iterator[int]:
    for k in p.children[i]:
        if p.dep[k] == dep and p.is_noun(k):
            yield k
            yield from (c for c in p.children[k] if p.dep[c] == "conj" and p.is_noun(c))


def progressive(verb: str, tag: str) -> str:
    """The -ing form of a verb in the present tense: "rides" -> "riding"; other forms stay."""
    base = verb
    if tag == "VBZ" and verb.endswith("ies") and len(verb) > 4:
        base = verb[:-3] + "y"
    elif tag == "VBZ":
        base = (
            verb[:-2]
            if verb.endswith(("shes", "ches", "sses", "xes", "zzes", "oes"))
            else verb.removesuffix("s")
        )
    elif tag not in ("VBP", "VB"):
        return verb
    if base.endswith("ie"):
        return base[:-2] + "ying"
    if base.endswith("e") and not base.endswith(("ee", "ye", "oe")):
        return base[:-1] + "ing"
    doubled = (
        3 <= len(base) <= 4 and base[-1] not in "aeiouwxy" and base[-2] in "aeiou" and base[-3] not in "aeiou"
    )
    return base + (base[-1] if doubled else "") + "ing"
