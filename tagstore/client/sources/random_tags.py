"""Random tags: the control experiment with tags that have nothing to do with the query."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tagstore.client.backend import Backend
from tagstore.client.forks import PerProcess
from tagstore.client.queries import QueryBatch
from tagstore.client.source import Source
from tagstore.client.sources.null import NO_FINGERPRINT
from tagstore.errors import InvalidInput, NotFound
from tagstore.types import KINDS, Retrieval, RetrievedTag, StoreInfo, TagInfo


class RandomBackend(Backend):
    """Tags drawn from a vocabulary, all equally likely, without regard to the query.

    The same seed and query (its key if it has one, else its image, vector or caption) give the same tags in
    any process. Their signals are 0.
    """

    def __init__(
        self,
        vocabulary: Callable[[], list[TagInfo]],
        info: Callable[[], StoreInfo],
        lookup: Callable[[Sequence[int], bool], list[TagInfo]],
        *,
        seed: int,
        count: int,
    ) -> None:
        """
        Args:
            vocabulary: lists the tags to draw from.
            info: describes the store that they belong to.
            lookup: finds tags by id, with embeddings or without.
            count: tags for each query; fewer if the caller's `max_tags` or the vocabulary is smaller.
        """
        self._vocabulary = PerProcess(vocabulary)
        self._info = PerProcess(info)
        self._lookup, self._seed, self._count = lookup, seed, count

    @classmethod
    def of_source(cls, source: Source, *, seed: int, count: int) -> RandomBackend:
        """Draw from the vocabulary of one version of a store: a draw must not change when the store does."""

        def info() -> StoreInfo:
            source.pin()
            return source.info()

        def vocabulary() -> list[TagInfo]:
            source.pin()
            return list(source.vocabulary())

        def lookup(tag_ids: Sequence[int], embeddings: bool) -> list[TagInfo]:
            return source.tags(tag_ids, embeddings=embeddings)

        return cls(vocabulary, info, lookup, seed=seed, count=count)

    @classmethod
    def of_file(cls, path: str, *, seed: int, count: int) -> RandomBackend:
        """Draw from a text file: a tag a line, its kind behind a tab if it isn't `object`.

        Ids are line numbers from 0; there are no embeddings.
        """

        def lookup(tag_ids: Sequence[int], embeddings: bool) -> list[TagInfo]:
            if embeddings:
                raise InvalidInput(
                    f"the tags of {path} have no embeddings: draw them from a store, as in random+grpc://HOST:PORT/NAME"
                )
            tags = {tag.tag_id: tag for tag in _read_vocabulary(path)}
            missing = [i for i in tag_ids if i not in tags]
            if missing:
                raise NotFound(f"no tag {missing[0]} in {path}")
            return [tags[i] for i in tag_ids]

        def info() -> StoreInfo:
            unique_tags = len(_read_vocabulary(path))
            return StoreInfo("random", 0, 0, 0, unique_tags, NO_FINGERPRINT, {"kind": "random"}, "")

        return cls(lambda: _read_vocabulary(path), info, lookup, seed=seed, count=count)

    def retrieve(self, batch: QueryBatch) -> list[Retrieval]:
        tags, info = self._vocabulary.get(), self._info.get()
        count = min(self._count, batch.search.max_tags or self._count, len(tags))
        answers = []
        for row in range(len(batch)):
            drawn = [tags[i] for i in self._draw(batch, row, count, len(tags))]
            retrieved = tuple(RetrievedTag(t.tag_id, t.text, t.kind, 0.0, 0, 0.0, ()) for t in drawn)
            answers.append(Retrieval("random", info.version, info.fingerprint.digest, (), retrieved))
        return answers

    def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        return self._lookup(tag_ids, embeddings), self._info.get().version

    def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        tags = self._vocabulary.get()
        if embeddings:
            tags = self._lookup([t.tag_id for t in tags], True)
        return tags, 0, self._info.get().version

    def info(self, version: int) -> StoreInfo:
        return self._info.get()

    def close(self) -> None:
        self._vocabulary.take()
        self._info.take()

    def _draw(self, batch: QueryBatch, row: int, count: int, vocabulary: int) -> list[int]:
        key = batch.identities[row].key.encode() if batch.identities else b""
        seed = hashlib.sha256(f"{self._seed} ".encode() + (key or batch.query_bytes(row))).digest()
        positions = np.random.default_rng(list(seed)).choice(vocabulary, count, replace=False)
        drawn: list[int] = positions.tolist()
        return drawn


def _read_vocabulary(path: str) -> list[TagInfo]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise NotFound(f"cannot read the vocabulary {path}: {error.strerror}") from error
    tags = []
    for number, line in enumerate(lines):
        text, _, kind = line.partition("\t")
        if kind and kind not in KINDS:
            raise InvalidInput(f"{path}, line {number + 1}: '{kind}' is no kind of tag: {', '.join(KINDS)}")
        if text:
            tags.append(TagInfo(number, text, kind or "object", 0))
    return tags
