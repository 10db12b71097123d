"""Singular and plural of English nouns, by rule and by a short list: enough to see that "two dogs" and "a dog" are the same tag."""

from __future__ import annotations

from functools import lru_cache

_IRREGULAR = {
    "men": "man", "women": "woman", "people": "people", "children": "child", "feet": "foot", "teeth": "tooth", "geese": "goose", "mice": "mouse",
    "oxen": "ox", "lice": "louse", "dice": "die", "cacti": "cactus", "wolves": "wolf", "knives": "knife", "wives": "wife", "lives": "life",
    "leaves": "leaf", "loaves": "loaf", "shelves": "shelf", "scarves": "scarf", "halves": "half", "calves": "calf", "hooves": "hoof",
    "thieves": "thief", "elves": "elf", "selves": "self", "movies": "movie", "cookies": "cookie", "hoodies": "hoodie", "brownies": "brownie",
    "zombies": "zombie", "selfies": "selfie", "smoothies": "smoothie", "pies": "pie", "ties": "tie", "neckties": "necktie", "bowties": "bowtie",
    "toes": "toe", "shoes": "shoe", "canoes": "canoe", "horseshoes": "horseshoe", "hoes": "hoe", "does": "doe", "foes": "foe", "tiptoes": "tiptoe",
    "gases": "gas", "buses": "bus", "busses": "bus", "axes": "axe", "photos": "photo", "caches": "cache", "aches": "ache", "mustaches": "mustache",
    "moustaches": "moustache", "headaches": "headache", "quiches": "quiche", "avalanches": "avalanche", "houses": "house", "horses": "horse",
    "roses": "rose", "noses": "nose", "hoses": "hose", "vases": "vase", "cases": "case", "suitcases": "suitcase", "bases": "base", "purses": "purse",
    "nurses": "nurse", "blouses": "blouse", "causes": "cause", "cheeses": "cheese", "phases": "phase", "spouses": "spouse", "exercises": "exercise",
    "corpses": "corpse", "eclipses": "eclipse", "bruises": "bruise", "fuses": "fuse", "hearses": "hearse", "ashes": "ash", "groomsmen": "groomsman",
    "veggies": "veggie", "puppies": "puppy", "kiwis": "kiwi", "rookies": "rookie", "calories": "calorie", "prairies": "prairie", "genies": "genie",
    "sizes": "size", "prizes": "prize", "mazes": "maze", "breezes": "breeze", "glazes": "glaze", "bulldozers": "bulldozer", "menus": "menu",
    "birdies": "birdie", "collies": "collie", "huskies": "husky", "groupies": "groupie", "foodies": "foodie", "onesies": "onesie", "undies": "undies",
}  # fmt: skip
# Plural in form only, or the same in both numbers: they stay as they are.
_UNCHANGED = frozenset(
    {
        "glasses", "sunglasses", "eyeglasses", "goggles", "scissors", "pants", "jeans", "shorts", "trousers", "leggings", "tights", "jeggings", "overalls",
        "clothes", "pajamas", "pyjamas", "binoculars", "headphones", "earphones", "tongs", "pliers", "tweezers", "stairs", "series", "species", "sheep",
        "deer", "fish", "moose", "bison", "swiss", "grass", "glass", "dress", "bus", "gas", "lens", "canvas", "tennis", "bass", "chess", "cross", "moss",
        "boss", "mattress", "waitress", "actress", "compass", "harness", "cactus", "octopus", "circus", "campus", "virus", "walrus", "hibiscus", "papyrus",
        "asparagus", "citrus", "iris", "pelvis", "news", "lacrosse", "outdoors", "indoors", "swimwear", "trunks", "briefs", "boxers", "capris", "panties",
        "chopsticks", "aircraft", "spacecraft", "offspring", "cattle", "police", "access", "business", "wilderness", "mess", "press", "pass", "mass", "class",
        "brass", "christmas", "colossus", "abacus", "status", "apparatus", "chassis", "corps", "always", "surroundings",
        "greens", "gymnastics", "athletics", "electronics", "graphics", "yes", "this", "thus", "plus", "us", "its", "has", "as",
    }
)  # fmt: skip

_NO_MEN = frozenset({"specimen", "regimen", "abdomen", "ramen", "stamen", "acumen", "semen", "omen"})


@lru_cache(maxsize=8192)
def singular(word: str) -> str:
    """The singular of a lower-case noun: "facades" -> "facade", "women" -> "woman"; "glasses", "sheep" and singulars stay.

    Of a phrase or a hyphenated word, its last part is turned.
    """
    cut = max(word.rfind(" "), word.rfind("-")) + 1
    if cut:
        return word[:cut] + singular(word[cut:])
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("men") and len(word) > 4 and word not in _NO_MEN:
        return word[:-2] + "an"
    if len(word) < 4 or not word.endswith("s") or word in _UNCHANGED or word.endswith(("ss", "'s", "ous", "sis")):
        return word
    if word.endswith(("sses", "shes", "ches", "xes", "zzes")):
        return word[:-2]
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith("oes"):
        return word[:-2]
    return word[:-1]
