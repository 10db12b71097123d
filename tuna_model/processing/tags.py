"""The tags of an image as the model takes them: looked up, chosen, ordered. numpy only.

lookup = TagLookup(connect(URL), k=5)
tags = lookup(vectors, fingerprint)          # ImageTags of each image
chosen = TagLayout(cap=10).choose(tags[0])   # those that go into the prompt
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tagstore.client import TagSource
from tagstore.errors import InvalidInput, Unavailable
from tagstore.plain_text import MAX_TAG_CHARS
from tagstore.types import Fingerprint, Retrieval, StoreInfo
from tuna_model.processing.foreign_text import neutral_tag

log = logging.getLogger(__name__)

MAX_IMAGE_TAGS = 1000
"""Tags of an image that are read; the best `max_tags` of them go into the prompt."""
_LARGEST = 2.0
"""Length of an embedding, or size of a signal, beyond which it is no unit vector and no cosine."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageTags:
    """n tags of one image, with what the model needs of each."""

    texts: tuple[str, ...]
    embeddings: NDArray[np.float32]
    """`[n, D]`, unit rows."""
    similarity: NDArray[np.float32]
    """`[n]`, of the best neighbour that carries the tag."""
    vote_share: NDArray[np.float32]
    """`[n]`, the share of the neighbours that carry it, in [0, 1]."""
    relevance: NDArray[np.float32]
    """`[n]`, cosine of embedding and image vector."""
    ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def votes(self) -> NDArray[np.float32]:
        """Deprecated name of `vote_share`."""
        return self.vote_share

    @classmethod
    def none(cls, dimension: int) -> ImageTags:
        """No tags."""
        empty = np.zeros(0, np.float32)
        return cls((), np.zeros((0, dimension), np.float32), empty, empty, empty, ())

    @classmethod
    def of(cls, retrieval: Retrieval, embeddings: NDArray[np.float32]) -> ImageTags:
        """Convert an answer of the store, with its tags' embeddings `[n, D]`."""
        # an answer need not list its neighbours
        neighbours = max(1, len(retrieval.neighbours), *(tag.votes for tag in retrieval.tags))
        return cls(
            tuple(tag.tag for tag in retrieval.tags),
            np.asarray(embeddings, np.float32),
            np.array([tag.similarity for tag in retrieval.tags], np.float32),
            np.array([tag.votes / neighbours for tag in retrieval.tags], np.float32),
            np.array([tag.relevance for tag in retrieval.tags], np.float32),
            tuple(tag.tag_id for tag in retrieval.tags),
        )

    def sound(self) -> ImageTags:
        """The tags that a prompt may hold, their texts harmless there; the same object if all are.

        A tag is left out if it has no text or more than `MAX_TAG_CHARS` characters, if one of its numbers is
        not finite or is none that a cosine or a unit vector can have, and if it is behind the first
        `MAX_IMAGE_TAGS`.
        """
        # a comparison with NaN is false
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.einsum("nd,nd->n", self.embeddings, self.embeddings, dtype=np.float64)
            good = squares <= _LARGEST**2
            for signal in (self.similarity, self.vote_share, self.relevance):
                good &= np.abs(signal) <= _LARGEST
        good[MAX_IMAGE_TAGS:] = False
        texts = tuple(
            neutral_tag(text) if len(text) <= MAX_TAG_CHARS and good[i] else ""
            for i, text in enumerate(self.texts)
        )
        rows = [i for i, text in enumerate(texts) if text]
        if texts == self.texts and len(rows) == len(texts):
            return self
        return replace(self, texts=texts).take(rows)

    def take(self, rows: Sequence[int]) -> ImageTags:
        """The tags of these rows, in this order."""
        index = np.asarray(rows, np.int64)
        return ImageTags(
            tuple(self.texts[i] for i in rows),
            self.embeddings[index],
            self.similarity[index],
            self.vote_share[index],
            self.relevance[index],
            tuple(self.ids[i] for i in rows),
        )

    def extend(self, other: ImageTags) -> ImageTags:
        """These tags and those of another image, whose relevance must be this image's (`for_image`)."""
        return ImageTags(
            self.texts + other.texts,
            np.concatenate([self.embeddings, other.embeddings]),
            np.concatenate([self.similarity, other.similarity]),
            np.concatenate([self.vote_share, other.vote_share]),
            np.concatenate([self.relevance, other.relevance]),
            self.ids + other.ids,
        )

    def for_image(self, vector: NDArray[np.float32]) -> ImageTags:
        """The same tags for another image: computes relevance anew from its unit vector `[D]`."""
        return replace(self, relevance=self.embeddings @ vector)

    def score(self, signal: str, mix: Sequence[float] = (1.0, 1.0, 1.0)) -> NDArray[np.float32]:
        """`[n]` of a signal of `TunaConfig.tag_signal`; `mix` is its `tag_mix`."""
        if signal == "uniform":
            return np.zeros(len(self), np.float32)
        if signal == "mixed":
            signals = np.stack([self.relevance, self.similarity, self.vote_share], axis=1)
            return signals @ np.asarray(mix, np.float32)
        values: NDArray[np.float32] = getattr(self, signal)
        return values


