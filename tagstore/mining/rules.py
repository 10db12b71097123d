"""The default miner: rules over spaCy's dependency parse and named entities."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from cachetools import FIFOCache

from tagstore.errors import InvalidInput
from tagstore.mining import lexicon
from tagstore.mining.attributes import object_phrases
from tagstore.mining.entities import proper_names
from tagstore.mining.language import ENGLISH, language_of
from tagstore.mining.noun_phrases import Phrase
from tagstore.mining.parse import Parse, common_nouns, load_pipeline, model_name
from tagstore.mining.relations import relation_phrases
from tagstore.mining.text import Clean, clean
from tagstore.mining.title_phrases import title_phrases
from tagstore.mining.titles import Title
from tagstore.plain_text import is_missing
from tagstore.types import Pair, Tag

BLOCK_CAPTIONS = 1024
"""Captions that are parsed together, which is also the look-ahead."""
MAX_SPACY_WORDS = 30_000
"""Words that spaCy may keep in its vocabulary."""
CAPTIONS_PER_PIPELINE = 200_000
"""Captions after which the pipeline is loaded anew; loading takes as long as parsing about 300."""
CACHED_CAPTIONS = 4096
"""Captions whose tags are kept, so that one that comes again is not parsed again."""


Mined = tuple[tuple[Tag, ...], str]
"""The tags of a caption, and its language."""


class RuleMiner:
    """Objects, attributes, entities and (if asked for) relations, from the dependency parse.

    `max_chars`: characters of a caption that are read, which bounds the time spent on it. `entities`: whether
    to look for proper names; without them, mining is nearly twice as fast. `relations`: whether to tag "man
    riding horse" too. Captions in other languages give no tags, nor does one that is no text or says that it
    is missing (`tagstore.mining.refuse` says why). `captions_by_language` counts what was read.
    """

    name = "rules"
    version = "2"
    languages = frozenset({ENGLISH})

    def __init__(self, *, max_chars: int = 2000, entities: bool = True, relations: bool = False) -> None:
        if max_chars < 1:
            raise InvalidInput(f"max_chars is {max_chars}: give at least 1")
        self._max_chars, self._entities, self._relations = max_chars, entities, relations
        self._cache: FIFOCache[str, Mined] = FIFOCache(CACHED_CAPTIONS)
        self._spacy: tuple[Any, frozenset[str]] | None = None
        self._parsed = 0
        self.captions_by_language: Counter[str] = Counter()

    @property
    def settings(self) -> Mapping[str, Any]:
        """The options, the language model and the lexicon: together they decide the tags."""
        return {
            "entities": self._entities,
            "lexicon": lexicon.DIGEST,
            "max_chars": self._max_chars,
            "model": model_name(),
            "relations": self._relations,
        }

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """Tags of each pair, caption by caption. Reads ahead until `BLOCK_CAPTIONS` captions are together."""
        block: list[Pair] = []
        captions = 0
        for pair in pairs:
            block.append(pair)
            captions += max(1, len(pair.captions))
            if captions >= BLOCK_CAPTIONS:
                yield from self._block(block)
                block, captions = [], 0
        yield from self._block(block)

    def _block(self, block: list[Pair]) -> list[tuple[Tag, ...]]:
        captions = Counter(c for pair in block for c in pair.captions if isinstance(c, str))
        mined = {c: self._cache[c] for c in captions if c in self._cache}
        fresh = self._parse([c for c in captions if c not in mined])
        mined.update(fresh)
        self._cache.update(fresh)
        for caption, times in captions.items():
            self.captions_by_language[mined[caption][1]] += times
        return [
            tuple(
                _in_caption(tag, n)
                for n, caption in enumerate(pair.captions)
                if isinstance(caption, str)
                for tag in mined[caption][0]
            )
            for pair in block
        ]

    def _parse(self, captions: list[str]) -> dict[str, Mined]:
        mined: dict[str, Mined] = {}
        texts = []
        for caption in captions:
            c = Clean("") if is_missing(caption) else clean(caption, self._max_chars)
            if title := Title(c.text):
                mined[caption] = tuple(_to_tags(title_phrases(title), c)), ENGLISH
            elif (language := language_of(c.text)) == ENGLISH:
                texts.append((c.text, (c, caption)))
            else:
                mined[caption] = (), language
        if texts:
            nlp, common = self._pipeline()
            # The zone frees the words that spaCy learns from these captions; without it memory would grow
            # with each new word. The first words are kept: they are the common ones, and learning them anew
            # costs a tenth of the speed.
            with nlp.memory_zone() if len(nlp.vocab) > MAX_SPACY_WORDS else nullcontext():
                for doc, (c, caption) in nlp.pipe(texts, as_tuples=True):
                    mined[caption] = tuple(self._tags(doc, c, common)), ENGLISH
            self._parsed += len(texts)
        return mined

    def _tags(self, doc: Any, c: Clean, common: frozenset[str]) -> Iterator[Tag]:
        p = Parse(doc, c.text)
        phrases: list[Phrase] = []
        named: set[int] = set()
        for name in proper_names(p, doc, common) if self._entities else ():
            named.update(range(name.first, name.last + 1))
            start, end = p.start[name.first], p.end[name.last]
            text = c.text[start:end]
            phrases.append(Phrase(text, "entity", start, end, name.confidence, text.casefold(), name.label))
        phrases.extend(object_phrases(p, frozenset(named)))
        if self._relations:
            phrases.extend(relation_phrases(p, frozenset(named)))
        return _to_tags(phrases, c)

    def _pipeline(self) -> tuple[Any, frozenset[str]]:
        if self._spacy is not None and self._parsed >= CAPTIONS_PER_PIPELINE:
            # a zone frees words, but not their slots in spaCy's hash tables, which double whenever used slots
            # fill them
            self._spacy = None
            gc.collect()
        if self._spacy is None:
            self._spacy, self._parsed = (load_pipeline(self._entities), common_nouns()), 0
        return self._spacy


def _in_caption(tag: Tag, caption: int) -> Tag:
    return tag if caption == 0 else replace(tag, caption=caption)


def _to_tags(phrases: Iterable[Phrase], c: Clean) -> Iterator[Tag]:
    """Phrases as tags, each once at a place, with offsets in the original caption."""
    seen: set[tuple[str, str, int]] = set()
    for phrase in phrases:
        key = (phrase.kind, phrase.canonical, phrase.start)
        if key not in seen:
            seen.add(key)
            span, score = c.span(phrase.start, phrase.end), round(phrase.confidence, 3)
            yield Tag(phrase.text, phrase.kind, span, 0, score, phrase.canonical, phrase.label)
