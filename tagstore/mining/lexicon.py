"""Word lists of the mining rules, read from `data/lexicon.txt`."""

from __future__ import annotations

from hashlib import sha256
from importlib.resources import files


def sections(text: str) -> dict[str, frozenset[str]]:
    """Read sections of comma-separated entries: `[name]`, then entries; `#` begins a comment."""
    lists: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in text.splitlines():
        line = line.split("#", 1)[0].strip()
        if line.startswith("["):
            current = lists.setdefault(line.strip("[]"), set())
        else:
            current.update(entry.strip() for entry in line.split(",") if entry.strip())
    return {name: frozenset(entries) for name, entries in lists.items()}


_TEXT = files("tagstore.mining").joinpath("data/lexicon.txt").read_text(encoding="utf-8")
DIGEST = sha256(_TEXT.encode()).hexdigest()[:12]
"""12 hex digits of the file's sha256. They are in the miner's settings: another lexicon is another miner."""

_WORDS = sections(_TEXT)
COLOURS = _WORDS["colours"]
TINTS = _WORDS["tints"]
SHADES = _WORDS["shades"]
GENDERS = _WORDS["genders"]
NUMBERS = _WORDS["numbers"]
POSITIONS = _WORDS["positions"]
PICTURES = _WORDS["pictures"]
MEASURES = _WORDS["measures"]
PARTITIVES = _WORDS["partitives"]
CONTAINERS = _WORDS["containers"]
ABSTRACT = _WORDS["abstract"]
VAGUE = _WORDS["vague"]
PREDICATES = _WORDS["predicates"]
LEXICAL = _WORDS["lexical"]
ANIMATE = _WORDS["animate"]
GERUNDS = _WORDS["gerunds"]
PRODUCTS = _WORDS["products"]
DESCRIPTORS = _WORDS["descriptors"]
PARTS = _WORDS["parts"]
ADJECTIVES = _WORDS["adjectives"]
AFFIXED = _WORDS["affixed"]
BARE = _WORDS["bare"]
THINGS_ING = _WORDS["things_ing"]
VERBS_AFTER_A = _WORDS["verbs_after_a"]
VERBS_ONLY = _WORDS["verbs_only"]
VERBS_S = _WORDS["verbs_s"]
STATES = _WORDS["states"]
COMMONS = _WORDS["commons"]
MONUMENTS = _WORDS["monuments"]
