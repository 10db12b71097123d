"""The nouns of a parse that name something in the picture, each with the words that belong to its name."""

from __future__ import annotations

from typing import NamedTuple

from tagstore.mining import lexicon
from tagstore.mining.nouns import singular
from tagstore.mining.parse import Parse
from tagstore.types import Kind

# Score of the tags of each pattern: a judgement, not a probability. Patterns that mislead more often have
# less.
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

_SINGULAR_DETERMINERS = frozenset({"a", "an", "another", "this", "that", "each", "one"})
_PHOTOGRAPHING_VERBS = frozenset({
    "take", "taking", "takes", "taken", "took", "get", "getting", "pose", "posing", "snapping",
})  # fmt: skip

_DEPICTING_VERBS = frozenset({"shows", "show", "showing", "depicts", "depicting", "features", "captures"})


class Phrase(NamedTuple):
    """A tag with offsets in the cleaned caption."""

    text: str
    kind: Kind
    start: int
    end: int
    confidence: float
    canonical: str
    label: str = ""


class NounPhrase(NamedTuple):
    """A noun with the words that belong to its name ("hot dog stand"): words `first` to `head`, inclusive."""

    first: int
    head: int
    text: str
    lemma: str
    """The text in the singular."""


def is_head(p: Parse, i: int) -> bool:
    """Whether word `i` is a noun that is not the first part of another noun's name."""
    if not p.is_noun(i) or len(p.lower[i]) < 2 or not p.lower[i][0].isalpha() or is_verb(p, i):
        return False
    if i + 1 < len(p) and p.is_noun(i + 1):
        pair = f"{p.lower[i]} {p.lower[i + 1]}" in lexicon.LEXICAL or p.lower[i] in lexicon.ADJECTIVES
        # "hot dog stand"
        if pair or (i > 0 and p.head[i] == i + 1 and f"{p.lower[i - 1]} {p.lower[i]}" in lexicon.LEXICAL):
            return False
    head, dep = p.head[i], p.dep[i]
    if (
        dep in ("compound", "nmod", "amod")
        and head > i
        and p.is_noun(head)
        and not (head == i + 1 and is_verb(p, head))
    ):
        return False
    if p.lower[i] in lexicon.COLOURS:  # "dressed in red" names no object, "an orange" does
        return p.lower[i] == "orange" and any(p.dep[k] in ("det", "amod", "compound") for k in p.children[i])
    return not (dep == "npadvmod" and head > i)


def is_verb(p: Parse, i: int) -> bool:
    """Whether word `i`, tagged as a noun, is a verb: "a woman in a scarf smiles", "his singing"."""
    word = p.lower[i]
    if word.endswith("ing"):
        return singular(word) not in lexicon.THINGS_ING
    if "ing-" in word:
        return True
    if p.tag[i] != "NNS" or not (word in lexicon.VERBS_S or word in lexicon.VERBS_AFTER_A):
        return False
    if any(
        p.lower[k] in _SINGULAR_DETERMINERS and p.dep[k] == "det" for k in p.children[i]
    ):  # "a ... smiles" is no plural
        return True
    if word not in lexicon.VERBS_S:
        return False
    compound = any(p.dep[k] == "compound" and k == i - 1 for k in p.children[i])
    if (
        compound
        and word in lexicon.VERBS_ONLY
        and i + 1 < len(p)
        and p.tag[i + 1] in ("IN", "DT", "RP", "PRP$", "RB")
    ):
        return True
    return p.dep[i] not in ("pobj", "dobj") and not any(
        p.dep[k] in ("amod", "nummod", "compound", "det", "poss") for k in p.children[i]
    )


def noun_phrase_at(p: Parse, i: int, named: frozenset[int] = frozenset()) -> NounPhrase:
    """The noun at word `i` with the words before it that belong to its name."""
    first = i
    while first > 0 and first - 1 not in named and _belongs(p, first - 1, first, i):
        first -= 1
    text = " ".join(p.lower[first : i + 1])
    plural = p.tag[i] in ("NNS", "NNPS") or p.lower[i].endswith(("people", "men"))
    return NounPhrase(first, i, text, singular(text) if plural else text)


def _belongs(p: Parse, j: int, after: int, head: int) -> bool:
    """Whether word `j`, just before `after`, is part of the name that ends at `head`."""
    word = p.lower[j]
    if f"{word} {p.lower[after]}" in lexicon.LEXICAL:
        return True
    if not j < p.head[j] <= head:
        return False
    if j > 0 and f"{p.lower[j - 1]} {word}" in lexicon.LEXICAL:  # "german shepherd dog"
        return True
    if word in lexicon.COLOURS or word in lexicon.ADJECTIVES or not word[0].isalnum():
        return False
    is_name = word in lexicon.GERUNDS or singular(word) in lexicon.THINGS_ING
    # "soldiers in uniform holding rifles"
    if word.endswith("ing") and not is_name and j > 0 and p.is_noun(j - 1):
        return False
    if p.dep[j] in ("compound", "nmod") and (p.is_noun(j) or p.tag[j] == "VBG"):
        return not (p.tag[j] == "VBG" and singular(p.lower[head]) in lexicon.ANIMATE)
    if p.dep[j] == "amod" and p.tag[j] == "VBG":
        return word in lexicon.GERUNDS and singular(p.lower[head]) not in lexicon.ANIMATE
    return (
        p.dep[j] == "amod"
        and p.tag[j] in ("NN", "NNP")
        and word.isalpha()
        and (is_name or not word.endswith("ing"))
    )


def of_object(p: Parse, i: int) -> int:
    """The noun Y of "X of Y" for X at word `i`, or -1."""
    for k in p.children[i]:
        if p.lower[k] == "of" and k > i:
            inner = p.child(k, "pobj")
            if inner >= 0 and p.is_noun(inner):
                return inner
    return -1


def measure_nouns(p: Parse, i: int) -> list[int]:
    """The measure noun X of "X of Y" ("a pair of scissors") for Y at word `i`, as a list of one or none."""
    of = p.head[i]
    return (
        [p.head[of]]
        if p.dep[i] == "pobj" and p.lower[of] == "of" and p.lower[p.head[of]] in lexicon.MEASURES
        else []
    )


def is_visible(p: Parse, noun: NounPhrase) -> bool:
    """Whether the noun names something in the picture, not a position, an abstraction or the picture."""
    i = noun.head
    word = p.lower[i]
    if noun.text in lexicon.LEXICAL:
        return True
    if word in lexicon.ABSTRACT:
        return False
    if word in lexicon.POSITIONS:
        return noun.first < i
    if word in lexicon.PICTURES:
        photographed = p.dep[i] == "dobj" and p.lower[p.head[i]] in _PHOTOGRAPHING_VERBS
        depicts = p.dep[i] == "nsubj" and (of_object(p, i) >= 0 or p.lower[p.head[i]] in _DEPICTING_VERBS)
        definite = p.dep[i] == "pobj" and any(p.lower[k] in ("this", "the") for k in p.children[i])
        return not (photographed or definite or depicts or p.dep[i] in ("ROOT", "attr"))
    return True
