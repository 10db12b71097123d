"""The singular of English nouns, by rules and a short list, so that "dogs" and "dog" become one tag."""

from __future__ import annotations

from functools import lru_cache

NUMERALS = {
    "2": "two", "3": "three", "4": "four", "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine",
    "10": "ten",
}  # fmt: skip
_IRREGULAR = {
    "men": "man", "children": "child", "feet": "foot", "teeth": "tooth", "geese": "goose", "mice": "mouse",
    "oxen": "ox", "lice": "louse", "dice": "die", "cacti": "cactus", "wolves": "wolf", "knives": "knife",
    "wives": "wife", "lives": "life", "leaves": "leaf", "loaves": "loaf", "shelves": "shelf",
    "scarves": "scarf", "halves": "half", "calves": "calf", "hooves": "hoof", "thieves": "thief",
    "elves": "elf", "selves": "self", "movies": "movie", "cookies": "cookie", "hoodies": "hoodie",
    "brownies": "brownie", "zombies": "zombie", "selfies": "selfie", "smoothies": "smoothie", "pies": "pie",
    "ties": "tie", "neckties": "necktie", "bowties": "bowtie", "toes": "toe", "shoes": "shoe",
    "canoes": "canoe", "horseshoes": "horseshoe", "hoes": "hoe", "does": "doe", "foes": "foe",
    "tiptoes": "tiptoe", "gases": "gas", "buses": "bus", "busses": "bus", "axes": "axe", "caches": "cache",
    "aches": "ache", "mustaches": "mustache", "moustaches": "moustache", "headaches": "headache",
    "quiches": "quiche", "avalanches": "avalanche", "veggies": "veggie", "rookies": "rookie",
    "calories": "calorie", "prairies": "prairie", "genies": "genie", "birdies": "birdie", "collies": "collie",
    "groupies": "groupie", "foodies": "foodie", "onesies": "onesie", "undies": "undies",
}  # fmt: skip
# Plural in form only, or the same in both numbers: they stay as they are.
_UNCHANGED = frozenset(
    {
        "abacus", "always", "apparatus", "asparagus", "athletics", "binoculars", "boxers", "briefs", "cactus",
        "campus", "canvas", "capris", "chopsticks", "christmas", "circus", "citrus", "clothes", "colossus",
        "corps", "earphones", "electronics", "eyeglasses", "glasses", "goggles", "graphics", "greens",
        "gymnastics", "headphones", "hibiscus", "indoors", "iris", "jeans", "jeggings", "leggings", "lens",
        "news", "octopus", "outdoors", "overalls", "pajamas", "panties", "pants", "papyrus", "pelvis",
        "pliers", "plus", "pyjamas", "scissors", "series", "shorts", "species", "stairs", "status",
        "sunglasses", "surroundings", "tennis", "this", "thus", "tights", "tongs", "trousers", "trunks",
        "tweezers", "virus", "walrus",
    }
)  # fmt: skip

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
