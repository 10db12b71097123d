"""Objects and their attributes, read from a parse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tagstore.mining import lexicon as lx
from tagstore.mining.nouns import singular
from tagstore.mining.parse import NOUNS, Parse
from tagstore.types import Kind

# How sure a pattern is: its precision on the captions that the rules were developed on, rounded down.
CONFIDENCE = {
    "object": 0.95,
    "phrase": 0.9,
    "count": 0.95,
    "attribute": 0.9,
    "participle": 0.85,
    "predicate": 0.85,
    "relation": 0.7,
    "brand": 0.8,
}

_DIGITS = dict(
    zip(
        ["2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12"],
        ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"],
        strict=True,
    )
)
_NEGATIONS = frozenset({"no", "not", "n't", "without", "never", "neither", "nor", "zero"})
_ONE = frozenset({"a", "an", "another", "this", "that", "each", "one"})
_LACK = frozenset({"without", "minus", "sans", "except", "lacking", "lack", "absence", "unlike"})
_COPULAS = frozenset(
    {"is", "are", "was", "were", "be", "being", "been", "'s", "'re", "looks", "look", "looking", "seems", "seem", "appears", "appear"}
)


@dataclass(frozen=True, slots=True)
class Found:
    """A tag before it is one: offsets are those of the cleaned caption."""

    text: str
    kind: Kind
    start: int
    end: int
    confidence: float
    canonical: str


@dataclass(frozen=True, slots=True)
class Thing:
    """A noun with the words that belong to its name: `first` to `head`, both included."""

    first: int
    head: int
    text: str
    folded: str


def phrases(p: Parse, named: frozenset[int]) -> Iterator[Found]:
    """Objects and attributes of a caption; `named` are the words of its entities, which are no objects."""
    for i in range(len(p)):
        if not _is_head(p, i) or i in named or negated(p, i):
            continue
        thing = thing_at(p, i, named)
        content = _content(p, i)
        if content >= 0 and p.low[i] in lx.MEASURES:
            if p.low[i] in lx.PARTITIVES and not negated(p, content) and content not in named:
                yield from _phrase(p, thing, thing_at(p, content, named))
            continue
        if not _is_thing(p, thing, content):
            continue
        counted = _count(p, i)
        shown = thing.folded if counted >= 0 else thing.text
        yield Found(shown, "object", p.start[thing.first], p.end[i], CONFIDENCE["object"], thing.folded)
        if counted >= 0:
            number = _DIGITS.get(p.low[counted], p.low[counted])
            yield _joined(p, thing, counted, counted, "count", f"{number} {thing.folded}")
        for first, last, pattern in _attributes(p, thing):
            word = " ".join(p.low[first : last + 1])
            yield _joined(p, thing, first, last, pattern, f"{word} {thing.folded}")
        if content >= 0 and p.low[i] in lx.CONTAINERS | lx.PARTITIVES and content not in named and not negated(p, content):
            yield from _phrase(p, thing, thing_at(p, content, named))


def thing_at(p: Parse, i: int, named: frozenset[int]) -> Thing:
    """The noun at word `i` with its name: "hot dog stand" from "stand"."""
    first = i
    while first > 0 and first - 1 not in named and _belongs(p, first - 1, first, i):
        first -= 1
    text = " ".join(p.low[first : i + 1])
    return Thing(first, i, text, singular(text) if p.tag[i] in ("NNS", "NNPS") or p.low[i] in ("people", "men", "women") else text)


def negated(p: Parse, i: int) -> bool:
    """Whether the caption says that the thing at word `i` is not there."""
    for _ in range(4):
        if any(p.low[k] in _NEGATIONS for k in p.kids[i] if k < i and p.dep[k] in ("det", "neg", "preconj", "advmod", "cc")):
            return True
        head, dep = p.head[i], p.dep[i]
        if head == i:
            return False
        if dep == "conj":
            i = head
            continue
        if p.low[head] in _LACK:
            return True
        if dep == "pobj" and p.low[head] == "of":
            return p.low[p.head[head]] in _LACK
        denied = any(p.dep[k] == "neg" and p.low[k] != "never" for k in p.kids[head])
        if dep in ("dobj", "attr", "nsubj", "oprd") and denied:
            return dep != "nsubj" or any(p.low[k] == "any" for k in p.kids[i])
        return False
    return False


def _is_head(p: Parse, i: int) -> bool:
    """A noun that is not the first part of another noun's name."""
    if not p.is_noun(i) or len(p.low[i]) < 2 or not p.low[i][0].isalpha():
        return False
    head = p.head[i]
    if _acts(p, i) or (
        p.dep[i] in ("compound", "nmod", "amod") and head > i and p.is_noun(head) and not (head == i + 1 and _acts(p, head))
    ):
        return False
    if p.low[i] in lx.COLOURS:  # "dressed in red" names no thing; "an orange" does
        return any(p.dep[k] in ("det", "amod", "compound") for k in p.kids[i]) and p.low[i] in ("orange",)
    return not (p.dep[i] == "npadvmod" and head > i)


