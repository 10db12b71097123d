"""Noise on retrieved tags, as a store of lower quality would give them.

A model that was trained on good tags only copies them; one that has seen bad ones weighs them. What is drawn
depends on (seed, epoch, sample) alone, so a run that is resumed, or split over processes, sees the same tags.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tagstore.client import TagSource
from tagstore.errors import InvalidInput
from tuna_model.processing.tags import ImageTags
from tuna_model.training.recipe import NoiseRecipe


class TagPool:
    """Tags of a store's vocabulary, from which wrong ones are drawn."""

    def __init__(self, texts: tuple[str, ...], embeddings: NDArray[np.float32], ids: tuple[int, ...]) -> None:
        self.texts, self.embeddings, self.ids = texts, embeddings, ids

    @classmethod
    def draw(cls, source: TagSource, size: int, seed: int) -> TagPool:
        """Draw `size` tags of the vocabulary (or all), the same for the same seed and version.

        Fetches only their embeddings.

        Raises:
            InvalidInput: the store has no tags.
        """
        rng = np.random.default_rng([seed, 0x7A6])
        chosen: list[int] = []
        # reservoir sampling: a vocabulary of 3 million tags passes by, `size` are kept
        for number, tag in enumerate(source.vocabulary()):
            if number < size:
                chosen.append(tag.tag_id)
            elif (place := int(rng.integers(number + 1))) < size:
                chosen[place] = tag.tag_id
        if not chosen:
            raise InvalidInput(f"store '{source.info().store}' has no tags to draw wrong ones from")
        tags = source.tags(sorted(chosen), embeddings=True)
        embeddings = [tag.embedding for tag in tags if tag.embedding is not None]
        if len(embeddings) < len(tags):
            raise InvalidInput(
                f"tags of store '{source.info().store}' have no text embeddings: ingest it with an encoder"
            )
        texts, ids = tuple(tag.text for tag in tags), tuple(tag.tag_id for tag in tags)
        return cls(texts, np.stack(embeddings).astype(np.float32), ids)

    def take(self, rows: NDArray[np.int64]) -> ImageTags:
        """The tags of these rows, with all signals 0."""
        zeros = np.zeros(len(rows), np.float32)
        texts, ids = tuple(self.texts[i] for i in rows), tuple(self.ids[i] for i in rows)
        return ImageTags(texts, self.embeddings[rows], zeros, zeros, zeros, ids)


def add_noise(
    tags: ImageTags,
    noise: NoiseRecipe,
    rng: np.random.Generator,
    pool: TagPool | None,
    vector: NDArray[np.float32],
) -> ImageTags:
    """Add noise to an image's tags.

    A wrong tag keeps the similarity and vote share of the one it replaces, which are the store's word; its
    relevance is computed for this image, as the encoder would.

    Args:
        pool: source of wrong tags; may be None if `noise.wrong` is 0.
        vector: `[D]` of the image.
    """
    if not len(tags):
        return tags
    # all numbers are drawn, needed or not: changing one rate leaves the draws of the others as they were
    none, drop, wrong, shuffle = rng.random(), rng.random(len(tags)), rng.random(len(tags)), rng.random()
    picks = rng.random(len(tags))
    order = rng.permutation(len(tags))
    if none < noise.none:
        return ImageTags.none(tags.embeddings.shape[1])
    if noise.wrong and pool is not None:
        rows = np.flatnonzero(wrong < noise.wrong)
        drawn = pool.take((picks[rows] * len(pool.ids)).astype(np.int64))
        tags = replace_rows(tags, rows, drawn, vector)
    if shuffle < noise.shuffle:
        similarity, vote_share, relevance = (
            signal[order] for signal in (tags.similarity, tags.vote_share, tags.relevance)
        )
        tags = replace(tags, similarity=similarity, vote_share=vote_share, relevance=relevance)
    if noise.drop:
        tags = tags.take([int(i) for i in np.flatnonzero(drop >= noise.drop)])
    return tags


def replace_rows(
    tags: ImageTags, rows: NDArray[np.intp], others: ImageTags, vector: NDArray[np.float32]
) -> ImageTags:
    """Replace the tags in `rows` by others, which get their similarity and vote share, and their own
    relevance to `vector`."""
    if not len(rows):
        return tags
    texts, ids = list(tags.texts), list(tags.ids)
    embeddings, relevance = tags.embeddings.copy(), tags.relevance.copy()
    for i, row in enumerate(rows):
        texts[row], ids[row] = others.texts[i], others.ids[i]
    embeddings[rows] = others.embeddings
    relevance[rows] = others.embeddings @ vector
    return replace(tags, texts=tuple(texts), ids=tuple(ids), embeddings=embeddings, relevance=relevance)