@dataclass(frozen=True, slots=True)
class TagLayout:
    """Which tags of an image go into the prompt, in which order, and the texts around them. See
    `TunaConfig`."""

    signal: str = "relevance"
    place: str = "before"
    prefix: str = ""
    separator: str = ","
    suffix: str = "\n"
    order: str = "weight"
    cap: int = 10
    merge: str = "text"
    queries: str = "tag"
    mix: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @classmethod
    def of(cls, config: Any) -> TagLayout:
        """The layout fields of a `TunaConfig`."""
        return cls(
            config.tag_signal, config.tag_place, config.tag_prefix, config.tag_separator, config.tag_suffix,
            config.tag_order, config.max_tags, config.tag_merge, config.tag_queries, tuple(config.tag_mix),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def choose(self, tags: ImageTags) -> ImageTags:
        """Merge the sound ones, keep the best `cap` by the signal (of equal ones the earlier), order."""
        tags = tags.sound()
        score = tags.score(self.signal, self.mix)
        best = sorted(self._merged(tags), key=lambda i: (-score[i], i))[: self.cap]
        if self.order == "retrieval":
            best.sort()
        elif self.order == "none":
            best.sort(key=lambda i: (tags.ids[i], i))
        return tags.take(best)

    def _merged(self, tags: ImageTags) -> list[int]:
        """Rows that remain; of equal texts the one with the best signal."""
        if self.merge == "none":
            return list(range(len(tags)))
        score = tags.score(self.signal, self.mix)
        words = [tuple(re.findall(r"\w+", text.casefold())) or (text,) for text in tags.texts]
        best: dict[tuple[str, ...], int] = {}
        for i, key in enumerate(words):
            if key not in best or score[i] > score[best[key]]:
                best[key] = i
        rows = sorted(best.values())
        if self.merge == "contained":
            rows = [
                i
                for i in rows
                if not any(len(words[i]) < len(words[j]) and set(words[i]) <= set(words[j]) for j in rows)
            ]
        return rows


def weigh_for_stores(model: Any, processor: Any, infos: Sequence[StoreInfo]) -> None:
    """Let model and processor weigh the signals of `mixed` as in stores of this kind, grounded or not.

    Raises:
        InvalidInput: some stores are grounded and some are not, and the model mixes signals.
    """
    grounded = {bool(info.tag_embeddings) for info in infos} or {False}
    config = model.config
    if len(grounded) > 1 and config.tag_signal == "mixed":
        names = ", ".join(sorted(info.store for info in infos if not info.tag_embeddings))
        raise InvalidInput(
            f"some stores are grounded and some are not ({names}): their relevances have other sizes. Run "
            "`tagstore ground` on all of them, or on none"
        )
    model.weight_tuner.grounded = True in grounded
    mix = config.tag_mix_grounded if model.weight_tuner.grounded else config.tag_mix
    processor.layout = {**processor.layout, "mix": tuple(mix)}


class TagLookup:
    """Image vectors to tags through a tag source, which caches what crosses the wire.

    A source that is down or late gives no tags: the model then answers without, and `degraded` counts the
    images.
    """

    def __init__(
        self,
        source: TagSource,
        *,
        k: int = 5,
        store: str = "",
        version: int = 0,
        any_store: bool = False,
    ) -> None:
        """
        Args:
            source: of `tagstore.client.connect`.
            k: neighbours per image.
            store, version: refuse answers of another one; a checkpoint pins them. Empty and 0 for any.
            any_store: accept any store all the same.
        """
        self.source, self.k = source, k
        self._store, self._version = ("", 0) if any_store else (store, version)
        self.degraded = 0
        """Images that got no tags because the store did not answer."""
        self.dropped = 0
        """Tags that are left out because they are not sound (`ImageTags.sound`)."""
        self.last_error = ""
        """Message of the store's latest failure."""

    @classmethod
    def of(cls, source: TagSource, config: Any, *, any_store: bool = False) -> TagLookup:
        """The lookup that a checkpoint's `TunaConfig` describes."""
        k, store, version = config.neighbours, config.store, config.store_version
        return cls(source, k=k, store=store, version=version, any_store=any_store)

    def __call__(self, vectors: Any, fingerprint: Fingerprint | str, **options: Any) -> list[ImageTags]:
        """Tags of each image vector `[N, D]` (array or tensor); `options` go to `TagSource.retrieve`.

        Raises:
            FingerprintMismatch: the vectors are not of the store's encoder.
            InvalidInput: another store or version answers than the pinned one.
        """
        return [tags for tags, _ in self.detailed(vectors, fingerprint, **options)]

    def detailed(
        self, vectors: Any, fingerprint: Fingerprint | str, **options: Any
    ) -> list[tuple[ImageTags, Retrieval | None]]:
        """As a call, with the store's answers (neighbours, version); None where the store did not answer."""
        tensor = hasattr(vectors, "detach")
        rows = np.asarray(vectors.detach().float().cpu() if tensor else vectors, np.float32)
        try:
            answers = self.source.retrieve(vectors=rows, fingerprint=fingerprint, k=self.k, **options)
            embeddings = self._embeddings(answers)
        except Unavailable as error:
            log.info("%d images without tags: %s", len(rows), error)
            self.degraded, self.last_error = self.degraded + len(rows), str(error)
            return [(ImageTags.none(len(row)), None) for row in rows]
        results: list[tuple[ImageTags, Retrieval | None]] = []
        for answer, row in zip(answers, rows, strict=True):
            tags = ImageTags.none(len(row))
            if answer.degraded:
                self.degraded, self.last_error = self.degraded + 1, "the store did not answer in time"
            elif answer.tags:
                tags = ImageTags.of(answer, np.stack([embeddings[tag.tag_id] for tag in answer.tags]))
                tags = tags.for_image(row)  # as the model computes it, so that order and weights agree
                tags = self._sound(tags, answer)
            results.append((tags, None if answer.degraded else answer))
        return results

    def _sound(self, tags: ImageTags, answer: Retrieval) -> ImageTags:
        sound = tags.sound()
        if dropped := len(tags) - len(sound):
            if not self.dropped:
                log.warning(
                    "store %s@%d: %d tags of an image are left out: too long, or with numbers that are not "
                    "finite. Check the store with `tagstore verify`; further ones are counted",
                    answer.store, answer.version, dropped,
                )  # fmt: skip
            self.dropped += dropped
        return sound

    def _embeddings(self, answers: Sequence[Retrieval]) -> dict[int, NDArray[np.float32]]:
        """Text embeddings of all tags in these answers, which must be of the pinned store."""
        for answer in answers:
            self._check_store(answer)
        tag_ids = list({tag.tag_id: None for answer in answers for tag in answer.tags})
        embeddings = {}
        for tag in self.source.tags(tag_ids, embeddings=True) if tag_ids else ():
            if tag.embedding is None:
                store = next(answer.store for answer in answers if answer.tags)
                raise InvalidInput(
                    f"tag '{tag.text}' of store '{store}' has no text embedding: ingest it with an encoder"
                )
            embeddings[tag.tag_id] = np.asarray(tag.embedding, np.float32)
        return embeddings

    def _check_store(self, answer: Retrieval) -> None:
        if not answer.tags or answer.store == "random":  # random:// is a control experiment on purpose
            return
        if self._store not in ("", answer.store) or self._version not in (0, answer.version):
            raise InvalidInput(
                f"this model was trained with store '{self._store}' version {self._version or 'any'}, and "
                f"'{answer.store}' version {answer.version} answers: ask for "
                f"...{self._store}@{self._version}, or say any_store=True (--any-store) if you mean it"
            )
