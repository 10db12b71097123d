"""Objects and their attributes, read from a parse."""

from __future__ import annotations

from collections.abc import Iterator

from tagstore.mining import lexicon as lx
from tagstore.mining.noun_phrases import (
    CONFIDENCE,
    Found,
    Thing,
    acts,
    content,
    is_head,
    measures,
    negated,
    thing_at,
    visible,
)
from tagstore.mining.parse import NOUNS, Parse

_DIGITS = {
    "2": "two",
    "3": "three",
    "4": "four",
    "5": "five",
    "6": "six",
    "7": "seven",
    "8": "eight",
    "9": "nine",
    "10": "ten",
}
_COPULAS = frozenset(
    {
        "is",
        "are",
        "was",
        "were",
        "be",
        "being",
        "been",
        "'s",
        "'re",
        "looks",
        "look",
        "looking",
        "seems",
        "seem",
        "appears",
        "appear",
    }
)
_AGES = frozenset({"year", "years", "month", "months"})
_HOLDERS = lx.CONTAINERS | lx.PARTITIVES
_LOOKS = lx.COLOURS | lx.ADJECTIVES
_BETWEEN = _LOOKS | lx.SHADES
_SAYS_NOTHING = lx.PREDICATES | lx.VAGUE
_MODIFIERS = frozenset({"amod", "compound", "nmod", "nummod", "det", "dep", "poss"})


def phrases(p: Parse, named: frozenset[int]) -> Iterator[Found]:
    """Objects and attributes of a caption; `named` are the words of its entities, which are no objects."""
    for i, tag in enumerate(p.tag):
        if tag not in NOUNS or i in named or not is_head(p, i) or negated(p, i):
            continue
        thing = thing_at(p, i, named)
        inner = content(p, i)
        phrase = inner >= 0 and p.low[i] in _HOLDERS and inner not in named and not negated(p, inner)
        if not (inner >= 0 and p.low[i] in lx.MEASURES) and visible(p, thing):
            yield from _thing(p, thing, named)
        if phrase:
            yield _phrase(p, thing, thing_at(p, inner, named))


def _thing(p: Parse, thing: Thing, named: frozenset[int]) -> Iterator[Found]:
    counted = _count(p, thing.head)
    # where a count says the number, the object itself is shown in the singular: "two dogs", "dog"
    shown = thing.folded if counted >= 0 else thing.text
    yield Found(shown, "object", p.start[thing.first], p.end[thing.head], CONFIDENCE["object"], thing.folded)
    if counted >= 0:
        yield _joined(p, thing, counted, counted, "count", _DIGITS.get(p.low[counted], p.low[counted]))
    for first, last, pattern in _attributes(p, thing):
        if last in named:
            continue
        yield _joined(p, thing, first, last, pattern, " ".join(p.low[first : last + 1]))


def _joined(p: Parse, thing: Thing, first: int, last: int, pattern: str, folded: str) -> Found:
    words = " ".join(p.low[first : last + 1])
    start, end = min(p.start[first], p.start[thing.first]), max(p.end[last], p.end[thing.head])
    return Found(
        f"{words} {thing.text}", "attribute", start, end, CONFIDENCE[pattern], f"{folded} {thing.folded}"
    )


def _phrase(p: Parse, outer: Thing, inner: Thing) -> Found:
    """ "cup of coffee"."""
    text, folded = f"{outer.text} of {inner.text}", f"{outer.folded} of {inner.folded}"
    return Found(text, "object", p.start[outer.first], p.end[inner.head], CONFIDENCE["phrase"], folded)


def _count(p: Parse, i: int) -> int:
    """The word that counts word `i` ("two" of "two dogs"), or -1."""
    for k in p.kids[i]:
        number = p.low[k]
        if (
            p.dep[k] == "nummod"
            and k < i
            and (
                number in lx.NUMBERS or (number.isascii() and number.isdigit() and 2 <= int(number[:4]) <= 99)
            )
        ):
            return k
    return -1


def _attributes(p: Parse, thing: Thing) -> Iterator[tuple[int, int, str]]:
    """`(first word, last word, pattern)` of each adjective, participle or colour of a thing."""
    queue = [k for j in range(thing.first, thing.head + 1) for k in p.kids[j] if k < thing.first]
    if thing.head + 1 < len(p) and acts(
        p, thing.head + 1
    ):  # "a red scarf smiles": what hangs on the verb is the scarf's
        queue += [k for k in p.kids[thing.head + 1] if k < thing.first and p.dep[k] == "amod"]
    # "a green white engine", "a white metal fence": the first word may hang on the second
    queue += [
        k for a in queue if p.low[a] in _LOOKS or p.tag[a] == "JJ" for k in p.kids[a] if p.dep[k] == "amod"
    ]
    # "a red pair of scissors"
    queue += [k for measure in measures(p, thing.head) for k in p.kids[measure] if p.low[k] in lx.COLOURS]
    seen: set[int] = set()
    for k in sorted(queue):
        if p.dep[k] not in _MODIFIERS or not _describes(p, k):
            continue
        for a in (k, *_conjuncts(p, k, thing.first)):
            after = (
                p.low[a + 1] if a + 1 < thing.first else ""
            )  # "light blue", "bald headed": the first is no attribute of its own
            shade = (p.low[a] in lx.SHADES and after in lx.COLOURS) or (
                after in lx.BARE and p.head[a] >= a + 1
            )
            first = _prefix(p, a)
            if (
                a not in seen
                and first >= 0
                and not shade
                and _describes(p, a)
                and _touches(p, a, thing.first)
            ):
                seen.add(a)
                yield first, a, "participle" if p.tag[a] in ("VBN", "VBG") else "attribute"
    for first, last, pattern in (*_participles(p, thing), *_predicates(p, thing)):
        if last not in seen:
            seen.add(last)
            yield first, last, pattern


