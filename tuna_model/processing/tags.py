"""The tags of one image as the model takes them, and how they are looked up, chosen and ordered. numpy only.

lookup = TagLookup(connect(URL), k=5)
tags = lookup(vectors, fingerprint)          # one ImageTags an image
chosen = TagLayout(cap=10).choose(tags[0])   # what the prompt will hold
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.client import TagSource
from tagstore.errors import FingerprintMismatch, InvalidInput, Unavailable
from tagstore.types import Fingerprint, Retrieval

log = logging.getLogger(__name__)

_REMEMBERED = 200_000


@dataclass(frozen=True, slots=True, eq=False)
class ImageTags:
    """n tags of one image, with what the model needs of each."""

    texts: tuple[str, ...]
    embeddings: NDArray[np.float32]
    """`[n, D]`, unit rows."""
    similarity: NDArray[np.float32]
    """`[n]`, of the best neighbour that carries the tag."""
    votes: NDArray[np.float32]
    """`[n]`, the share of the neighbours that carry it, in [0, 1]."""
    relevance: NDArray[np.float32]
    """`[n]`, cosine of embedding and image vector."""
    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def none(cls, dimension: int) -> ImageTags:
        """No tags."""
        nothing = np.zeros(0, np.float32)
        return cls((), np.zeros((0, dimension), np.float32), nothing, nothing, nothing, ())

    @classmethod
    def of(cls, retrieval: Retrieval, embeddings: NDArray[np.float32]) -> ImageTags:
        """Of an answer of the store and its tags' embeddings `[n, D]`."""
        # neighbours need not have been asked for
        neighbours = max(1, len(retrieval.neighbours), *(tag.votes for tag in retrieval.tags))
        return cls(
            tuple(tag.tag for tag in retrieval.tags),
            np.asarray(embeddings, np.float32),
            np.array([tag.similarity for tag in retrieval.tags], np.float32),
            np.array([tag.votes / neighbours for tag in retrieval.tags], np.float32),
            np.array([tag.relevance for tag in retrieval.tags], np.float32),
            tuple(tag.tag_id for tag in retrieval.tags),
        )

    def take(self, rows: Sequence[int]) -> ImageTags:
        """Those of `rows`, in their order."""
        at = np.asarray(rows, np.int64)
        return ImageTags(
            tuple(self.texts[i] for i in rows),
            self.embeddings[at],
            self.similarity[at],
            self.votes[at],
            self.relevance[at],
            tuple(self.ids[i] for i in rows),
        )

    def extend(self, other: ImageTags) -> ImageTags:
        """These and others, as of another image: their relevance must be this image's (`for_image`)."""
        return ImageTags(
            self.texts + other.texts,
            np.concatenate([self.embeddings, other.embeddings]),
            np.concatenate([self.similarity, other.similarity]),
            np.concatenate([self.votes, other.votes]),
            np.concatenate([self.relevance, other.relevance]),
            self.ids + other.ids,
        )

    def for_image(self, vector: NDArray[np.float32]) -> ImageTags:
        """The same tags beside another image: relevance is computed anew from its unit vector `[D]`."""
        return ImageTags(
            self.texts, self.embeddings, self.similarity, self.votes, self.embeddings @ vector, self.ids
        )

    def score(self, signal: str) -> NDArray[np.float32]:
        """`[n]` of a signal of `TunaConfig.tag_signal`."""
        return np.zeros(len(self), np.float32) if signal == "uniform" else getattr(self, signal)


