"""Tags for training batches: looked up with the leak guard, spoilt as the recipe says; or the neighbours' captions in their stead."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tagstore.client import TagSource
from tagstore.errors import InvalidInput
from tuna_model.processing.tags import ImageTags, TagLookup
from tuna_model.training.features import Features
from tuna_model.training.noise import TagPool, spoil
from tuna_model.training.recipe import TagRecipe


class TagFeed:
    """Tags of images, the same for the same (seed, epoch, sample) and version of the store, whatever batch they come in."""

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
            source: where wrong tags are drawn from, if there are to be any.
            lookup: asks `source`; it holds the pinned version and counts what was degraded.
            fingerprint: digest of the encoder that makes the vectors.
            captions: of neighbours by their keys, for `recipe.content = "captions"`.

        Raises:
            InvalidInput: captions are wanted and not given.
        """
        self.lookup, self.recipe = lookup, recipe
        self._fingerprint, self._seed, self._captions = fingerprint, seed, captions
        if recipe.content == "captions" and captions is None:
            raise InvalidInput(
                "tags.content 'captions' needs a data set that knows the neighbours' captions: tags.captions"
            )
        self._pool = TagPool.draw(source, recipe.noise.pool, seed) if recipe.noise.wrong else None
        self.milliseconds = 0.0
        """What the last batch waited for the store."""

    def __call__(self, features: Features, rows: Sequence[int], epoch: int) -> list[ImageTags]:
        """Tags of each image.

        Args:
            rows: which sample (its number in the data set) each image belongs to.
            epoch: of the batch; noise is drawn anew in each.
        """
        return [tags for tags, _ in self._answers(features, rows, epoch)]

    def captions(self, features: Features, rows: Sequence[int], epoch: int) -> list[str]:
        """The captions of each image's neighbours, nearest first, one of each neighbour, as one text; empty if there are none."""
        assert self._captions is not None
        texts = []
        for row, (_, answer) in zip(rows, self._answers(features, rows, epoch), strict=True):
            rng = np.random.default_rng([self._seed, epoch, row, 1])
            known = [
                self._captions.get(neighbour.key, ())
                for neighbour in (answer.neighbours if answer is not None else ())
            ]
            kept = [some[int(rng.integers(len(some)))] for some in known if some]
            texts.append(" ".join(caption for caption in kept if rng.random() >= self.recipe.noise.drop))
        return texts

    def _answers(self, features: Features, rows: Sequence[int], epoch: int) -> list[tuple[ImageTags, Any]]:
        clock = time.perf_counter()
        answers = self.lookup.detailed(features.vectors, self._fingerprint, **self._guard(features))
        self.milliseconds = 1000 * (time.perf_counter() - clock)
        found = []
        for row, (tags, answer), vector in zip(rows, answers, features.vectors.numpy(), strict=True):
            rng = np.random.default_rng([self._seed, epoch, row])
            found.append((spoil(tags, self.recipe.noise, rng, self._pool, vector), answer))
        return found

    def _guard(self, features: Features) -> dict[str, Any]:
        if not self.recipe.leak_guard:
            return {"identities": features.identities}  # a recorded map knows images by them
        return {
            "exclude": "self",
            "exclude_distance": self.recipe.leak_bits,
            "identities": features.identities,
        }
