"""The batches of a run from any step on, made in a thread while the model learns from earlier ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from tagstore.errors import InvalidInput
from tagstore.readers.samples import Sample
from tuna_model.processing.data import batches, conversation, text_length
from tuna_model.processing.tags import ImageTags
from tuna_model.training.collator import IGNORED, Collator
from tuna_model.training.features import Features, ImageFeatures
from tuna_model.training.recipe import Recipe
from tuna_model.training.tag_feed import TagFeed


@dataclass(frozen=True, slots=True)
class Step:
    """One process's share of an optimizer step."""

    number: int
    epoch: int
    parts: tuple[dict[str, Any], ...]
    """Micro-batches for the model's forward, with labels."""
    samples: int
    labels: int
    """Labels in this process's share."""
    retrieval_ms: float
    """Milliseconds that the store took."""
    tags: int
    """Tags of all images, before the layout's cap."""


class Loader:
    """Makes steps in order. A step depends on the seed, its number and the number of processes only, not on
    earlier ones."""

    def __init__(
        self,
        recipe: Recipe,
        samples: Sequence[Sample],
        features: ImageFeatures,
        feed: TagFeed | None,
        collator: Collator,
        *,
        rank: int,
        world: int,
    ) -> None:
        """
        Args:
            feed: where tags come from; None for no tags.
            rank, world: number of this process, and of processes; they share each batch.

        Raises:
            InvalidInput: processes cannot share a batch evenly, or there are fewer samples than a batch has.
        """
        if recipe.batch_size % world:
            raise InvalidInput(
                f"batch_size {recipe.batch_size} cannot be shared by {world} processes: take a multiple"
            )
        if len(samples) < recipe.batch_size:
            raise InvalidInput(
                f"a batch of {recipe.batch_size} needs at least as many samples, "
                f"the data set has {len(samples)}"
            )
        self.recipe, self.samples = recipe, samples
        self._features, self._feed, self._collator = features, feed, collator
        self._rank, self._world = rank, world
        self._lengths = [text_length(sample) for sample in samples]
        self.steps_per_epoch = len(samples) // recipe.batch_size
        self._batches = lru_cache(maxsize=2)(self._batches_of_epoch)

    def from_step(self, first: int) -> Generator[Step, None, None]:
        """Make the steps from `first` on, ahead of their use. Close the iterator to stop the thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            pending: deque[Future[Step]] = deque()
            try:
                for number in range(first, self.recipe.steps):
                    while len(pending) <= self.recipe.ahead and number + len(pending) < self.recipe.steps:
                        pending.append(pool.submit(self.make, number + len(pending)))
                    yield pending.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def make(self, number: int) -> Step:
        """Make one step."""
        epoch, place = divmod(number, self.steps_per_epoch)
        share = self._batches(epoch)[place][self._rank :: self._world]
        size = self.recipe.micro_batch or len(share)
        parts, labels, retrieval_ms, tags = [], 0, 0.0, 0
        for start in range(0, len(share), size):
            part, count = self._micro_batch(share[start : start + size], epoch)
            parts.append(part)
            labels += int((part["labels"] != IGNORED).sum())
            tags += count
            retrieval_ms += self._feed.milliseconds if self._feed else 0.0
        return Step(number, epoch, tuple(parts), len(share), labels, retrieval_ms, tags)

    def _batches_of_epoch(self, epoch: int) -> list[list[int]]:
        recipe = self.recipe
        return batches(
            self._lengths, recipe.batch_size, seed=recipe.seed, epoch=epoch, group=recipe.data.group
        )

    def _micro_batch(self, numbers: Sequence[int], epoch: int) -> tuple[dict[str, Any], int]:
        """Tensors of the samples with these numbers, and how many tags they have."""
        samples = [self.samples[i] for i in numbers]
        rows = [i for i, sample in zip(numbers, samples, strict=True) for _ in sample.images]
        # the caption is drawn with a generator of its own: noise of tags must not change it
        generators = [np.random.default_rng([self.recipe.seed, epoch, i, 2]) for i in numbers]
        conversations = [
            conversation(sample, rng, self.recipe.data.prompt)
            for sample, rng in zip(samples, generators, strict=True)
        ]
        keys = [sample.key for sample in samples]
        if not rows:
            return self._collator(keys, conversations, [[] for _ in samples]), 0
        features = self._features(numbers)
        tags, contexts = self._tags(features, rows, epoch)
        ends = np.cumsum([0, *(len(sample.images) for sample in samples)]).tolist()
        sample_tags = [tags[start:end] for start, end in pairwise(ends)]
        sample_contexts = [" ".join(contexts[start:end]) for start, end in pairwise(ends)]
        batch = self._collator(keys, conversations, sample_tags, sample_contexts)
        return {**batch, "grid": features.grid, "image_vectors": features.vectors}, sum(map(len, tags))

    def _tags(self, features: Features, rows: Sequence[int], epoch: int) -> tuple[list[ImageTags], list[str]]:
        """Tags of each image, and the captions that stand in for them."""
        no_tags, no_captions = [ImageTags.none(features.vectors.shape[1]) for _ in rows], [""] * len(rows)
        if self._feed is None:
            return no_tags, no_captions
        if self._feed.recipe.content == "captions":
            return no_tags, self._feed.captions(features, rows, epoch)
        return self._feed(features, rows, epoch), no_captions


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Seed a step's random numbers (dropout) by its number, so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))
