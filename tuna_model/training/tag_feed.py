"""Tags for training batches: looked up with the leak guard, with the recipe's noise; or the neighbours'
captions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

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
        lookups: Mapping[str, TagLookup],
        recipe: TagRecipe,
        *,
        fingerprint: str,
        seed: int,
        stores: Sequence[str] = (),
        captions: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """
        Args:
            lookups: of each store by its name. The vocabulary of each is the source of its wrong tags, if the
                recipe has any.
            fingerprint: digest of the encoder that computes the vectors.
            stores: the name of each sample's store, empty for no tags; needed if there are several.
            captions: of neighbours by their keys, for `recipe.content = "captions"`.

        Raises:
            InvalidInput: the recipe needs captions, and there are none.
        """
        self.recipe = recipe
        self._lookups, self._stores = dict(lookups), stores
        self._fingerprint, self._seed, self._captions = fingerprint, seed, captions
        if recipe.content == "captions" and captions is None:
            raise InvalidInput(
                "tags.content 'captions' needs a data set with the neighbours' captions: tags.captions"
            )
        self._pools = {
            name: TagPool.draw(lookup.source, recipe.noise.pool, seed) if recipe.noise.wrong else None
            for name, lookup in self._lookups.items()
        }
        self.milliseconds = 0.0
        """Milliseconds that the stores took for the last batch."""

    @property
    def degraded(self) -> int:
        """Images that got no tags because their store did not answer."""
        return sum(lookup.degraded for lookup in self._lookups.values())

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
        self.milliseconds = 0.0
        none = ImageTags.none(features.vectors.shape[1])
        answers: list[tuple[ImageTags, Retrieval | None]] = [(none, None)] * len(rows)
        for name, lookup in self._lookups.items():
            places = [i for i, row in enumerate(rows) if not self._stores or self._stores[row] == name]
            if not places:
                continue
            part = features.take(places)
            clock = time.perf_counter()
            retrieved = lookup.detailed(part.vectors, self._fingerprint, **self._leak_guard(part))
            self.milliseconds += 1000 * (time.perf_counter() - clock)
            for i, (tags, answer), vector in zip(places, retrieved, part.vectors.numpy(), strict=True):
                rng = np.random.default_rng([self._seed, epoch, rows[i]])
                answers[i] = add_noise(tags, self.recipe.noise, rng, self._pools[name], vector), answer
        return answers

    def _leak_guard(self, features: Features) -> dict[str, Any]:
        if not self.recipe.leak_guard:
            return {"identities": features.identities}  # a recorded map knows images by them
        bits, identities = self.recipe.leak_bits, features.identities
        return {"exclude": "self", "exclude_distance": bits, "identities": identities}
