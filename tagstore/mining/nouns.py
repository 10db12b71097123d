"""The singular of English nouns, by rules and a short list, so that "dogs" and "dog" become one tag."""

from __future__ import annotations

from functools import lru_cache

NUMERALS = {
    "2": "two", "3": "three", "4": "four", "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine",
    "10": "ten",
}  # fmt: skip
_IRREGULAR = {
    "men": "man", "children": "child", "feet": "foot", "teeth": "tooth", "geese": "goose",
    "mice": "mouse", "oxen": "ox", "lice": "louse", "dice": "die", "cacti": "cactus", "wolves": "wolf",
    "knives": "knife", "wives": "wife", "lives": "life", "leaves": "leaf", "loaves": "loaf",
    "shelves": "shelf", "scarves": "scarf", "halves": "half", "calves": "calf", "hooves": "hoof",
    "thieves": "thief", "elves": "elf", "selves": "self", "movies": "movie", "cookies": "cookie",
    "hoodies": "hoodie", "brownies": "brownie", "zombies": "zombie", "selfies": "selfie",
    "smoothies": "smoothie", "pies": "pie", "ties": "tie", "neckties": "necktie", "bowties": "bowtie",
    "toes": "toe", "shoes": "shoe", "canoes": "canoe", "horseshoes": "horseshoe", "hoes": "hoe",
    "does": "doe", "foes": "foe", "tiptoes": "tiptoe", "gases": "gas", "buses": "bus", "busses": "bus",
    "axes": "axe", "caches": "cache", "aches": "ache", "mustaches": "mustache", "moustaches": "moustache",
    "headaches": "headache", "quiches": "quiche", "avalanches": "avalanche", "veggies": "veggie",
    "rookies": "rookie", "calories": "calorie", "prairies": "prairie", "genies": "genie",
    "birdies": "birdie", "collies": "collie", "groupies": "groupie", "foodies": "foodie",
    "onesies": "onesie", "undies": "undies", "dwarves": "dwarf", "fungi": "fungus",
    "criteria": "criterion", "larvae": "larva", "antennae": "antenna", "vertebrae": "vertebra",
    "octopi": "octopus", "stadia": "stadium", "radii": "radius", "crises": "crisis", "oases": "oasis",
    "matrices": "matrix", "indices": "index", "vertices": "vertex", "phenomena": "phenomenon",
    "bacteria": "bacterium", "passersby": "passerby", "hippopotami": "hippopotamus", "alumni": "alumnus",
    "gymnasia": "gymnasium", "aquaria": "aquarium", "themselves": "themselves", "biscotti": "biscotti",
}  # fmt: skip
_IRREGULAR_ENDINGS = (
    "children", "shelves", "scarves", "knives", "wolves", "loaves", "teeth", "feet", "shoes", "hooves",
    "calves",
)  # fmt: skip
"""Irregular plurals that end longer words too: "bookshelves", "snowshoes"."""
# Plural in form only, or the same in both numbers: they stay as they are.
_UNCHANGED = frozenset({
    "abacus", "alumnus", "always", "apparatus", "asparagus", "athletics", "binoculars", "bonus", "boxers",
    "briefs", "bus", "cactus", "callus", "campus", "canvas", "capris", "census", "chopsticks", "chorus",
    "christmas", "circus", "citrus", "clothes", "colossus", "corps", "crocus", "cumulus", "debris",
    "discus", "earphones", "electronics", "eucalyptus", "eyeglasses", "focus", "fungus", "genius",
    "glasses", "goggles", "graphics", "greens", "gymnastics", "headphones", "hibiscus", "hippopotamus",
    "hummus", "indoors", "iris", "jeans", "jeggings", "leggings", "lens", "lotus", "minibus", "nautilus",
    "news", "octopus", "outdoors", "overalls", "pajamas", "panties", "pants", "papyrus", "pelvis",
    "pliers", "plus", "pyjamas", "radius", "scissors", "series", "shorts", "species", "stairs", "status",
    "stylus", "sunglasses", "surroundings", "tennis", "this", "thus", "tights", "tongs", "trolleybus",
    "trousers", "trunks", "tweezers", "virus", "walrus",
})  # fmt: skip

_NO_MEN = frozenset({"specimen", "regimen", "abdomen", "ramen", "stamen", "acumen", "semen", "omen"})


@lru_cache(maxsize=8192)
def singular(word: str) -> str:
    """The singular of a lower-case noun: "women" -> "woman"; "glasses", "sheep" and singulars stay.

    In a phrase or a hyphenated word only the last part changes.
    """
    cut = max(word.rfind(" "), word.rfind("-")) + 1
    if cut:
        return word[:cut] + singular(word[cut:])
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("men") and len(word) > 4 and word not in _NO_MEN:
        return word[:-2] + "an"
    for ending in _IRREGULAR_ENDINGS:
        if word.endswith(ending):
            return word[: -len(ending)] + _IRREGULAR[ending]
    if word.endswith("es") and word[:-2] in _UNCHANGED:  # "octopuses"
        return word[:-2]
    if (
        len(word) < 4
        or not word.endswith("s")
        or word in _UNCHANGED
        or word.endswith(("ss", "'s", "ous", "sis"))
    ):
        return word
    if word.endswith(("sses", "shes", "ches", "xes", "zzes")):
        return word[:-2]
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith("oes"):
        return word[:-2]
    return word[:-1]
