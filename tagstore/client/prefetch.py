"""Retrieve tags beside the training step instead of in it.

samples ──read ahead──▶ batches ──several at a time──▶ source ──in the order of the samples──▶ (sample,
answer)
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from tagstore.client.queries import BATCH_IMAGES
from tagstore.client.tag_source import TagSource
from tagstore.errors import InvalidInput
from tagstore.types import Fingerprint, Retrieval

Field = str | int | Callable[[Any], Any]
"""How a value is read from a sample: a key or an index of it, or a function of it."""

_END = object()


class TagPrefetcher:
    """Samples with their retrieved tags, in the order of the samples.

    Iterated, it reads ahead: one thread reads samples, others retrieve, and at most `depth` batches are held,
    however slow the loop is. An error of a sample or of its retrieval is raised in its place. A loop that is
    left early leaves no thread behind.

    Indexed, as a map-style dataset of a `DataLoader` is, it retrieves where it is asked: in the workers,
    which read ahead themselves, once for each batch (`__getitems__`). It is a torch dataset without depending
    on torch.
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
        """
        Args:
            samples: an iterable (a generator, WebDataset, IterableDataset, DataLoader), or something with
                `__getitem__` and `__len__`.
            source: where tags come from; opened in each process that asks.
            image: of a sample, encoded or as a path. Or:
            vector: of a sample, `[D]` of the store's encoder.
            fingerprint: of the encoder that computed the vectors.
            key: of a sample, for the leak guard and for replay://.
            identity: of a sample, an `Identity`, for the leak guard of queries by vector.
            into: the key under which the answer is put into a copy of the sample, a mapping; without it,
                `(sample, answer)` is yielded.
            batched: a sample is a batch: image, vector, key and identity give lists, and the answer is a
                list.
            batch: samples in a request.
            depth: batches held: in flight, or waiting for the loop.
            workers: requests at a time.
            options: of `retrieve`.
        """
        if (image is None) == (vector is None):
            raise InvalidInput(
                "a TagPrefetcher asks by image or by vector: say how to read one of them from a sample"
            )
        if batch < 1 or depth < 1 or workers < 1:
            raise InvalidInput(f"batch {batch}, depth {depth}, workers {workers}: each is at least 1")
        self.samples, self.source = samples, source
        self._image, self._vector, self._key, self._identity = image, vector, key, identity
        self._fingerprint, self._into, self._batched, self._options = fingerprint, into, batched, options
        self._batch, self._depth, self._workers = 1 if batched else batch, depth, workers

    def __len__(self) -> int:
        # raises TypeError for samples without a length, as it should
        return len(self.samples)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> Any:
        return self._answer([self.samples[index]])[0]  # type: ignore[index]

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """Answer several samples in one retrieval, as a DataLoader's worker asks for a batch."""
        read_many = getattr(self.samples, "__getitems__", None)
        return self._answer(read_many(indices) if read_many else [self.samples[i] for i in indices])  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        answers: queue.Queue[Any] = queue.Queue()
        """A future for each batch, in order; then the end, or the error of reading."""
        room = threading.Semaphore(self._depth)
        stop = threading.Event()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="prefetch")

        def submit(batch: list[Any]) -> None:
            room.acquire()
            if not stop.is_set():
                answers.put(pool.submit(self._answer, batch))

        def read() -> None:
            batch: list[Any] = []
            end: Any = _END
            try:
                for sample in self.samples:
                    batch.append(sample)
                    if len(batch) == self._batch:
                        submit(batch)
                        batch = []
                    if stop.is_set():
                        return
            except BaseException as error:  # noqa: BLE001  raised again where the sample would have come
                end = error
            if batch:
                submit(batch)
            answers.put(end)

        reader = threading.Thread(target=read, name="prefetch-reader", daemon=True)
        reader.start()
        try:
            while True:
                item = answers.get()
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
            room.release()  # a reader that waits for room sees that it has to stop
            pool.shutdown(wait=True, cancel_futures=True)
            reader.join()

    def _answer(self, samples: list[Any]) -> list[Any]:
        answers = self._retrieve(samples)
        if self._into:
            return [{**sample, self._into: answer} for sample, answer in zip(samples, answers, strict=True)]
        return list(zip(samples, answers, strict=True))

    def _retrieve(self, samples: list[Any]) -> Sequence[Retrieval | list[Retrieval]]:
        def values(field: Field | None) -> Any:
            if field is None:
                return []
            if self._batched:  # the only sample is a batch, and its fields are lists
                return _value(samples[0], field)
            return [_value(sample, field) for sample in samples]

        answers = self.source.retrieve(
            list(values(self._image)),
            vectors=None if self._vector is None else np.asarray(values(self._vector)),
            fingerprint=self._fingerprint,
            keys=[str(key) for key in values(self._key)],
            identities=list(values(self._identity)),
            **self._options,
        )
        return [answers] if self._batched else answers


def _value(sample: Any, field: Field) -> Any:
    return field(sample) if callable(field) else sample[field]
