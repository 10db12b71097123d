"""A sample as a conversation, and the batches of an epoch. Samples are read by `tagstore.readers.samples`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from tagstore.errors import InvalidInput
from tagstore.readers.samples import Place, Sample, Turn

CAPTION_PROMPT = "Describe the image in one sentence."


def conversation(sample: Sample, rng: np.random.Generator, prompt: str = CAPTION_PROMPT) -> tuple[Turn, ...]:
    """The turns of a sample; for a captioned picture `prompt` and one of its captions, drawn by `rng`."""
    if sample.turns:
        return sample.turns
    caption = sample.captions[int(rng.integers(len(sample.captions)))]
    return Turn("user", prompt), Turn("assistant", caption)


def digest(samples: Sequence[Sample]) -> str:
    """Digest of what a run learns from: keys, texts, stores, and names and sizes of the images.

    It does not depend on the folder, so that data may be moved. Pictures are not read.
    """
    found = hashlib.sha256()
    for sample in samples:
        images = [(place.path.name, place.offset, _size(place)) for place in sample.images]
        turns = [asdict(turn) for turn in sample.turns]
        record = [sample.key, images, turns, sample.captions, sample.metadata.get("store")]
        found.update(json.dumps(record).encode() + b"\n")
    return found.hexdigest()


def _size(place: Place) -> int:
    if place.length >= 0:
        return place.length
    try:
        return place.path.stat().st_size
    except OSError:  # whoever reads the image says what is wrong
        return -1


def text_length(sample: Sample) -> int:
    """Characters of the conversation, or of the mean caption: samples are grouped by it."""
    if sample.turns:
        return sum(len(turn.text) for turn in sample.turns)
    return sum(map(len, sample.captions)) // max(1, len(sample.captions))


def batches(lengths: Sequence[int], size: int, *, seed: int, epoch: int, group: int = 50) -> list[list[int]]:
    """The batches of an epoch as indices: a permutation that depends on `seed` and `epoch` alone.

    Batches of `group` x `size` shuffled samples are sorted by length before they are cut, so that little is
    padded; then the batches are shuffled. The last samples that make no full batch are left out: they come in
    other epochs. `group` 0 keeps no lengths together.
    """
    if len(lengths) < size:
        raise InvalidInput(f"a batch of {size} needs at least as many samples, there are {len(lengths)}")
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    order = order[: len(order) // size * size]
    if group:
        by_length = np.asarray(lengths)
        span = group * size
        order = np.concatenate(
            [
                (part := order[i : i + span])[np.argsort(by_length[part], kind="stable")]
                for i in range(0, len(order), span)
            ]
        )
    rows = order.reshape(-1, size)
    if group:
        rng.shuffle(rows)
    return [[int(i) for i in row] for row in rows]
