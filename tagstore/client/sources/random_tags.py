"""Sources for control experiments: no tags, and random ones. What a model gains over these it owes to retrieval."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from tagstore.client.forks import Opened
from tagstore.client.queries import Ask
from tagstore.errors import InvalidInput, NotFound
from tagstore.types import KINDS, Fingerprint, Kind, Retrieval, RetrievedTag, StoreInfo, TagInfo

_NOTHING = Fingerprint("none", "", {}, False, True, 0)


class NullBackend:
    """No tags for any query."""

    def retrieve(self, ask: Ask) -> list[Retrieval]:
        return [Retrieval("null", 0, "", (), ())] * len(ask)

    def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        if tag_ids:
            raise NotFound(f"no tag {tag_ids[0]}: null:// has none")
        return [], 0

    def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        return [], 0, 0

    def info(self, version: int) -> StoreInfo:
        return StoreInfo("null", 0, 0, 0, 0, _NOTHING, {"kind": "null"}, "")

    def health(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        """Nothing is open."""


class RandomBackend:
    """Tags drawn from a vocabulary, all equally likely, without regard to the query.

    The same seed and query (its key if it has one, else its image, vector or caption) give the same tags, in any process. Signals are 0.

    Args:
        vocabulary: gives the tags and the version that they are of.
        info: of the store that the vocabulary belongs to.
        lookup: tags by id with embeddings.
        seed: of the draw.
        count: tags a query; fewer if the caller's `max_tags` is less or the vocabulary smaller.
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
        self._vocabulary = Opened(vocabulary)
        self._info = Opened(info)
        self._lookup, self._seed, self._count = lookup, seed, count

    def retrieve(self, ask: Ask) -> list[Retrieval]:
        tags, info = self._vocabulary.get(), self._info.get()
        count = min(self._count, ask.search.max_tags or self._count, len(tags))
        return [
            Retrieval(
                "random",
                info.version,
                info.fingerprint.digest,
                (),
                tuple(self._drawn(tags[i]) for i in self._draw(ask, row, count)),
            )
            for row in range(len(ask))
        ]

    def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        return self._lookup(tag_ids, embeddings), self._info.get().version

    def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        tags = self._vocabulary.get()
        return (
            (self._lookup([t.tag_id for t in tags], True) if embeddings else tags),
            0,
            self._info.get().version,
        )

    def info(self, version: int) -> StoreInfo:
        return self._info.get()

    def health(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        self._vocabulary.take()
        self._info.take()

    def _draw(self, ask: Ask, row: int, count: int) -> list[int]:
        key = ask.identities[row].key.encode() if ask.identities else b""
        seed = hashlib.sha256(f"{self._seed} ".encode() + (key or ask.query(row))).digest()
        drawn: list[int] = (
            np.random.default_rng(list(seed))
            .choice(len(self._vocabulary.get()), count, replace=False)
            .tolist()
        )
        return drawn

    @staticmethod
    def _drawn(tag: TagInfo) -> RetrievedTag:
        return RetrievedTag(tag.tag_id, tag.text, tag.kind, 0.0, 0, 0.0, ())


def of_file(path: str, *, seed: int, count: int) -> RandomBackend:
    """Random tags of a text file: a tag a line, a kind behind a tab if it isn't `object`. Ids are line numbers from 0; no embeddings."""

    def vocabulary() -> list[TagInfo]:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise NotFound(f"cannot read the vocabulary {path}: {error.strerror}") from error
        rows = [line.partition("\t") for line in lines]
        for i, (_, _, kind) in enumerate(rows):
            if kind and kind not in KINDS:
                raise InvalidInput(f"{path}, line {i + 1}: '{kind}' is no kind of tag: {', '.join(KINDS)}")
        return [
            TagInfo(i, text, cast(Kind, kind or "object"), 0)
            for i, (text, _, kind) in enumerate(rows)
            if text
        ]

    def lookup(tag_ids: Sequence[int], embeddings: bool) -> list[TagInfo]:
        if embeddings:
            raise InvalidInput(
                f"the tags of {path} have no embeddings: draw them from a store, as in random+grpc://HOST:PORT/NAME"
            )
        known = {tag.tag_id: tag for tag in vocabulary()}
        missing = [i for i in tag_ids if i not in known]
        if missing:
            raise NotFound(f"no tag {missing[0]} in {path}")
        return [known[i] for i in tag_ids]

    def info() -> StoreInfo:
        tags = len(vocabulary())
        return StoreInfo("random", 0, 0, 0, tags, _NOTHING, {"kind": "random"}, "")

    return RandomBackend(vocabulary, info, lookup, seed=seed, count=count)