@dataclass(frozen=True, slots=True)
class TagLayout:
    """Which tags of an image go into the prompt, in which order, and how they are written. The fields are those of `TunaConfig`."""

    signal: str = "relevance"
    place: str = "before"
    prefix: str = ""
    separator: str = ","
    suffix: str = "\n"
    order: str = "weight"
    cap: int = 10
    merge: str = "text"
    queries: str = "tag"

    @classmethod
    def of(cls, config: Any) -> TagLayout:
        """The layout fields of a `TunaConfig`."""
        return cls(
            config.tag_signal, config.tag_place, config.tag_prefix, config.tag_separator, config.tag_suffix, config.tag_order,
            config.max_tags, config.tag_merge, config.tag_queries,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def choose(self, tags: ImageTags) -> ImageTags:
        """Merge, keep the best `cap` by the signal (ties: the earlier), order."""
        kept = self._merged(tags)
        score = tags.score(self.signal)
        best = sorted(kept, key=lambda i: (-score[i], i))[: self.cap]
        if self.order == "retrieval":
            best.sort()
        elif self.order == "none":
            best.sort(key=lambda i: (tags.ids[i], i))
        return tags.take(best)

    def _merged(self, tags: ImageTags) -> list[int]:
        """Rows that are left; of equal texts the one with the best signal."""
        rows = list(range(len(tags)))
        if self.merge == "none":
            return rows
        score = tags.score(self.signal)
        words = [tuple(re.findall(r"\w+", text.casefold())) or (text,) for text in tags.texts]
        first: dict[tuple[str, ...], int] = {}
        for i in rows:
            if words[i] not in first or score[i] > score[first[words[i]]]:
                first[words[i]] = i
        rows = sorted(first.values())
        if self.merge == "contained":
            rows = [
                i
                for i in rows
                if not any(len(words[i]) < len(words[j]) and set(words[i]) <= set(words[j]) for j in rows)
            ]
        return rows


class TagLookup:
    """Image vectors to tags, through a tag source. Embeddings of tags are kept, so a tag crosses the wire once.

    A source that is down or late gives no tags: the model then answers without, and `degraded` counts the images.
    """

    def __init__(
        self,
        source: TagSource,
        *,
        k: int = 5,
        store: str = "",
        version: int = 0,
        any_store: bool = False,
        dimension: int = 0,
    ) -> None:
        """
        Args:
            source: of `tagstore.client.connect`.
            k: neighbours an image.
            store, version: the only ones that are taken, as a checkpoint pins them; empty and 0 for any.
            any_store: take any store all the same.
            dimension: D of the (absent) embeddings of an image without tags.
        """
        self.source, self.k, self.dimension = source, k, dimension
        self._store, self._version = ("", 0) if any_store else (store, version)
        self._embeddings: dict[tuple[str, str, int], NDArray[np.float32]] = {}
        self.degraded = 0
        """Images that got no tags because the store did not answer."""
        self.last_error = ""
        """What the store's failure said, last."""

    @classmethod
    def of(cls, source: TagSource, config: Any, *, any_store: bool = False) -> TagLookup:
        """As a checkpoint's `TunaConfig` asks for it."""
        return cls(
            source,
            k=config.neighbours,
            store=config.store,
            version=config.store_version,
            any_store=any_store,
            dimension=config.tag_dimension,
        )

    def __call__(self, vectors: Any, fingerprint: Fingerprint | str, **options: Any) -> list[ImageTags]:
        """Tags of each image vector `[N, D]` (array or tensor); `options` go to `TagSource.retrieve`.

        Raises:
            FingerprintMismatch: vectors of another encoder than the store's.
            InvalidInput: an answer of another store or version than the pinned one.
        """
        return [tags for tags, _ in self.detailed(vectors, fingerprint, **options)]

    def detailed(
        self, vectors: Any, fingerprint: Fingerprint | str, **options: Any
    ) -> list[tuple[ImageTags, Retrieval | None]]:
        """As a call, with the store's answers (neighbours, version) beside; None where the store did not answer."""
        rows = np.asarray(
            vectors.detach().float().cpu() if hasattr(vectors, "detach") else vectors, np.float32
        )
        try:
            answers = self.source.retrieve(vectors=rows, fingerprint=fingerprint, k=self.k, **options)
            for answer in answers:
                self._check(answer)
            self._fetch(answers)
        except Unavailable as error:
            self.degraded += len(rows)
            self.last_error = str(error)
            log.info("%d images without tags: %s", len(rows), error)
            return [(ImageTags.none(rows.shape[1]), None) for _ in rows]
        late = sum(answer.degraded for answer in answers)
        if late:
            self.degraded += late
            self.last_error = "the store did not answer in time"
        return [
            (ImageTags.none(len(row)), None) if answer.degraded else (self._tags(answer, row), answer)
            for answer, row in zip(answers, rows, strict=True)
        ]

    def _tags(self, answer: Retrieval, row: NDArray[np.float32]) -> ImageTags:
        if not answer.tags:
            return ImageTags.none(len(row))
        known = self._embeddings
        embeddings = np.stack([known[answer.store, answer.fingerprint, tag.tag_id] for tag in answer.tags])
        # relevance as the model itself will compute it, so that order and weights agree
        return ImageTags.of(answer, embeddings).for_image(row)

    def _fetch(self, answers: Sequence[Retrieval]) -> None:
        if len(self._embeddings) > _REMEMBERED:
            self._embeddings.clear()
        missing = {
            (answer.store, answer.fingerprint, tag.tag_id): None
            for answer in answers
            for tag in answer.tags
            if (answer.store, answer.fingerprint, tag.tag_id) not in self._embeddings
        }
        if missing:
            keys = list(missing)
            for key, found in zip(
                keys, self.source.tags([key[2] for key in keys], embeddings=True), strict=True
            ):
                if found.embedding is None:
                    raise InvalidInput(
                        f"tag '{found.text}' of store '{key[0]}' has no text embedding: the store was made without; embed its tags"
                    )
                self._embeddings[key] = np.asarray(found.embedding, np.float32)

    def _check(self, answer: Retrieval) -> None:
        if not answer.tags or answer.store == "random":  # random:// is a control experiment on purpose
            return
        if (self._store and answer.store != self._store) or (
            self._version and answer.version != self._version
        ):
            raise InvalidInput(
                f"this model was trained with store '{self._store}' version {self._version or 'any'}, and '{answer.store}' version "
                f"{answer.version} answers: ask for ...{self._store}@{self._version}, or say any_store=True (--any-store) if you mean it"
            )
        if self._embeddings and answer.fingerprint != next(iter(self._embeddings))[1]:
            known = next(iter(self._embeddings))[1]
            raise FingerprintMismatch.between(answer.store, answer.fingerprint, known)