def _acts(p: Parse, i: int) -> bool:
    """Whether the "noun" at word `i` is a verb: "a woman in a scarf smiles", "his singing"."""
    low = p.low[i]
    if low.endswith("ing"):
        return singular(low) not in lx.THINGS_ING
    if "ing-" in low:
        return True
    if low not in lx.VERBS_S or p.tag[i] != "NNS":
        return False
    if any(p.low[k] in _ONE and p.dep[k] == "det" for k in p.kids[i]):  # "a ... smiles" is no plural
        return True
    return p.dep[i] not in ("pobj", "dobj") and not any(p.dep[k] in ("amod", "nummod", "compound", "det", "poss") for k in p.kids[i])


def _belongs(p: Parse, j: int, after: int, head: int) -> bool:
    """Whether word `j`, just before `after`, is part of the name that ends at `head`."""
    low = p.low[j]
    if f"{low} {p.low[after]}" in lx.LEXICAL:
        return True
    if not j < p.head[j] <= head or low in lx.COLOURS or low in lx.ADJECTIVES or low in ("male", "female") or p.text[j] in (",", '"', "'"):
        return False
    if p.dep[j] in ("compound", "nmod") and (p.is_noun(j) or p.tag[j] == "VBG"):
        return not (p.tag[j] == "VBG" and p.low[head] in lx.ANIMATE)
    if p.tag[j] == "VBG" and p.dep[j] == "amod":
        return low in lx.GERUNDS and singular(p.low[head]) not in lx.ANIMATE
    return p.dep[j] == "amod" and p.tag[j] in ("NN", "NNP") and low.isalpha()


def _content(p: Parse, i: int) -> int:
    """Y of "X of Y" for X at word `i`, or -1."""
    for k in p.kids[i]:
        if p.low[k] == "of" and k > i:
            inner = p.child(k, "pobj")
            if inner >= 0 and p.is_noun(inner):
                return inner
    return -1


def _is_thing(p: Parse, thing: Thing, content: int) -> bool:
    """Not a position, an abstraction, or the picture itself."""
    low, i = p.low[thing.head], thing.head
    if thing.text in lx.LEXICAL:
        return True
    if low in lx.ABSTRACT:
        return False
    if low in lx.POSITIONS:
        return thing.first < i
    if low in lx.PICTURES:
        verb = p.low[p.head[i]]
        made = p.dep[i] == "dobj" and verb in ("take", "taking", "takes", "taken", "took", "get", "getting", "pose", "posing", "snapping")
        shown = p.dep[i] in ("ROOT", "nsubj", "attr") or (p.dep[i] == "pobj" and any(p.low[k] in ("this", "the") for k in p.kids[i]))
        return not (made or (shown and (content >= 0 or p.dep[i] != "nsubj")) or thing.first == i == 0)
    return True


def _count(p: Parse, i: int) -> int:
    """The word that counts word `i` ("two" of "two dogs"), or -1."""
    for k in p.kids[i]:
        if p.dep[k] == "nummod" and k < i and (p.low[k] in lx.NUMBERS or (p.low[k].isdigit() and 2 <= int(p.low[k]) <= 99)):
            return k
    return -1


def _attributes(p: Parse, thing: Thing) -> Iterator[tuple[int, int, str]]:
    """`(first word, last word, pattern)` of each adjective, participle or colour of a thing."""
    seen: set[int] = set()
    queue = [k for j in range(thing.first, thing.head + 1) for k in p.kids[j] if k < thing.first]
    # "a green white engine", "a white metal fence": the first word may hang on the second
    queue += [k for a in queue if p.low[a] in lx.COLOURS or p.low[a] in lx.ADJECTIVES for k in p.kids[a] if p.dep[k] == "amod"]
    for measure in _measured_by(p, thing.head):
        queue += [k for k in p.kids[measure] if p.low[k] in lx.COLOURS]
    for k in sorted(queue):
        if p.dep[k] not in ("amod", "compound", "nmod", "nummod", "det", "dep", "poss") or not _describes(p, k):
            continue
        for a in (k, *_conjuncts(p, k, thing.first)):
            if a not in seen and _describes(p, a):
                first = _prefix(p, a)
                if first >= 0 and not (p.low[a] in lx.SHADES and a + 1 < thing.first and p.low[a + 1] in lx.COLOURS):
                    seen.add(a)
                    yield first, a, "participle" if p.tag[a] in ("VBN", "VBG") else "attribute"
    yield from ((a, a, "predicate") for a in _predicates(p, thing) if a not in seen)


