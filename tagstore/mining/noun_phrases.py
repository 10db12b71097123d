"""What a caption says is there: the noun heads of a parse, each with the words that belong to its name."""

from __future__ import annotations

from typing import NamedTuple

from tagstore.mining import lexicon as lx
from tagstore.mining.nouns import singular
from tagstore.mining.parse import Parse
from tagstore.types import Kind

# How sure a pattern is: a judgement, not a probability; the order is that of how often a pattern misleads on captions.
CONFIDENCE = {
    "object": 0.95,
    "phrase": 0.9,
    "count": 0.95,
    "attribute": 0.95,
    "participle": 0.9,
    "predicate": 0.85,
    "relation": 0.7,
    "ner": 0.85,
    "capitals": 0.7,
    "brand": 0.9,
}

_NEGATIONS = frozenset({"no", "not", "n't", "without", "never", "neither", "nor", "zero"})
_LACK = frozenset(
    {"without", "minus", "sans", "except", "lacking", "lack", "lacks", "absence", "unlike", "free"}
)
_ONE = frozenset({"a", "an", "another", "this", "that", "each", "one"})
_TAKING = frozenset(
    {"take", "taking", "takes", "taken", "took", "get", "getting", "pose", "posing", "snapping"}
)

_SHOWING = frozenset({"shows", "show", "showing", "depicts", "depicting", "features", "captures"})


class Found(NamedTuple):
    """A tag before it is one: offsets are those of the cleaned caption."""

    text: str
    kind: Kind
    start: int
    end: int
    confidence: float
    canonical: str
    label: str = ""


class Thing(NamedTuple):
    """A noun with the words that belong to its name: words `first` to `head`, both included."""

    first: int
    head: int
    text: str
    folded: str


def is_head(p: Parse, i: int) -> bool:
    """Whether word `i` is a noun that is not the first part of another noun's name."""
    if not p.is_noun(i) or len(p.low[i]) < 2 or not p.low[i][0].isalpha() or acts(p, i):
        return False
    if i + 1 < len(p) and p.is_noun(i + 1):
        pair = f"{p.low[i]} {p.low[i + 1]}" in lx.LEXICAL or p.low[i] in lx.ADJECTIVES
        if pair or (
            i > 0 and p.head[i] == i + 1 and f"{p.low[i - 1]} {p.low[i]}" in lx.LEXICAL
        ):  # "hot dog stand"
            return False
    head, dep = p.head[i], p.dep[i]
    if (
        dep in ("compound", "nmod", "amod")
        and head > i
        and p.is_noun(head)
        and not (head == i + 1 and acts(p, head))
    ):
        return False
    if p.low[i] in lx.COLOURS:  # "dressed in red" names no thing, "an orange" does
        return p.low[i] == "orange" and any(p.dep[k] in ("det", "amod", "compound") for k in p.kids[i])
    return not (dep == "npadvmod" and head > i)


def acts(p: Parse, i: int) -> bool:
    """Whether the "noun" at word `i` is a verb: "a woman in a scarf smiles", "his singing"."""
    low = p.low[i]
    if low.endswith("ing"):
        return singular(low) not in lx.THINGS_ING
    if "ing-" in low:
        return True
    if p.tag[i] != "NNS" or not (low in lx.VERBS_S or low in lx.VERBS_AFTER_A):
        return False
    if any(p.low[k] in _ONE and p.dep[k] == "det" for k in p.kids[i]):  # "a ... smiles" is no plural
        return True
    if low not in lx.VERBS_S:
        return False
    compound = any(p.dep[k] == "compound" and k == i - 1 for k in p.kids[i])
    if (
        compound
        and low in lx.VERBS_ONLY
        and i + 1 < len(p)
        and p.tag[i + 1] in ("IN", "DT", "RP", "PRP$", "RB")
    ):
        return True
    return p.dep[i] not in ("pobj", "dobj") and not any(
        p.dep[k] in ("amod", "nummod", "compound", "det", "poss") for k in p.kids[i]
    )


