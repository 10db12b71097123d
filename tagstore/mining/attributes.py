"""Tags of objects and of their attributes, from a parse: "sky", "blue sky", "two dogs", "cup of coffee"."""

from __future__ import annotations

from collections.abc import Iterator

from tagstore.mining import lexicon
from tagstore.mining.denials import is_denied, is_denied_adjective, is_denied_verb
from tagstore.mining.noun_phrases import (
    CONFIDENCE,
    NounPhrase,
    Phrase,
    is_head,
    is_verb,
    is_visible,
    measure_nouns,
    noun_phrase_at,
    of_object,
)
from tagstore.mining.nouns import NUMERALS
from tagstore.mining.parse import NOUNS, Parse

_COPULAS = frozenset({
    "is", "are", "was", "were", "be", "being", "been", "'s", "'re", "looks", "look", "looking", "seems",
    "seem", "appears", "appear",
})  # fmt: skip
_AGE_UNITS = frozenset({"year", "years", "month", "months"})
_CONTAINER_NOUNS = lexicon.CONTAINERS | lexicon.PARTITIVES
_VISUAL_ADJECTIVES = lexicon.COLOURS | lexicon.ADJECTIVES
_MODIFIER_WORDS = _VISUAL_ADJECTIVES | lexicon.SHADES
_EMPTY_PREDICATES = lexicon.PREDICATES | lexicon.VAGUE
_MODIFIER_DEPS = frozenset({"amod", "compound", "nmod", "nummod", "det", "dep", "poss"})


def object_phrases(p: Parse, named: frozenset[int]) -> Iterator[Phrase]:
    """The objects and attributes of a caption; the words of its proper names, `named`, are no objects."""
    for i, tag in enumerate(p.tag):
        if tag not in NOUNS or i in named or not is_head(p, i) or is_denied(p, i):
            continue
        noun = noun_phrase_at(p, i, named)
        inner = of_object(p, i)
        is_phrase = (
            inner >= 0 and p.lower[i] in _CONTAINER_NOUNS and inner not in named and not is_denied(p, inner)
        )
        if not (inner >= 0 and p.lower[i] in lexicon.MEASURES) and is_visible(p, noun):
            yield from _described(p, noun, named)
        if is_phrase:
            yield _of_phrase(p, noun, noun_phrase_at(p, inner, named))


def _described(p: Parse, noun: NounPhrase, named: frozenset[int]) -> Iterator[Phrase]:
    number = _counting_word(p, noun.head)
    # "two dogs" is a tag of its own, so the object is shown in the singular: "dog"
    text = noun.lemma if number >= 0 else noun.text
    yield Phrase(text, "object", p.start[noun.first], p.end[noun.head], CONFIDENCE["object"], noun.lemma)
    if number >= 0:
        yield _attribute_phrase(
            p, noun, number, number, "count", NUMERALS.get(p.lower[number], p.lower[number])
        )
    for first, last, pattern in _attributes(p, noun):
        if last in named:
            continue
        yield _attribute_phrase(p, noun, first, last, pattern, " ".join(p.lower[first : last + 1]))


def _attribute_phrase(p: Parse, noun: NounPhrase, first: int, last: int, pattern: str, lemma: str) -> Phrase:
    words = " ".join(p.lower[first : last + 1])
    start, end = min(p.start[first], p.start[noun.first]), max(p.end[last], p.end[noun.head])
    return Phrase(
        f"{words} {noun.text}", "attribute", start, end, CONFIDENCE[pattern], f"{lemma} {noun.lemma}"
    )


def _of_phrase(p: Parse, outer: NounPhrase, inner: NounPhrase) -> Phrase:
    """ "cup of coffee"."""
    text, lemma = f"{outer.text} of {inner.text}", f"{outer.lemma} of {inner.lemma}"
    return Phrase(text, "object", p.start[outer.first], p.end[inner.head], CONFIDENCE["phrase"], lemma)


def _counting_word(p: Parse, i: int) -> int:
    """The word that counts word `i` ("two" of "two dogs"), or -1."""
    for k in p.children[i]:
        number = p.lower[k]
        if (
            p.dep[k] == "nummod"
            and k < i
            and (
                number in lexicon.NUMBERS
                or (number.isascii() and number.isdigit() and 2 <= int(number[:4]) <= 99)
            )
        ):
            return k
    return -1


