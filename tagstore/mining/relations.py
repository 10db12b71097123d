"""Who does what with what: "man riding horse", "cat on table". Off unless asked for: relations are many and rarely the same twice."""

from __future__ import annotations

from collections.abc import Iterator

from tagstore.mining import lexicon as lx
from tagstore.mining.noun_phrases import CONFIDENCE, Found, acts, is_head, negated, thing_at, visible
from tagstore.mining.parse import Parse

_PLACES = frozenset(
    [
        "in",
        "on",
        "under",
        "over",
        "above",
        "below",
        "behind",
        "beside",
        "near",
        "by",
        "inside",
        "outside",
        "with",
        "at",
        "through",
        "across",
        "against",
        "along",
        "around",
        "into",
        "onto",
    ]
)


def relations(p: Parse, named: frozenset[int]) -> Iterator[Found]:
    """Subject, verb and object ("man riding horse"), or verb and place ("dog sitting on bench"), or just place ("cat on table")."""
    for i in range(len(p)):
        if p.tag[i][:2] == "VB" and not any(p.dep[k] == "neg" for k in p.kids[i]):
            for subject in _subjects(p, i):
                for word, target in _targets(p, i):
                    yield from _relation(p, subject, word, target, named)
        elif p.dep[i] == "prep" and p.low[i] in _PLACES and p.is_noun(p.head[i]):
            for target in _objects(p, i, "pobj"):
                yield from _relation(p, p.head[i], p.low[i], target, named)


def _relation(p: Parse, subject: int, word: str, target: int, named: frozenset[int]) -> Iterator[Found]:
    ends = []
    for i in (subject, target):
        thing = thing_at(p, i, named)
        if (
            not is_head(p, i)
            or acts(p, i)
            or negated(p, i)
            or not visible(p, thing)
            or p.low[i] in lx.MEASURES
        ):
            return
        ends.append(thing)
    first, last = ends
    start, end = min(p.start[first.first], p.start[last.first]), max(p.end[first.head], p.end[last.head])
    text, folded = f"{first.text} {word} {last.text}", f"{first.folded} {word} {last.folded}"
    yield Found(text, "relation", start, end, CONFIDENCE["relation"], folded)


def _subjects(p: Parse, verb: int) -> Iterator[int]:
    """Nouns that do what the verb at word `verb` says."""
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
    """`(verb or verb + preposition, object)`."""
    doing = progressive(p.low[verb], p.tag[verb])
    for target in _objects(p, verb, "dobj"):
        yield doing, target
    for k in p.kids[verb]:
        if p.dep[k] == "prep" and p.low[k] in _PLACES:
            for target in _objects(p, k, "pobj"):
                yield f"{doing} {p.low[k]}", target


def _objects(p: Parse, i: int, dep: str) -> Iterator[int]:
    for k in p.kids[i]:
        if p.dep[k] == dep and p.is_noun(k):
            yield k
            yield from (c for c in p.kids[k] if p.dep[c] == "conj" and p.is_noun(c))


def progressive(verb: str, tag: str) -> str:
    """The -ing form of a present tense verb, as captions mostly have it: "rides" -> "riding"; other forms stay."""
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