def thing_at(p: Parse, i: int, named: frozenset[int] = frozenset()) -> Thing:
    """The noun at word `i` with its name: "hot dog stand" from "stand"."""
    first = i
    while first > 0 and first - 1 not in named and _belongs(p, first - 1, first, i):
        first -= 1
    text = " ".join(p.low[first : i + 1])
    plural = p.tag[i] in ("NNS", "NNPS") or p.low[i].endswith(("people", "men"))
    return Thing(first, i, text, singular(text) if plural else text)


def _belongs(p: Parse, j: int, after: int, head: int) -> bool:
    """Whether word `j`, just before `after`, is part of the name that ends at `head`."""
    low = p.low[j]
    if f"{low} {p.low[after]}" in lx.LEXICAL:
        return True
    if not j < p.head[j] <= head:
        return False
    if j > 0 and f"{p.low[j - 1]} {low}" in lx.LEXICAL:  # "german shepherd dog"
        return True
    if low in lx.COLOURS or low in lx.ADJECTIVES or not low[0].isalnum():
        return False
    named = low in lx.GERUNDS or singular(low) in lx.THINGS_ING
    if (
        low.endswith("ing") and not named and j > 0 and p.is_noun(j - 1)
    ):  # "soldiers in uniform holding rifles"
        return False
    if p.dep[j] in ("compound", "nmod") and (p.is_noun(j) or p.tag[j] == "VBG"):
        return not (p.tag[j] == "VBG" and singular(p.low[head]) in lx.ANIMATE)
    if p.dep[j] == "amod" and p.tag[j] == "VBG":
        return low in lx.GERUNDS and singular(p.low[head]) not in lx.ANIMATE
    return (
        p.dep[j] == "amod"
        and p.tag[j] in ("NN", "NNP")
        and low.isalpha()
        and (named or not low.endswith("ing"))
    )


def content(p: Parse, i: int) -> int:
    """The word Y of "X of Y" for X at word `i`, or -1."""
    for k in p.kids[i]:
        if p.low[k] == "of" and k > i:
            inner = p.child(k, "pobj")
            if inner >= 0 and p.is_noun(inner):
                return inner
    return -1


def measures(p: Parse, i: int) -> list[int]:
    """Words X of "X of Y" for Y at word `i`, where X only says how much of it there is."""
    of = p.head[i]
    return (
        [p.head[of]] if p.dep[i] == "pobj" and p.low[of] == "of" and p.low[p.head[of]] in lx.MEASURES else []
    )


def visible(p: Parse, thing: Thing) -> bool:
    """Not a position, an abstraction, or the picture itself."""
    i = thing.head
    low = p.low[i]
    if thing.text in lx.LEXICAL:
        return True
    if low in lx.ABSTRACT:
        return False
    if low in lx.POSITIONS:
        return thing.first < i
    if low in lx.PICTURES:
        taken = p.dep[i] == "dobj" and p.low[p.head[i]] in _TAKING
        shows = p.dep[i] == "nsubj" and (content(p, i) >= 0 or p.low[p.head[i]] in _SHOWING)
        pointed = p.dep[i] == "pobj" and any(p.low[k] in ("this", "the") for k in p.kids[i])
        return not (taken or pointed or shows or p.dep[i] in ("ROOT", "attr"))
    return True


def negated(p: Parse, i: int) -> bool:
    """Whether the caption says that the thing at word `i` is not there."""
    own = False  # "no cars and a bench": a determiner of its own ends the reach of "no", though not of "without"
    for _ in range(4):
        if not own and any(
            p.low[k] in _NEGATIONS
            for k in p.kids[i]
            if k < i and p.dep[k] in ("det", "neg", "preconj", "advmod", "cc")
        ):
            return True
        head, dep = p.head[i], p.dep[i]
        if head == i:
            return False
        if dep == "conj":
            own = own or any(p.dep[k] in ("det", "nummod", "poss") for k in p.kids[i])
            i = head
            continue
        if p.low[head] in _LACK:
            return True
        if dep == "pobj" and p.low[head] == "of":
            return p.low[p.head[head]] in _LACK
        if dep in ("dobj", "attr", "oprd") and any(p.dep[k] == "neg" for k in p.kids[head]):
            return True
        return (
            dep == "nsubj"
            and any(p.low[k] == "any" for k in p.kids[i])
            and any(p.dep[k] == "neg" for k in p.kids[head])
        )
    return False
