"""Embed the images and texts of concurrent calls together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tagstore.encoding.encoder import Encoder
from tagstore.retrieval.catalog import encode_singly
from tagstore.serving import tracing
from tagstore.serving.batch_queue import BatchQueue
from tagstore.serving.settings import Limits
from tagstore.types import Vectors

BATCH_ROWS = 64
"""Largest number of images or texts in one batch."""
EmbedKey = tuple[str, str]
"""Modality, "images" or "texts", and the digest of the encoder's fingerprint."""


class Embedding(NamedTuple):
    """The images or texts of one call."""

    encoder: Encoder
    queries: NDArray[np.uint8] | Sequence[str]
    """Prepared images `[N, ...]`, or texts."""


def embed(items: Sequence[Embedding]) -> Vectors:
    """Embed the images of several calls, or the texts of several calls, with one encoder."""
    encoder, first = items[0]
    if isinstance(first, np.ndarray):
        pixels = first if len(items) == 1 else np.concatenate([item.queries for item in items])
        return encode_singly(encoder, pixels)
    return encode_singly(encoder, [text for item in items for text in item.queries])


def divide(items: Sequence[Embedding], vectors: Vectors) -> list[Vectors]:
    """Give each call its vectors."""
    return np.split(vectors, np.cumsum([len(item.queries) for item in items])[:-1])


class EmbedQueue(BatchQueue[Embedding, Vectors, Vectors]):
    """The queue of the encoders. One batch, which uses all cores, runs at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        super().__init__(
            "encoder",
            embed,
            divide,
            loop,
            stages=("embed",),
            rows=BATCH_ROWS,
            threads=1,
            max_wait=limits.embed_wait,
            spare=limits.embed_queue,
            trusted_batches=1,
            regroup_share=0.0,
        )


class CallEncoder:
    """Embeds for one call, from its thread, together with other calls."""

    def __init__(self, queue: EmbedQueue, digest: str, deadline: float, store: str) -> None:
        self._queue, self._digest, self._deadline, self._store = queue, digest, deadline, store
        self.seconds = 0.0
        """Seconds spent embedding so far, including waits."""

    def __call__(self, encoder: Encoder, queries: NDArray[np.uint8] | Sequence[str]) -> Vectors:
        modality = "images" if isinstance(queries, np.ndarray) else "texts"
        start = time.perf_counter()
        try:
            with tracing.span("embed", what=modality, queries=len(queries)):
                key, item = (modality, self._digest), Embedding(encoder, queries)
                return self._queue.wait(key, item, len(queries), self._deadline, self._store)
        finally:
            self.seconds += time.perf_counter() - start
