"""The language of captions: which are English, for the rules, and which are another miner's.

A word that only English has settles it for most captions; the rest is asked of py3langid. It knows a sentence
of another language well, and English by two words badly, so English is the answer unless it is sure.
"""

from __future__ import annotations

from functools import cache
from typing import Any

ENGLISH = "en"

_ENGLISH_WORDS = frozenset({
    "the", "with", "and", "his", "her", "their", "from", "while", "that", "this", "these", "those", "by",
    "are", "two", "three", "four", "who", "which", "she", "he", "they", "its", "standing", "sitting",
    "holding", "wearing", "playing", "riding", "walking", "running", "looking", "laying", "eating",
    "grazing", "swinging", "parked", "woman", "women", "people", "boy", "girl", "children", "young", "small",
    "white", "black", "blue", "brown", "green", "yellow", "wooden", "street", "city", "field", "building",
    "kitchen", "picture", "player", "truck", "food", "some", "front", "near", "next", "over", "through",
    "outside", "without", "for", "men's", "women's", "bunch",
})  # fmt: skip
"""Words that are frequent in English and hardly a word of other languages in Latin letters."""
_LANGUAGES = (
    "af", "bs", "ca", "cs", "cy", "da", "de", "en", "es", "et", "eu", "fi", "fr", "ga", "gl", "hr", "hu",
    "id", "is", "it", "lt", "lv", "ms", "nl", "nn", "no", "pl", "pt", "ro", "sk", "sl", "sq", "sv", "tl",
    "tr", "vi", "ar", "bg", "el", "fa", "he", "hi", "ja", "ko", "mk", "ru", "th", "uk", "zh",
)  # fmt: skip
_SPACY_CODES = {"nb": "no"}
"""Codes of spaCy that py3langid writes in another way."""
MIN_PROBABILITY = 0.5
"""Probability that another language must have, among `_LANGUAGES`."""
MIN_RATIO = 50
"""How many times more probable than English it must be."""
READ_CHARS = 300
"""Characters of a caption that are asked about, which bounds the time."""


def language_of(text: str) -> str:
    """The ISO 639-1 code of a text's language; "zxx" without letters.

    English where another language is not sure, "und" if most letters are not Latin and no language is sure.
    """
    words = text[:READ_CHARS].lower().split()
    if not text.isascii():
        letters = [character for character in text if character.isalpha()]
        if 2 * sum(map(_is_latin, letters)) <= len(letters):
            if not letters:
                return "zxx"
            language, probability = _identifier().classify(" ".join(words))
            return str(language) if language != ENGLISH and probability >= MIN_PROBABILITY else "und"
    if not _ENGLISH_WORDS.isdisjoint(words):
        return ENGLISH
    if not any(map(str.isalpha, text)):
        return "zxx"
    if len(words) < 2:
        return ENGLISH
    probabilities = _probabilities(words)
    language, probability = next(iter(probabilities.items()))
    sure = probability >= max(MIN_PROBABILITY, MIN_RATIO * probabilities[ENGLISH])
    return language if sure else ENGLISH


def is_written_in(text: str, language: str) -> bool:
    """Whether a text is in a language of spaCy, rather than in English or in one that is surer."""
    language = _SPACY_CODES.get(language, language)
    if language not in _LANGUAGES:  # "xx", and languages that py3langid was not asked about
        return language_of(text) != ENGLISH
    first = language_of(text)
    words = text[:READ_CHARS].lower().split()
    if first != ENGLISH or language == ENGLISH or not _ENGLISH_WORDS.isdisjoint(words):
        return first == language
    probabilities = _probabilities(words)
    return probabilities[language] > probabilities[ENGLISH]


def _probabilities(words: list[str]) -> dict[str, float]:
    """The probability of each language, the most probable first."""
    return dict(_identifier().rank(" ".join(words)))


def _is_latin(letter: str) -> bool:
    return letter < "\u0250" or "\u1e00" <= letter < "\u1f00"


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(_LANGUAGES)
    return identifier
