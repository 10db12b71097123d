"""Which tag may stand for another so that what is said is false: the lists of `words.txt`.

Whether a thing is in a picture that nobody annotated cannot be known. So a tag is put in only where nothing
speaks for it: no word of the sample names it, or what may be the same thing, and it is nothing that pictures
often show and captions leave out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

from tagstore.mining.lexicon import NUMBERS, sections

_LISTS = sections(files("tagstore.preferences").joinpath("words.txt").read_text(encoding="utf-8"))
_GENERAL, _UNSPOKEN, _PEOPLE = _LISTS["general"], _LISTS["unspoken"], _LISTS["people"]
_MALE, _FEMALE = _LISTS["male"], _LISTS["female"]
_FAMILIES = tuple(
    words
    for name, words in _LISTS.items()
    if name not in ("general", "unspoken", "people", "male", "female", "animals")
)
_ANIMALS = _LISTS["animals"].union(*(_LISTS[name] for name in ("dogs", "cats", "cattle", "horses", "birds")))
_COLOURS = frozenset(
    {"red", "yellow", "green", "blue", "black", "white", "pink", "brown", "orange", "purple"}
)
"""Colours that exclude each other; shades and mixtures don't."""
_MOST_WORDS = 2
"""Words of a thing that is put in; longer ones are often clauses that a miner misread."""
_NEAR_COLOURS = (
    frozenset({"red", "orange", "pink", "brown", "maroon"}),
    frozenset({"yellow", "orange", "gold", "golden", "tan", "blonde"}),
    frozenset({"blue", "purple", "navy", "teal", "turquoise"}),
    frozenset({"pink", "purple", "red"}),
    frozenset({"green", "teal", "turquoise"}),
    frozenset({"brown", "tan", "black", "beige", "orange", "yellow"}),
    frozenset({"white", "beige", "gray", "silver"}),
    frozenset({"black", "gray", "navy"}),
)
"""Colours that two people may give to one thing."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a sample says of its picture, in canonical forms: words, and tags of several words."""

    names: frozenset[str]

    @classmethod
    def of(cls, names: Iterable[str]) -> Spoken:
        """Take canonical tags and words; a tag's last word, the thing, is one of them."""
        return cls(frozenset(part for name in names for part in (name, head(name))))

    def any_of(self, names: Iterable[str]) -> bool:
        """Whether one of these is spoken of."""
        return not self.names.isdisjoint(names)


def head(name: str) -> str:
    """The last word of a canonical tag: the thing that it is of."""
    return name.rpartition(" ")[2]


def object_fits(true: str, absent: str, spoken: Spoken) -> bool:
    """Whether a thing may be put in for another one that the picture shows.

    Args:
        true, absent: canonical objects.
    """
    forms = {absent, head(absent)}
    if absent.count(" ") >= _MOST_WORDS:
        return False
    if spoken.any_of(forms) or forms & (_GENERAL | _UNSPOKEN | _PEOPLE):
        return False
    if {true, head(true)} & (_GENERAL | _UNSPOKEN | _PEOPLE):
        return False  # it would be no sentence, or the answer would not say what it said before
    if forms & (_MALE | _FEMALE) or true in _MALE | _FEMALE:
        own, other = (_MALE, _FEMALE) if true in _MALE else (_FEMALE, _MALE)
        return true in own and absent in other and not spoken.any_of(other | _PEOPLE)
    if any(forms & family and spoken.any_of(family) for family in _FAMILIES):
        return False
    return bool(forms & _ANIMALS) == bool({true, head(true)} & _ANIMALS)


def attribute_fits(true: str, absent: str, spoken: Spoken) -> bool:
    """Whether an attribute of a thing may be put in for another of the same thing: a colour for a colour that
    is quite another, a number for a number."""
    quality, _, thing = true.rpartition(" ")
    other, _, other_thing = absent.rpartition(" ")
    if thing != other_thing or quality == other or spoken.any_of([absent]):
        return False
    if quality in NUMBERS and other in NUMBERS:
        return True
    if quality not in _COLOURS or other not in _COLOURS or spoken.any_of([other]):
        return False
    return not any({quality, other} <= near for near in _NEAR_COLOURS)


def name_fits(absent: str, spoken: Spoken) -> bool:
    """Whether a name (entity or custom tag) may be put in for another: nothing of it is spoken of."""
    return not spoken.any_of([absent, *absent.split()])
