"""Tags as a store under bad conditions would give them.

A model that has only seen good tags copies them, one that has seen bad ones weighs them. Whatever is drawn depends on (seed, epoch, sample)
alone, never on batch, process or history: a run that is resumed, or split over processes, sees the same tags.
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
    """Tags of a store's vocabulary that wrong ones are drawn from."""

    def __init__(self, texts: tuple[str, ...], embeddings: NDArray[np.float32], ids: tuple[int, ...]) -> None:
        self.texts, self.embeddings, self.ids = texts, embeddings, ids

    @classmethod
    def draw(cls, source: TagSource, size: int, seed: int) -> TagPool:
        """`size` tags of the vocabulary (or all), the same for the same seed and version; only their embeddings are fetched.

        Raises:
            InvalidInput: the store has no tags.
        """
        rng = np.random.default_rng([seed, 0x7A6])
        chosen: list[int] = []
        for number, tag in enumerate(
            source.vocabulary()
        ):  # a reservoir: 3 million tags are walked, `size` are kept
            if number < size:
                chosen.append(tag.tag_id)
            elif (place := int(rng.integers(number + 1))) < size:
                chosen[place] = tag.tag_id
        if not chosen:
            raise InvalidInput(f"store '{source.info().store}' has no tags to draw wrong ones from")
        found = source.tags(sorted(chosen), embeddings=True)
        embeddings = [tag.embedding for tag in found if tag.embedding is not None]
        if len(embeddings) < len(found):
            raise InvalidInput(
                f"tags of store '{source.info().store}' have no text embeddings: ingest it with an encoder"
            )
        return cls(
            tuple(t.text for t in found),
            np.stack(embeddings).astype(np.float32),
            tuple(t.tag_id for t in found),
        )

    def take(self, rows: NDArray[np.int64]) -> ImageTags:
        """These tags, without signals of any image."""
        nothing = np.zeros(len(rows), np.float32)
        ids = tuple(self.ids[i] for i in rows)
        return ImageTags(
            tuple(self.texts[i] for i in rows), self.embeddings[rows], nothing, nothing, nothing, ids
        )


def spoil(
    tags: ImageTags,
    noise: NoiseRecipe,
    rng: np.random.Generator,
    pool: TagPool | None,
    vector: NDArray[np.float32],
) -> ImageTags:
    """An image's tags with noise.

    A wrong tag takes the similarity and votes of the tag whose place it takes, for the store says so; its relevance is that of its own
    text and this image, for the encoder cannot be fooled.

    Args:
        pool: what wrong tags are drawn from; may be None if `noise.wrong` is 0.
        vector: `[D]` of the image.
    """
    if not len(tags):
        return tags
    # all draws are made, needed or not: changing one rate leaves the others' draws as they were
    lost, dropped, swapped, mixed = rng.random(), rng.random(len(tags)), rng.random(len(tags)), rng.random()
    picks = rng.random(len(tags))
    order = rng.permutation(len(tags))
    if lost < noise.none:
        return ImageTags.none(tags.embeddings.shape[1])
    if noise.wrong and pool is not None:
        wrong = np.flatnonzero(swapped < noise.wrong)
        drawn = pool.take((picks[wrong] * len(pool.ids)).astype(np.int64))
        tags = replace_rows(tags, wrong, drawn, vector)
    if mixed < noise.shuffle:
        tags = replace(
            tags, similarity=tags.similarity[order], votes=tags.votes[order], relevance=tags.relevance[order]
        )
    if noise.drop:
        tags = tags.take([int(i) for i in np.flatnonzero(dropped >= noise.drop)])
    return tags


def replace_rows(
    tags: ImageTags, rows: NDArray[np.intp], others: ImageTags, vector: NDArray[np.float32]
) -> ImageTags:
    """Other tags in the places `rows`, with the similarity and votes that were there and their own relevance to `vector`."""
    if not len(rows):
        return tags
    texts, ids = list(tags.texts), list(tags.ids)
    embeddings, relevance = tags.embeddings.copy(), tags.relevance.copy()
    for i, row in enumerate(rows):
        texts[row], ids[row] = others.texts[i], others.ids[i]
    embeddings[rows] = others.embeddings
    relevance[rows] = others.embeddings @ vector
    return replace(tags, texts=tuple(texts), ids=tuple(ids), embeddings=embeddings, relevance=relevance)
