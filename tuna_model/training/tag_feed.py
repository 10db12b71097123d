"""Tags for training batches: looked up with the leak guard, with the recipe's noise; or the neighbours'
captions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tagstore.client import TagSource
from tagstore.errors import InvalidInput
from tagstore.types import Retrieval
from tuna_model.processing.tags import ImageTags, TagLookup
from tuna_model.training.features import Features
from tuna_model.training.noise import TagPool, add_noise
from tuna_model.training.recipe import TagRecipe


class TagFeed:
    """Gives tags of images: the same for the same (seed, epoch, sample) and version of the store, in any
    batch."""

    def __init__(
        self,
        source: TagSource,
        lookup: TagLookup,
        recipe: TagRecipe,
        *,
        fingerprint: str,
        seed: int,
        captions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """
        Args:
            source: its vocabulary is the source of wrong tags, if the recipe has any.
            lookup: asks `source`, and counts degraded images.
            fingerprint: digest of the encoder that computes the vectors.
            captions: of neighbours by their keys, for `recipe.content = "captions"`.

        Raises:
            InvalidInput: the recipe needs captions, and there are none.
        """
        self.lookup, self.recipe = lookup, recipe
        self._fingerprint, self._seed, self._captions = fingerprint, seed, captions
        if recipe.content == "captions" and captions is None:
            raise InvalidInput(
                "tags.content 'captions' needs a data set with the neighbours' captions: tags.captions"
            )
        self._pool = TagPool.draw(source, recipe.noise.pool, seed) if recipe.noise.wrong else None
        self.milliseconds = 0.0
        """Milliseconds that the store took for the last batch."""

    def __call__(self, features: Features, rows: Sequence[int], epoch: int) -> list[ImageTags]:
        """Tags of each image.

        Args:
            rows: the number of each image's sample in the data set.
            epoch: of the batch; noise is drawn anew in each.
        """
        return [tags for tags, _ in self.answers(features, rows, epoch)]

    def captions(self, features: Features, rows: Sequence[int], epoch: int) -> list[str]:
        """For each image one text: a caption of each neighbour, nearest first; empty if none is known."""
        assert self._captions is not None
        texts = []
        for row, (_, answer) in zip(rows, self.answers(features, rows, epoch), strict=True):
            rng = np.random.default_rng([self._seed, epoch, row, 1])
            neighbours = answer.neighbours if answer is not None else ()
            known = [self._captions.get(neighbour.key, ()) for neighbour in neighbours]
            drawn = [captions[int(rng.integers(len(captions)))] for captions in known if captions]
            texts.append(" ".join(caption for caption in drawn if rng.random() >= self.recipe.noise.drop))
        return texts

    def answers(
        self, features: Features, rows: Sequence[int], epoch: int
    ) -> list[tuple[ImageTags, Retrieval | None]]:
        """Tags of each image with the store's answer. Arguments as for a call."""
        clock = time.perf_counter()
        retrieved = self.lookup.detailed(features.vectors, self._fingerprint, **self._leak_guard(features))
        self.milliseconds = 1000 * (time.perf_counter() - clock)
        answers = []
        for row, (tags, answer), vector in zip(rows, retrieved, features.vectors.numpy(), strict=True):
            rng = np.random.default_rng([self._seed, epoch, row])
            answers.append((add_noise(tags, self.recipe.noise, rng, self._pool, vector), answer))
        return answers

    def _leak_guard(self, features: Features) -> dict[str, Any]:
        if not self.recipe.leak_guard:
            return {"identities": features.identities}  # a recorded map knows images by them
        bits, identities = self.recipe.leak_bits, features.identities
        return {"exclude": "self", "exclude_distance": bits, "identities": identities}