def _describes(p: Parse, a: int) -> bool:
    low, tag, dep = p.low[a], p.tag[a], p.dep[a]
    if low in lx.VAGUE or not low[0].isalpha():
        return False
    if low in lx.COLOURS or (low in lx.ADJECTIVES and dep in ("amod", "compound", "nmod")):
        return True
    return tag in ("JJ", "JJR", "JJS", "VBN", "VBG", "VBD") or (
        dep == "amod" and tag == "RB" and not low.endswith("ly")
    )


def _touches(p: Parse, a: int, before: int) -> bool:
    """Whether no other thing or action stands between the attribute at word `a` and the name that begins at `before`."""
    if p.tag[a] == "VBG" and a > 0 and p.is_noun(a - 1):  # "a man in uniform holding rifles"
        return False
    return p.low[p.head[a]] in lx.MEASURES or not any(
        (p.tag[j] in ("NN", "NNS") and p.low[j] not in _BETWEEN and not j < p.head[j] < before)
        or p.tag[j] in ("VBZ", "VBP", "IN")
        for j in range(a + 1, before)
    )


def _conjuncts(p: Parse, a: int, before: int) -> Iterator[int]:
    waiting = [a]
    while waiting:
        for k in p.kids[waiting.pop(0)]:
            if p.dep[k] == "conj" and k < before:
                waiting.append(k)
                yield k


def _prefix(p: Parse, a: int) -> int:
    """Where the attribute that ends at word `a` begins ("light blue", "snow covered"), or -1 if it says nothing alone or is an age."""
    first = a
    while first > 0:
        j = first - 1
        if p.low[j] in _AGES:
            return -1
        shade = p.low[a] in lx.COLOURS and p.low[j] in lx.SHADES and p.head[j] >= a
        affixed = (
            first == a
            and p.low[a] in lx.AFFIXED
            and p.head[j] >= a
            and p.tag[j] in ("JJ", "NN", "NNS", "NNP", "RB", "CD", "VBN")
        )
        noun = p.head[j] == a and p.dep[j] in ("npadvmod", "compound", "nmod") and p.is_noun(j)
        name = (
            p.head[j] == a
            and p.tag[a][:2] == "JJ"
            and j > 0
            and p.text[j][0].isupper()
            and p.text[a][0].isupper()
        )  # "Middle Eastern"
        if not (shade or affixed or noun or name):
            break
        first = j
    return -1 if first == a and p.low[a] in lx.BARE else first


def _participles(p: Parse, thing: Thing) -> Iterator[tuple[int, int, str]]:
    """States that the parser takes for verbs: "snow covered mountain", "a sign and parked motorcycles"; and "cars parked on the street"."""
    for k in p.kids[thing.head]:
        if p.dep[k] == "acl" and p.tag[k] == "VBN" and p.low[k] in lx.STATES and k == thing.head + 1:
            yield k, k, "participle"
    v = p.head[thing.head]
    if p.dep[thing.head] != "dobj" or p.tag[v] not in ("VBD", "VBN"):
        return
    left = min([thing.first, *(k for k in p.kids[thing.head] if k < thing.first)])
    if v + 1 == left and p.dep[left] not in ("det", "poss") and v > 0:
        if p.low[v] in lx.AFFIXED and p.is_noun(v - 1):
            yield v - 1, v, "participle"
        elif p.low[v] in lx.STATES and (p.low[v - 1] in ("and", ",", "of", "with", "some") or v == 0):
            yield v, v, "participle"


def _predicates(p: Parse, thing: Thing) -> Iterator[tuple[int, int, str]]:
    """Adjectives said of a thing: "the sky is blue", "a dog that is wet"."""
    verbs = [p.head[thing.head]] if p.dep[thing.head] == "nsubj" else []
    for k in p.kids[thing.head]:
        if p.dep[k] == "relcl" and any(
            p.dep[s] == "nsubj" and p.low[s] in ("that", "which", "who") for s in p.kids[k]
        ):
            verbs.append(k)
    for verb in verbs:
        if p.low[verb] not in _COPULAS or any(p.dep[k] == "neg" for k in p.kids[verb]):
            continue
        for k in p.kids[verb]:
            if p.dep[k] == "acomp" and k > verb:
                for a in (k, *_conjuncts(p, k, len(p))):
                    denied = any(p.dep[x] == "neg" for x in p.kids[a])
                    if (
                        p.tag[a] in ("JJ", "VBN", "NN")
                        and p.low[a].isalpha()
                        and p.low[a] not in _SAYS_NOTHING
                        and not denied
                    ):
                        yield a, a, "predicate"
