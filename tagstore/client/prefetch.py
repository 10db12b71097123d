"""Retrieval beside the training step instead of in it.

samples ──read ahead──▶ batches ──several at a time──▶ source ──in the order of the samples──▶ (sample, answer)
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from tagstore.client.queries import BATCH_IMAGES
from tagstore.errors import InvalidInput
from tagstore.types import Fingerprint, Retrieval

if TYPE_CHECKING:
    from tagstore.client import TagSource

Field = str | int | Callable[[Any], Any]
"""How something is taken from a sample: a key or index of it, or a function of it."""

_END = object()


class TagPrefetcher:
    """Samples with their retrieved tags, in the order of the samples.

    Iterated, it reads ahead: a thread takes samples, others retrieve, and at most `depth` batches are held, however slow the one who
    iterates. What is raised by a sample or its retrieval is raised in its place. A loop that is left early leaves no thread behind.

    Indexed, as a map-style dataset of a `DataLoader` is, it retrieves where it is asked: in the workers, which read ahead themselves, once
    for each batch (`__getitems__`). It is a dataset of torch's without being made of torch.

    Args:
        samples: an iterable (a generator, WebDataset, IterableDataset, DataLoader), or something with `__getitem__` and `__len__`.
        source: where tags come from; opened in each process that asks.
        image: of a sample, encoded or as a path. Or:
        vector: of a sample, `[D]` of the store's encoder.
        fingerprint: of the encoder that made the vectors.
        key: of a sample, for the leak guard and for replay://.
        identity: of a sample, an `Identity`, for the leak guard where a vector is asked about.
        into: under which key the answer is put into a copy of the sample, a mapping; without it, `(sample, answer)` is yielded.
        batched: a sample is a batch: image, vector, key and identity give lists, and the answer is a list.
        batch: samples a request.
        depth: batches held: on their way, or waiting to be taken.
        workers: requests at a time.
        options: of `retrieve`.
    """

    def __init__(
        self,
        samples: Iterable[Any],
        source: TagSource,
        *,
        image: Field | None = None,
        vector: Field | None = None,
        fingerprint: Fingerprint | str = "",
        key: Field | None = None,
        identity: Field | None = None,
        into: str = "",
        batched: bool = False,
        batch: int = BATCH_IMAGES,
        depth: int = 4,
        workers: int = 2,
        **options: Any,
    ) -> None:
        if (image is None) == (vector is None):
            raise InvalidInput(
                "a TagPrefetcher asks by image or by vector: say how to take one of them from a sample"
            )
        if batch < 1 or depth < 1 or workers < 1:
            raise InvalidInput(f"batch {batch}, depth {depth}, workers {workers}: each is at least 1")
        self.samples, self.source = samples, source
        self._image, self._vector, self._key, self._identity = image, vector, key, identity
        self._fingerprint, self._into, self._batched, self._options = fingerprint, into, batched, options
        self._batch, self._depth, self._workers = 1 if batched else batch, depth, workers

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]  # raises TypeError where the samples have no length, as it should

    def __getitem__(self, index: Any) -> Any:
        return self._answered([self.samples[index]])[0]  # type: ignore[index]

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """Several at once, in one retrieval: what a DataLoader's worker asks of a batch."""
        many = getattr(self.samples, "__getitems__", None)
        return self._answered(many(indices) if many else [self.samples[i] for i in indices])  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        held: queue.Queue[Any] = queue.Queue()
        room = threading.Semaphore(self._depth)
        stop = threading.Event()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="prefetch")

        def read() -> None:
            """Batches into the pool, their futures into `held`, in order; last an end, or what went wrong with reading."""
            some: list[Any] = []
            end: Any = _END

            def submit() -> None:
                nonlocal some
                room.acquire()
                if not stop.is_set():
                    held.put(pool.submit(self._answered, some))
                some = []

            try:
                for sample in self.samples:
                    some.append(sample)
                    if len(some) == self._batch:
                        submit()
                    if stop.is_set():
                        return
            except BaseException as error:  # noqa: BLE001  raised again where the sample would have come
                end = error
            if some:
                submit()
            held.put(end)

        reader = threading.Thread(target=read, name="prefetch-reader", daemon=True)
        reader.start()
        try:
            while True:
                item = held.get()
                if item is _END:
                    return
                if isinstance(item, BaseException):
                    raise item
                future: Future[list[Any]] = item
                answered = future.result()
                room.release()
                yield from answered
        finally:
            stop.set()
            room.release()  # a reader that waits for room sees that nobody wants it
            pool.shutdown(wait=True, cancel_futures=True)
            reader.join()

    def _answered(self, samples: list[Any]) -> list[Any]:
        answers = self._retrieved(samples)
        if self._into:
            return [{**sample, self._into: answer} for sample, answer in zip(samples, answers, strict=True)]
        return list(zip(samples, answers, strict=True))

    def _retrieved(self, samples: list[Any]) -> Sequence[Retrieval | list[Retrieval]]:
        # a sample that is a batch comes alone, and its fields are lists already
        def taken(field: Field | None) -> Any:
            if field is None:
                return []
            return _take(samples[0], field) if self._batched else [_take(sample, field) for sample in samples]

        answers = self.source.retrieve(
            list(taken(self._image)),
            vectors=None if self._vector is None else np.asarray(taken(self._vector)),
            fingerprint=self._fingerprint,
            keys=[str(key) for key in taken(self._key)],
            identities=list(taken(self._identity)),
            **self._options,
        )
        return [answers] if self._batched else answers


def _take(sample: Any, field: Field) -> Any:
    return field(sample) if callable(field) else sample[field]
