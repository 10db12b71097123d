"""The batches of a run, from any step on, made in a thread while the model learns from the ones before."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
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
    """What one process learns from in one optimizer step."""

    number: int
    epoch: int
    parts: tuple[dict[str, Any], ...]
    """Micro-batches for the model's forward, with labels."""
    samples: int
    labels: int
    """Tokens to learn in this process's share."""
    retrieval: float
    """Milliseconds that the store took."""
    tags: int
    """Tags over all images, before the layout's cap."""


class Loader:
    """Steps in their order. What a step holds depends on the seed, its number and the number of processes, on nothing that was before."""

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
            feed: None: no tags at all.
            rank, world: this process, and how many there are. They share a batch, so that one process or eight see the same.

        Raises:
            InvalidInput: a batch that cannot be shared evenly.
        """
        if recipe.batch_size % world:
            raise InvalidInput(
                f"batch_size {recipe.batch_size} cannot be shared by {world} processes: take a multiple"
            )
        if len(samples) < recipe.batch_size:
            raise InvalidInput(
                f"a batch of {recipe.batch_size} needs at least as many samples, the data set has {len(samples)}"
            )
        self.recipe, self.samples, self._features, self._feed, self._collator = (
            recipe,
            samples,
            features,
            feed,
            collator,
        )
        self._rank, self._world = rank, world
        self._lengths = [text_length(sample) for sample in samples]
        self.steps_an_epoch = len(samples) // recipe.batch_size
        self._epoch = lru_cache(maxsize=2)(self._batches_of)

    def from_step(self, first: int) -> Generator[Step, None, None]:
        """Steps `first` to the last, each made while those before it are used. Close the iterator to stop the thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            waiting: deque[Future[Step]] = deque()
            try:
                for number in range(first, self.recipe.steps):
                    while len(waiting) <= self.recipe.ahead and number + len(waiting) < self.recipe.steps:
                        waiting.append(pool.submit(self.make, number + len(waiting)))
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def make(self, number: int) -> Step:
        """One step."""
        epoch, place = divmod(number, self.steps_an_epoch)
        mine = self._epoch(epoch)[place][self._rank :: self._world]
        size = self.recipe.micro_batch or len(mine)
        parts, labels, retrieval, tags = [], 0, 0.0, 0
        for start in range(0, len(mine), size):
            part, count = self._part(mine[start : start + size], epoch)
            parts.append(part)
            labels += int((part["labels"] != IGNORED).sum())
            tags += count
            retrieval += self._feed.milliseconds if self._feed else 0.0
        return Step(number, epoch, tuple(parts), len(mine), labels, retrieval, tags)

    def _batches_of(self, epoch: int) -> list[list[int]]:
        return batches(
            self._lengths,
            self.recipe.batch_size,
            seed=self.recipe.seed,
            epoch=epoch,
            group=self.recipe.data.group,
        )

    def _part(self, some: Sequence[int], epoch: int) -> tuple[dict[str, Any], int]:
        samples = [self.samples[i] for i in some]
        rows = [i for i, sample in zip(some, samples, strict=True) for _ in sample.images]
        # the caption is drawn with a generator of its own: noise of tags must not change it
        drawn = [
            conversation(
                sample, np.random.default_rng([self.recipe.seed, epoch, i, 2]), self.recipe.data.prompt
            )
            for i, sample in zip(some, samples, strict=True)
        ]
        keys = [sample.key for sample in samples]
        if not rows:
            return self._collator(keys, drawn, [[] for _ in samples]), 0
        features = self._features(some)
        tags, contexts = self._tags(features, rows, epoch)
        of_sample: list[list[ImageTags]] = []
        said: list[str] = []
        start = 0
        for sample in samples:
            end = start + len(sample.images)
            of_sample.append(tags[start:end])
            said.append(" ".join(contexts[start:end]))
            start = end
        batch = self._collator(keys, drawn, of_sample, said)
        return {**batch, "grid": features.grid, "image_vectors": features.vectors}, sum(map(len, tags))

    def _tags(self, features: Features, rows: Sequence[int], epoch: int) -> tuple[list[ImageTags], list[str]]:
        nothing = [ImageTags.none(features.vectors.shape[1]) for _ in rows]
        if self._feed is None:
            return nothing, ["" for _ in rows]
        if self._feed.recipe.content == "captions":
            return nothing, self._feed.captions(features, rows, epoch)
        return self._feed(features, rows, epoch), ["" for _ in rows]


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step (dropout) are a function of it: a run that is resumed draws what it would have drawn."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))
