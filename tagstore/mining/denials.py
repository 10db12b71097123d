"""What a caption denies: "no people", "a cat, not a dog", "an apple instead of an orange"."""

from __future__ import annotations

from tagstore.mining import lexicon
from tagstore.mining.parse import Parse

_NEGATIONS = frozenset({"no", "not", "n't", "without", "never", "neither", "nor", "zero"})
_PRIVATIVES = frozenset({
    "without", "minus", "sans", "except", "lacking", "lack", "lacks", "absence", "unlike", "free", "devoid",
})  # fmt: skip
_NEGATIVE_SUBJECTS = frozenset({"nobody", "none", "neither", "nothing"})
_ADJACENT = frozenset({"not", "n't", "nor", "neither", "without", "minus", "sans", "lacking", "never"})
"""Words that deny the noun phrase that begins behind them."""
_BEFORE_OF = frozenset({"instead", "lieu", "devoid", "free", "absence", "lack", "place"})
_BARE_SCENES = frozenset({
    "empty", "bare", "nothing", "no", "not", "n't", "nobody", "none", "deserted", "vacant", "naked", "nude",
    "hardly", "never", "blank", "unfurnished",
})  # fmt: skip
"""Words after which "except" names what is there after all: "an empty room except for a chair"."""
_POSSESSING_VERBS = frozenset({
    "wear", "wears", "wearing", "wore", "have", "has", "having", "had", "carry", "carries", "carrying",
    "contain", "contains", "containing", "include", "includes", "including", "hold", "holds", "holding",
    "use", "uses", "using", "show", "shows", "showing", "feature", "features", "see", "sees", "bring",
    "brings",
})  # fmt: skip
"""Verbs whose object is absent when they are denied, even one with an article."""
_DEFINITE = frozenset({"the", "his", "her", "its", "their", "this", "that", "my", "your", "our"})
_SIGNS = frozenset({"sign", "signs", "symbol", "symbols", "sticker", "zone", "area"})
MAX_STEPS = 4
"""Words that are followed from a noun to what may deny it."""


def is_denied(p: Parse, i: int) -> bool:
    """Whether the caption says that the noun at word `i` is absent."""
    # "no cars and a bench": a determiner ends the scope of "no", though not that of "without"; "or" ends none
    scope_ended = False
    for _ in range(MAX_STEPS):
        if not scope_ended and (_has_negation(p, i) or _follows_denial(p, i)):
            return True
        head, dep = p.head[i], p.dep[i]
        if head == i:
            return False
        if dep == "conj":
            links = [p.lower[k] for k in p.children[head] if p.dep[k] == "cc"]
            if "but" in links:
                return False
            scope_ended = scope_ended or (
                any(p.dep[k] in ("det", "nummod", "poss") for k in p.children[i])
                and not ("or" in links or "nor" in links)
            )
            i = head
            continue
        if p.lower[head] == "missing" and dep == "dobj":  # not "swinging and missing the ball"
            return any(p.dep[k] == "poss" or p.lower[k] in lexicon.VAGUE for k in p.children[i])
        if p.lower[head] in _PRIVATIVES:
            return not (p.lower[head] == "except" and _is_bare_scene(p, head))
        if dep == "pobj" and p.lower[head] == "of":
            return p.lower[p.head[head]] in _PRIVATIVES
        if dep in ("dobj", "attr", "oprd") and is_denied_verb(p, head):
            definite = any(p.lower[k] in _DEFINITE for k in p.children[i])
            return not definite or p.lower[head] in _POSSESSING_VERBS or dep != "dobj"
        return (
            dep == "nsubj"
            and any(p.lower[k] == "any" for k in p.children[i])
            and any(p.dep[k] == "neg" for k in p.children[head])
        )
    return False


def is_denied_verb(p: Parse, verb: int) -> bool:
    """Whether a verb is denied, by a word ("is not wearing") or by its subject ("nobody wears")."""
    for k in p.children[verb]:
        if p.dep[k] == "neg":
            return True
        if p.dep[k] in ("nsubj", "nsubjpass") and (
            p.lower[k] in _NEGATIVE_SUBJECTS
            or (p.lower[k] == "one" and any(p.lower[x] == "no" for x in p.children[k]))
        ):
            return True
    return False


def is_denied_adjective(p: Parse, i: int) -> bool:
    """Whether a predicate is denied by the word before it or a word of its own: "neither white nor grey"."""
    return (i > 0 and p.lower[i - 1] in _ADJACENT) or any(
        p.dep[k] in ("neg", "preconj") and p.lower[k] in _NEGATIONS for k in p.children[i]
    )


def _has_negation(p: Parse, i: int) -> bool:
    if any(p.lower[k] == "missing" and p.dep[k] == "amod" for k in p.children[i]):  # "missing teeth"
        return not any(p.dep[k] == "poss" for k in p.children[i])
    return any(
        p.lower[k] in _NEGATIONS
        and not (
            p.lower[k] == "no" and (p.lower[i] in _SIGNS or p.lower[k + 1].endswith("ing")) and k + 1 < i
        )
        for k in p.children[i]
        if k < i and p.dep[k] in ("det", "neg", "preconj", "advmod", "cc")
    )


def _follows_denial(p: Parse, i: int) -> bool:
    """Whether the words just before the noun phrase of word `i` deny it."""
    first = i
    while first > 0 and first <= p.head[first - 1] <= i and p.lower[first - 1] not in _NEGATIONS:
        first -= 1
    if first == 0:
        return False
    before = p.lower[first - 1]
    if before in _ADJACENT:
        return True
    if before == "except":
        return not _is_bare_scene(p, first - 1)
    if first == 1:
        return False
    earlier = p.lower[first - 2]
    match before:
        case "of" if earlier == "exception":
            return not _is_bare_scene(p, first - 2)
        case "of":
            return earlier in _BEFORE_OF and (
                earlier != "place" or (first > 2 and p.lower[first - 3] == "in")
            )
        case "than":
            return earlier == "rather"
        case "for":
            return earlier == "except" and not _is_bare_scene(p, first - 2)
    return p.tag[first - 1] == "IN" and earlier in ("not", "n't")


def _is_bare_scene(p: Parse, word: int) -> bool:
    """Whether nothing but what follows is there: "nothing except", "all black except for brown boots"."""
    return not _BARE_SCENES.isdisjoint(p.lower[:word]) or (word > 0 and p.lower[word - 1] in lexicon.COLOURS)
