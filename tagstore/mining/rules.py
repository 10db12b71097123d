"""The default miner: rules over spaCy's dependency parse and named entities.

Of spaCy's pipeline only tok2vec, tagger, parser and (for entities) ner run; what is left of the time is ours, and it is little.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from tagstore.errors import InvalidInput
from tagstore.mining import lexicon
from tagstore.mining.attributes import phrases
from tagstore.mining.entities import names
from tagstore.mining.noun_phrases import Found
from tagstore.mining.parse import Parse, common_nouns, load_pipeline, model_name
from tagstore.mining.relations import relations
from tagstore.mining.text import Clean, clean
from tagstore.mining.titles import Title, title_phrases
from tagstore.types import Pair, Tag

BLOCK = 1024  # captions parsed together: the look-ahead
VOCABULARY = 30_000  # words that spaCy may keep
RECYCLED = 200_000  # captions that a pipeline parses before it is loaded anew, which takes about as long as parsing 300
REMEMBERED = 4096  # captions whose tags are kept, so that a caption that comes again is not parsed again


class RuleMiner:
    """Objects, attributes, entities and (if asked for) relations, from the dependency parse.

    `max_chars`: only so many characters of a caption are read, which bounds the time spent on it.
    `entities`: whether to look for proper names; without, mining is nearly twice as fast.
    `relations`: whether to tag "man riding horse" too.
    Captions in other than Latin letters give no tags, and neither does one that is no text (`tagstore.mining.refuse` says why).
    """

    name = "rules"
    version = "1"

    def __init__(self, *, max_chars: int = 2000, entities: bool = True, relations: bool = False) -> None:
        if max_chars < 1:
            raise InvalidInput(f"max_chars is {max_chars}: give at least 1")
        self._max_chars, self._entities, self._relations = max_chars, entities, relations
        self._known: OrderedDict[str, tuple[Tag, ...]] = OrderedDict()
        self._spacy: tuple[Any, frozenset[str]] | None = None
        self._parsed = 0

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that decides the tags: the options, the language model, the lexicon."""
        return {
            "entities": self._entities,
            "lexicon": lexicon.DIGEST,
            "max_chars": self._max_chars,
            "model": model_name(),
            "relations": self._relations,
        }

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """Tags of each pair, those of its captions one after the other. Reads ahead until `BLOCK` captions are together."""
        block: list[Pair] = []
        captions = 0
        for pair in pairs:
            block.append(pair)
            captions += max(1, len(pair.captions))
            if captions >= BLOCK:
                yield from self._block(block)
                block, captions = [], 0
        yield from self._block(block)

    def _block(self, block: list[Pair]) -> list[tuple[Tag, ...]]:
        captions = dict.fromkeys(c for pair in block for c in pair.captions if isinstance(c, str))
        tags = {c: self._known[c] for c in captions if c in self._known}
        fresh = self._parse([c for c in captions if c not in tags])
        tags.update(fresh)
        self._known.update(fresh)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return [
            tuple(
                _moved(tag, n)
                for n, caption in enumerate(pair.captions)
                if isinstance(caption, str)
                for tag in tags[caption]
            )
            for pair in block
        ]

    def _parse(self, captions: list[str]) -> dict[str, tuple[Tag, ...]]:
        done: dict[str, tuple[Tag, ...]] = {}
        texts = []
        for caption in captions:
            c = clean(caption, self._max_chars)
            if title := Title(c.text):
                done[caption] = tuple(_finished(title_phrases(title), c))
            elif _english(c.text):
                texts.append((c.text, (c, caption)))
            else:
                done[caption] = ()
        if texts:
            nlp, common = self._pipeline()
            # the zone gives back what spaCy learns from these captions: without it memory would grow with every new word.
            # The first words are kept, because they are the common ones and learning them anew each time takes a tenth of the speed.
            with nlp.memory_zone() if len(nlp.vocab) > VOCABULARY else nullcontext():
                for doc, (c, caption) in nlp.pipe(texts, as_tuples=True):
                    done[caption] = tuple(self._tags(doc, c, common))
            self._parsed += len(texts)
        return done

    def _tags(self, doc: Any, c: Clean, common: frozenset[str]) -> Iterator[Tag]:
        p = Parse(doc, c.text)
        found = []
        named: set[int] = set()
        for name in names(p, doc, common) if self._entities else ():
            named.update(range(name.first, name.last + 1))
            start, end = p.start[name.first], p.end[name.last]
            text = c.text[start:end]
            found.append(Found(text, "entity", start, end, name.confidence, text.casefold(), name.label))
        found.extend(phrases(p, frozenset(named)))
        if self._relations:
            found.extend(relations(p, frozenset(named)))
        return _finished(found, c)

    def _pipeline(self) -> tuple[Any, frozenset[str]]:
        if self._spacy is not None and self._parsed >= RECYCLED:
            # a zone gives back words, not their places in spaCy's hash tables, which double whenever used-up places fill them
            self._spacy = None
            gc.collect()
        if self._spacy is None:
            self._spacy, self._parsed = (load_pipeline(self._entities), common_nouns()), 0
        return self._spacy


def _english(text: str) -> bool:
    """Whether most letters are Latin ones: the parser reads nothing else."""
    if text.isascii():
        return any(map(str.isalpha, text))
    letters = [character for character in text if character.isalpha()]
    return bool(letters) and 2 * sum(character < "\u0250" for character in letters) > len(letters)


def _moved(tag: Tag, caption: int) -> Tag:
    return (
        tag
        if caption == 0
        else Tag(tag.text, tag.kind, tag.span, caption, tag.score, tag.canonical, tag.label)
    )


def _finished(found: Iterable[Found], c: Clean) -> Iterator[Tag]:
    """Each phrase once a place, with offsets of the caption as it came."""
    seen: set[tuple[str, str, int]] = set()
    for f in found:
        key = (f.kind, f.canonical, f.start)
        if key not in seen:
            seen.add(key)
            yield Tag(f.text, f.kind, c.span(f.start, f.end), 0, round(f.confidence, 3), f.canonical, f.label)
