"""Batches of pairs with decoded images, and digests by which an ingest that was cut off knows them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from tagstore.encoding.decode_memory import MemoryBudget
from tagstore.encoding.images import decoding, perceptual_hash
from tagstore.errors import BadImage
from tagstore.ingestion.report import Outcome
from tagstore.storage.staging import Draft, Progress
from tagstore.storage.writer import Writer
from tagstore.types import Pair, Rejected

BATCH = 256
"""Pairs of a batch at most."""
BATCH_BYTES = 128 << 20
"""Bytes of images and captions after which a batch ends early, so that memory stays bounded."""
TEXT_BYTES, VALUE_COPIES = 64, 20
"""Bytes of a text in memory beside its characters; how much larger than JSON its values may be."""

Pairs = Iterator[Pair | Rejected]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A pair whose image is decoded, where the store does not have the pair as it is."""

    draft: Draft
    pair: Pair
    pixels: NDArray[np.uint8] | None


Batch = list[tuple[bytes, Prepared | Rejected]]
"""Items of the source, each with the digest of what was read of it."""


def next_batch(pairs: Pairs, most: int, most_bytes: int) -> Pairs:
    size = 0
    for item in islice(pairs, most):
        yield item
        size += _size(item) if isinstance(item, Pair) else 0
        if size > most_bytes:
            return


def _size(pair: Pair) -> int:
    """Estimate the memory of a pair."""
    metadata = len(json.dumps(dict(pair.metadata))) if pair.metadata else 0
    return len(pair.image) + sum(len(c) + TEXT_BYTES for c in pair.captions) + VALUE_COPIES * metadata


def prepare(
    item: Pair | Rejected,
    resize: Callable[[Image], NDArray[np.uint8]],
    folder: str,
    memory: MemoryBudget,
    holds: Callable[[Draft], bool],
) -> tuple[bytes, Prepared | Rejected]:
    """The digest of an item of the source, and the item with its image decoded, or why it was refused.

    Args:
        resize: an image to the input of the encoder.
        holds: whether the store has a pair as it is: then its image is not decoded.
    """
    digest = hashlib.sha256(item.image).digest() if isinstance(item, Pair) else b""
    mark = item_digest(item, digest)
    if isinstance(item, Rejected):
        return mark, item
    origin = item.origin.removeprefix(folder)
    draft = Draft(item.key, digest, 0, item.captions, metadata=item.metadata, origin=origin)
    # without the encoded image: a batch that waits holds pixels at the tower's size, not photographs
    pair = replace(item, image=b"")
    if holds(draft):
        return mark, Prepared(draft, pair, None)
    try:
        with decoding(item.image, memory=memory) as image:
            pixels, near = resize(image), perceptual_hash(image)
    except BadImage as error:
        return mark, Rejected(item.key, str(error), item.origin)
    return mark, Prepared(replace(draft, perceptual_hash=near), pair, pixels)


def item_digest(item: Pair | Rejected, image: bytes) -> bytes:
    """sha256 of all that an ingest reads of an item; `image` is that of a pair's image."""
    if isinstance(item, Rejected):
        about = [item.key, item.reason]
    else:
        about = [item.key, image.hex(), *item.captions, json.dumps(dict(item.metadata), sort_keys=True)]
    return hashlib.sha256(json.dumps(about).encode()).digest()


def running_digest(before: str, items: Iterable[bytes]) -> str:
    return hashlib.sha256(before.encode() + b"".join(items)).hexdigest()


def peeked(items: Iterable[Pair | Rejected]) -> Pairs:
    """The same items; a source that can't be read at all raises now, before anything is made on disk."""
    iterator = iter(items)
    first = next(iterator, None)
    return iter(()) if first is None else chain([first], iterator)


def skip(pairs: Pairs, reached: Progress, writer: Writer) -> bool:
    """Read again what an interrupted run read; false if the source reads differently now."""
    done, digest = 0, ""
    while done < reached.pairs:
        batch = list(next_batch(pairs, BATCH, BATCH_BYTES))
        if not batch:
            return False
        done += len(batch)
        images = (hashlib.sha256(item.image).digest() if isinstance(item, Pair) else b"" for item in batch)
        digest = running_digest(digest, map(item_digest, batch, images))
        writer.confirm([item.key for item in batch])
    return done == reached.pairs and digest == reached.digest


def outcomes(batch: Batch, added: set[str], duplicates: list[Rejected]) -> list[tuple[str, Outcome, str]]:
    """What became of each item of a batch: (key, outcome, reason)."""
    reasons = {refused.key: refused.reason for refused in duplicates}
    outcomes: list[tuple[str, Outcome, str]] = []
    for _, item in batch:
        if isinstance(item, Rejected):
            outcomes.append((item.key, "quarantined", item.reason))
            continue
        key = item.draft.key
        if key in added:
            added.remove(key)  # a second one of the same key is a duplicate
            outcomes.append((key, "added", ""))
        elif key in reasons:
            outcomes.append((key, "quarantined", reasons[key]))
        else:
            outcomes.append((key, "unchanged", ""))
    return outcomes