def _attributes(p: Parse, noun: NounPhrase) -> Iterator[tuple[int, int, str]]:
    """`(first word, last word, pattern)` of each adjective, participle or colour of a noun."""
    queue = [k for j in range(noun.first, noun.head + 1) for k in p.children[j] if k < noun.first]
    # "a red scarf smiles": adjectives that depend on the verb, tagged as a noun, belong to the scarf
    if noun.head + 1 < len(p) and is_verb(p, noun.head + 1):
        queue += [k for k in p.children[noun.head + 1] if k < noun.first and p.dep[k] == "amod"]
    # "a green white engine", "a white metal fence": the first adjective may depend on the second
    queue += [
        k
        for a in queue
        if p.lower[a] in _VISUAL_ADJECTIVES or p.tag[a] == "JJ"
        for k in p.children[a]
        if p.dep[k] == "amod"
    ]
    # "a red pair of scissors"
    queue += [
        k
        for measure in measure_nouns(p, noun.head)
        for k in p.children[measure]
        if p.lower[k] in lexicon.COLOURS
    ]
    seen: set[int] = set()
    for k in sorted(queue):
        if p.dep[k] not in _MODIFIER_DEPS or not _is_attributive(p, k):
            continue
        for a in (k, *_conjuncts(p, k, noun.first)):
            # "light blue", "bald headed": the first word is no attribute by itself
            after = p.lower[a + 1] if a + 1 < noun.first else ""
            shade = (p.lower[a] in lexicon.SHADES and after in lexicon.COLOURS) or (
                after in lexicon.BARE and p.head[a] >= a + 1
            )
            first = _prefix(p, a)
            if (
                a not in seen
                and first >= 0
                and not shade
                and _is_attributive(p, a)
                and _is_adjacent(p, a, noun.first)
            ):
                seen.add(a)
                yield first, a, "participle" if p.tag[a] in ("VBN", "VBG") else "attribute"
    for first, last, pattern in (*_participles(p, noun), *_predicates(p, noun)):
        if last not in seen:
            seen.add(last)
            yield first, last, pattern


def _is_attributive(p: Parse, a: int) -> bool:
    word, tag, dep = p.lower[a], p.tag[a], p.dep[a]
    if word in lexicon.VAGUE or not word[0].isalpha():
        return False
    if word in lexicon.COLOURS or (word in lexicon.ADJECTIVES and dep in ("amod", "compound", "nmod")):
        return True
    return tag in ("JJ", "JJR", "JJS", "VBN", "VBG", "VBD") or (
        dep == "amod" and tag == "RB" and not word.endswith("ly")
    )


def _is_adjacent(p: Parse, a: int, before: int) -> bool:
    """Whether no other noun or verb stands between the attribute `a` and the noun phrase at `before`."""
    if p.tag[a] == "VBG" and a > 0 and p.is_noun(a - 1):  # "a man in uniform holding rifles"
        return False
    return p.lower[p.head[a]] in lexicon.MEASURES or not any(
        (p.tag[j] in ("NN", "NNS") and p.lower[j] not in _MODIFIER_WORDS and not j < p.head[j] < before)
        or p.tag[j] in ("VBZ", "VBP", "IN")
        for j in range(a + 1, before)
    )


def _conjuncts(p: Parse, a: int, before: int) -> Iterator[int]:
    waiting = [a]
    while waiting:
        for k in p.children[waiting.pop(0)]:
            if p.dep[k] == "conj" and k < before:
                waiting.append(k)
                yield k


def _prefix(p: Parse, a: int) -> int:
    """The first word of the attribute that ends at word `a` ("light blue", "snow covered").

    -1 if it is an age, or means nothing without more words.
    """
    first = a
    while first > 0:
        j = first - 1
        if p.lower[j] in _AGE_UNITS:
            return -1
        shade = p.lower[a] in lexicon.COLOURS and p.lower[j] in lexicon.SHADES and p.head[j] >= a
        affixed = (
            first == a
            and p.lower[a] in lexicon.AFFIXED
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
    return -1 if first == a and p.lower[a] in lexicon.BARE else first


def _participles(p: Parse, noun: NounPhrase) -> Iterator[tuple[int, int, str]]:
    """Participles after the noun ("cars parked on the street"), and those that the parser takes for verbs.

    Such as "snow covered mountain", "a sign and parked motorcycles".
    """
    for k in p.children[noun.head]:
        if p.dep[k] == "acl" and p.tag[k] == "VBN" and p.lower[k] in lexicon.STATES and k == noun.head + 1:
            yield k, k, "participle"
    v = p.head[noun.head]
    if p.dep[noun.head] != "dobj" or p.tag[v] not in ("VBD", "VBN"):
        return
    start = min([noun.first, *(k for k in p.children[noun.head] if k < noun.first)])
    if v + 1 == start and p.dep[start] not in ("det", "poss") and v > 0:
        if p.lower[v] in lexicon.AFFIXED and p.is_noun(v - 1):
            yield v - 1, v, "participle"
        elif p.lower[v] in lexicon.STATES and (
            p.lower[v - 1] in ("and", ",", "of", "with", "some") or v == 0
        ):
            yield v, v, "participle"


def _predicates(p: Parse, noun: NounPhrase) -> Iterator[tuple[int, int, str]]:
    """Predicative adjectives: "the sky is blue", "a dog that is wet"."""
    verbs = [p.head[noun.head]] if p.dep[noun.head] == "nsubj" else []
    for k in p.children[noun.head]:
        if p.dep[k] == "relcl" and any(
            p.dep[s] == "nsubj" and p.lower[s] in ("that", "which", "who") for s in p.children[k]
        ):
            verbs.append(k)
    for verb in verbs:
        if p.lower[verb] not in _COPULAS:
            continue
        denied_verb = is_denied_verb(p, verb)
        for k in p.children[verb]:
            if p.dep[k] == "acomp" and k > verb:
                for a in (k, *_conjuncts(p, k, len(p))):
                    # "not black but brown"
                    denied = p.lower[a - 1] != "but" if denied_verb else is_denied_adjective(p, a)
                    if (
                        p.tag[a] in ("JJ", "VBN", "NN")
                        and p.lower[a].isalpha()
                        and p.lower[a] not in _EMPTY_PREDICATES
                        and not denied
                    ):
                        yield a, a, "predicate"
