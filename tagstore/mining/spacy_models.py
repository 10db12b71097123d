"""Tags by any spaCy model, for captions in other languages than the rules read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from itertools import islice
from typing import Any

from tagstore.errors import InvalidInput, MissingExtra, NotFound
from tagstore.mining.language import is_written_in
from tagstore.mining.text import Clean, clean
from tagstore.plain_text import is_missing
from tagstore.types import Kind, Pair, Tag

BLOCK_PAIRS = 256
"""Pairs that are parsed together, which is also the look-ahead."""
CONFIDENCE: Mapping[Kind, float] = {"object": 0.8, "attribute": 0.75, "entity": 0.75}
"""Scores of the tags: below those of the rules, which are made for one language."""

_PERSONS = {"PER": "PERSON"}
_NEGATIVE_WORDS = frozenset({
    "kein", "keine", "keinen", "keinem", "keiner", "ohne", "sans", "aucun", "aucune", "sin", "ningún",
    "ninguna", "senza", "nessun", "nessuna", "sem", "nenhum", "nenhuma", "geen", "zonder", "ingen", "inga",
    "utan", "uden", "uten", "bez", "fără", "no", "without",
})  # fmt: skip
"""Words that deny the noun that they depend on, or that depends on them."""


class SpacyMiner:
    """Objects, attributes and entities by a spaCy model, of the captions that are in its language.

    `model`: the name of an installed package or a directory; it needs a tagger or a morphologizer, and finds
    attributes better with a parser. `max_chars`: characters of a caption that are read. Nouns are objects as
    they are written, adjectives attributes of the noun that they depend on or stand beside. The tags have the
    `language` of the model.
    """

    name = "spacy"
    version = "1"

    def __init__(self, *, model: str = "", max_chars: int = 2000) -> None:
        if not model:
            raise InvalidInput("which spaCy model? Name it: --miner spacy:de_core_news_sm")
        self._model, self._max_chars = model, max_chars
        self._nlp = _load(model)
        self.language: str = self._nlp.meta["lang"]
        self.languages = frozenset({self.language})
        self.captions_by_language: Counter[str] = Counter()

    @property
    def settings(self) -> Mapping[str, Any]:
        """The model with its version, which decides the tags, and its language."""
        meta = self._nlp.meta
        return {
            "language": self.language,
            "max_chars": self._max_chars,
            "model": f"{meta['lang']}_{meta['name']} {meta['version']}, spacy {version('spacy')}",
        }

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """Tags of each pair. Reads `BLOCK_PAIRS` pairs ahead."""
        rest = iter(pairs)
        while block := list(islice(rest, BLOCK_PAIRS)):
            tags: list[list[Tag]] = [[] for _ in block]
            texts = []
            for place, pair in enumerate(block):
                for number, caption in enumerate(pair.captions):
                    if not isinstance(caption, str) or is_missing(caption):
                        continue
                    c = clean(caption, self._max_chars)
                    if c.text and is_written_in(c.text, self.language):
                        texts.append((c.text, (c, place, number)))
            self.captions_by_language[self.language] += len(texts)
            with self._nlp.memory_zone():
                for doc, (c, place, number) in self._nlp.pipe(texts, as_tuples=True):
                    tags[place].extend(self._tags(doc, c, number))
            yield from map(tuple, tags)

    def _tags(self, doc: Any, c: Clean, caption: int) -> Iterator[Tag]:
        named: set[int] = set()
        for entity in doc.ents:
            named.update(range(entity.start, entity.end))
            label = _PERSONS.get(entity.label_, entity.label_)
            yield self._tag("entity", entity.text, entity.text.casefold(), c, entity, caption, label)
        for token in doc:
            if token.pos_ not in ("NOUN", "PROPN") or token.i in named or _is_denied(token):
                continue
            if token.dep_ == "compound" and token.head.i > token.i:
                continue
            first = token.i
            while first and doc[first - 1].dep_ == "compound" and doc[first - 1].head == token:
                first -= 1
            noun = doc[first : token.i + 1]
            lemma = _lemma(noun)
            yield self._tag("object", noun.text.lower(), lemma, c, noun, caption)
            for adjective in _adjectives(token):
                near = doc[min(first, adjective.i) : max(token.i, adjective.i) + 1]
                before = adjective.i < first
                words = [adjective.text, noun.text] if before else [noun.text, adjective.text]
                canonical = f"{_lemma(doc[adjective.i : adjective.i + 1])} {lemma}"
                yield self._tag("attribute", " ".join(words).lower(), canonical, c, near, caption)

    def _tag(
        self, kind: Kind, text: str, canonical: str, c: Clean, words: Any, caption: int, label: str = ""
    ) -> Tag:
        span = c.span(words.start_char, words.end_char)
        return Tag(text, kind, span, caption, CONFIDENCE[kind], canonical, label, self.language)


def _adjectives(noun: Any) -> Iterator[Any]:
    """The adjectives that depend on a noun, or stand beside it where the model has no parser."""
    if noun.doc.has_annotation("DEP"):
        yield from (t for t in noun.children if t.pos_ == "ADJ" and not _is_denied(t))
        return
    for step in (-1, 1):
        place = noun.i + step
        if 0 <= place < len(noun.doc) and noun.doc[place].pos_ == "ADJ":
            yield noun.doc[place]


def _is_denied(token: Any) -> bool:
    """Whether a word that denies depends on the token, is its head, or stands before it without a parser."""
    if token.doc.has_annotation("DEP"):
        words = [*token.children, token.head]
    else:
        words = [token.doc[token.i - 1]] if token.i else []
    return any(word.lower_ in _NEGATIVE_WORDS for word in words)


def _lemma(words: Any) -> str:
    return " ".join(token.lemma_ or token.text for token in words).casefold()


def _load(model: str) -> Any:
    try:
        import spacy
    except ModuleNotFoundError as error:
        raise MissingExtra("the miner 'spacy' needs spaCy: pip install 'tagstore[server]'") from error
    try:
        return spacy.load(model)
    except OSError as error:
        raise NotFound(
            f"no spaCy model '{model}': install its package (python -m spacy download {model}), or give "
            "a directory"
        ) from error