def _describes(p: Parse, a: int) -> bool:
    low, tag, dep = p.low[a], p.tag[a], p.dep[a]
    if low in lx.VAGUE or not low[0].isalpha():
        return False
    if low in lx.COLOURS or low in ("male", "female"):
        return True
    if low in lx.ADJECTIVES and dep in ("amod", "compound", "nmod"):
        return True
    return tag in ("JJ", "JJR", "JJS", "VBN", "VBG", "VBD") or (dep == "amod" and tag == "RB" and not low.endswith("ly"))


def _conjuncts(p: Parse, a: int, before: int) -> Iterator[int]:
    for k in p.kids[a]:
        if p.dep[k] == "conj" and k < before:
            yield k
            yield from _conjuncts(p, k, before)


def _prefix(p: Parse, a: int) -> int:
    """Where the attribute that ends at word `a` begins ("light blue", "snow covered"), or -1 if it says nothing alone or is an age."""
    first = a
    while first > 0:
        j = first - 1
        if p.low[j] in ("year", "years", "month", "months"):
            return -1
        if p.low[a] in lx.COLOURS and p.low[j] in lx.SHADES and p.head[j] >= a:
            first = j
        elif p.low[a] in lx.AFFIXED and first == a and p.head[j] >= a and p.tag[j] in ("JJ", "NN", "NNS", "NNP", "RB", "CD", "VBN"):
            first = j
        elif p.head[j] == a and p.dep[j] in ("npadvmod", "compound", "nmod") and p.is_noun(j):
            first = j
        elif p.head[j] == a and p.tag[a][:2] == "JJ" and p.text[j][0].isupper() and p.text[a][0].isupper():  # "Middle Eastern"
            first = j
        else:
            break
    return -1 if first == a and p.low[a] in lx.BARE else first


def _measured_by(p: Parse, i: int) -> Iterator[int]:
    """X of "X of Y" for Y at word `i`, where X only says how much."""
    of = p.head[i]
    if p.dep[i] == "pobj" and p.low[of] == "of" and p.low[p.head[of]] in lx.MEASURES:
        yield p.head[of]


def _predicates(p: Parse, thing: Thing) -> Iterator[int]:
    """Adjectives said of a thing: "the sky is blue"; and its state after it: "cars parked on the street"."""
    i = thing.head
    verbs = []
    if p.dep[i] == "nsubj":
        verbs.append(p.head[i])
    for k in p.kids[i]:
        if p.dep[k] == "relcl" and any(p.dep[s] == "nsubj" and p.low[s] in ("that", "which", "who") for s in p.kids[k]):
            verbs.append(k)
        if p.dep[k] == "acl" and p.tag[k] == "VBN" and p.low[k] in lx.STATES and k == i + 1:
            yield k
    for verb in verbs:
        if p.low[verb] not in _COPULAS or any(p.dep[k] == "neg" for k in p.kids[verb]):
            continue
        for k in p.kids[verb]:
            if p.dep[k] == "acomp" and k > verb:
                for a in (k, *_conjuncts(p, k, len(p))):
                    if (
                        p.tag[a] in ("JJ", "VBN", "NN")
                        and p.low[a] not in lx.PREDICATES | lx.VAGUE
                        and not any(p.dep[x] == "neg" for x in p.kids[a])
                    ):
                        yield a


def _joined(p: Parse, thing: Thing, first: int, last: int, pattern: str, canonical: str) -> Found:
    words = " ".join(p.low[first : last + 1])
    start, end = min(p.start[first], p.start[thing.first]), max(p.end[last], p.end[thing.head])
    return Found(f"{words} {thing.text}", "attribute", start, end, CONFIDENCE[pattern], canonical)


def _phrase(p: Parse, outer: Thing, inner: Thing) -> Iterator[Found]:
    """ "cup of coffee"."""
    text, folded = f"{outer.text} of {inner.text}", f"{outer.folded} of {inner.folded}"
    yield Found(text, "object", p.start[outer.first], p.end[inner.head], CONFIDENCE["phrase"], folded)
