"""Prefetching keeps the order, is bounded, raises errors in their place and leaves no thread behind."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from pictures import COLOURS, picture
from tagstore import errors
from tagstore.client import TagPrefetcher, connect
from tagstore.types import Identity, Retrieval, RetrievedTag


class Recording:
    """A source that answers with what it was asked, and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        """Images in each call."""
        self.in_flight = 0
        self.most_in_flight = 0
        self.lock = threading.Lock()

    def retrieve(
        self, images=(), *, vectors=None, fingerprint="", keys=(), identities=(), **options
    ) -> list[Retrieval]:
        with self.lock:
            self.calls.append(len(images))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        with self.lock:
            self.in_flight -= 1
        if b"bad" in images:
            raise errors.InvalidInput("bad image")
        names = [data.decode() for data in images] if vectors is None else [str(v[0]) for v in vectors]
        tags = [RetrievedTag(0, f"{name} {options}", "object", 0, 0, 0, ()) for name in names]
        return [Retrieval("s", 1, "", (), (tag,)) for tag in tags]


def numbered(count: int) -> Iterator[dict[str, object]]:
    for i in range(count):
        yield {"n": i, "image": str(i).encode()}


def test_order_is_kept_whichever_request_is_faster():
    source = Recording()
    fields = {"image": "image", "key": "n", "into": "tags"}
    fetched = list(TagPrefetcher(numbered(103), source, **fields, batch=5, workers=4, k=7))
    assert [s["n"] for s in fetched] == list(range(103))
    assert [s["tags"][0].tag for s in fetched] == [f"{i} {{'k': 7}}" for i in range(103)]
    assert source.calls.count(5) == 20
    assert 3 in source.calls


def test_no_more_is_read_than_depth_allows():
    source, read = Recording(), []

    def samples() -> Iterator[dict[str, object]]:
        for sample in numbered(1000):
            read.append(sample)
            yield sample

    stream = iter(TagPrefetcher(samples(), source, image="image", batch=4, depth=3, workers=2))
    taken = [next(stream) for _ in range(4)]
    assert len(taken) == 4
    # three batches held, one being filled, one taken
    assert len(read) <= 5 * 4
    assert source.most_in_flight <= 2
    stream.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_an_error_is_raised_in_the_place_of_its_sample():
    def samples() -> Iterator[dict[str, object]]:
        yield from numbered(10)
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):  # noqa: PT012  how far it came is the point
        for sample, _ in TagPrefetcher(samples(), Recording(), image="image", batch=4):
            seen.append(sample["n"])
    assert seen == list(range(10))
    seen = []
    stream = TagPrefetcher(
        ({"n": i, "image": b"bad" if i == 9 else b"good"} for i in range(20)),
        Recording(),
        image="image",
        batch=4,
    )
    with pytest.raises(errors.InvalidInput, match="bad image"):  # noqa: PT012
        for sample, _ in stream:
            seen.append(sample["n"])
    assert seen == list(range(8))
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_a_loop_that_is_left_early_leaves_nothing_behind():
    source = Recording()
    for sample, _ in TagPrefetcher(numbered(10_000), source, image="image", batch=2, depth=2):
        if sample["n"] == 3:
            break
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_batches_of_a_loader_are_taken_as_they_are():
    batches = (
        {"vectors": np.full((3, 2), i, np.float32), "keys": [f"{i}-{j}" for j in range(3)]} for i in range(5)
    )
    fetched = list(
        TagPrefetcher(batches, Recording(), vector="vectors", key="keys", fingerprint="f", batched=True)
    )
    assert [[a[0].tag for a in answers] for _, answers in fetched] == [
        [f"{float(i)} {{}}"] * 3 for i in range(5)
    ]


def test_a_map_style_dataset_is_answered_a_batch_at_a_time():
    source = Recording()
    dataset = TagPrefetcher(list(numbered(10)), source, image="image", into="tags")
    assert len(dataset) == 10
    assert [s["n"] for s in dataset.__getitems__([3, 1, 2])] == [3, 1, 2]
    assert dataset[4]["n"] == 4
    assert source.calls == [3, 1]
    with pytest.raises(TypeError):
        len(TagPrefetcher(numbered(3), source, image="image"))


def test_arguments_that_make_no_sense_are_refused():
    for options in ({}, {"image": "i", "vector": "v"}, {"image": "i", "depth": 0}):
        with pytest.raises(errors.InvalidInput):
            TagPrefetcher([], Recording(), **options)


def test_a_real_source_and_loader_guard_each_sample(server_address: str, mini):
    from torch.utils.data import DataLoader, IterableDataset

    with connect(f"grpc://{server_address}/shapes", k=3, exclude="self") as source:
        pictures = [{"key": f"{colour}-circle", "image": picture(colour, "circle")} for colour in COLOURS]
        fetched = list(TagPrefetcher(pictures, source, image="image", key="key", batch=2))
        assert all(a.excluded for _, a in fetched)
        assert all(n.key != s["key"] for s, a in fetched for n in a.neighbours)
        assert source.stats().excluded == sum(a.excluded for _, a in fetched)
        # by vector, as a model with the store's encoder asks; the guard knows the image by its identity
        from tagstore.encoding.images import decode

        vectors = mini.encode_images([decode(s["image"]) for s in pictures])
        samples = [
            {"vector": v, "identity": Identity(key=s["key"])} for v, s in zip(vectors, pictures, strict=True)
        ]
        asked = TagPrefetcher(
            samples, source, vector="vector", identity="identity", fingerprint=mini.fingerprint
        )
        assert all(n.key != s["identity"].key for s, a in asked for n in a.neighbours)
        assert pickle.loads(pickle.dumps(asked))[0][1] == asked[0][1]

        class Stream(IterableDataset):
            def __iter__(self):
                return iter(TagPrefetcher(pictures, source, image="image", key="key"))

        loaded = [item for batch in DataLoader(Stream(), batch_size=4, collate_fn=list) for item in batch]
        assert [a for _, a in loaded] == [a for _, a in fetched]
