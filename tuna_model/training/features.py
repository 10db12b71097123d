"""What the frozen image tower says of each image: computed when asked, or once for all into a file that is mapped into memory.

A cache is a directory:

    grid.f16      [images, P, C] float16, little endian
    vectors.f32   [images, D] float32
    hashes.bin    [images] of sha256 (32 bytes) and perceptual hash (8 bytes, big endian), for the leak guard
    cache.json    encoder's fingerprint, layer, shapes, and a digest of what was embedded; written last

The tower takes most of a training step on a small machine, and it never learns: with a cache its cost is paid once, not every epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tagstore.encoding.images import decode, perceptual_hash
from tagstore.errors import Damaged, FingerprintMismatch, InvalidInput
from tagstore.readers.samples import Sample
from tagstore.types import Identity

_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Features:
    """Of some images, in the order that was asked for."""

    grid: Tensor
    """`[N, P, C]`, float16 from a cache and else as the tower gives it."""
    vectors: Tensor
    """`[N, D]` float32, unit rows."""
    identities: tuple[Identity, ...]
    """Which image each is, for the leak guard."""


class ImageFeatures(Protocol):
    """Features of a data set's images."""

    def __call__(self, samples: Sequence[int]) -> Features:
        """Of all images of these samples, one sample after the other."""
        ...


class LiveFeatures:
    """Read, decode and embed at every call."""

    def __init__(self, model: Any, image_processor: Any, samples: Sequence[Sample]) -> None:
        self._model, self._prepare, self._samples = model, image_processor, samples

    def __call__(self, samples: Sequence[int]) -> Features:
        data = [
            (key, place.read())
            for sample in map(self._samples.__getitem__, samples)
            for key, place in zip(sample.image_keys, sample.images, strict=True)
        ]
        pictures = [decode(image) for _, image in data]
        identities = tuple(
            Identity(key, hashlib.sha256(image).digest(), perceptual_hash(picture))
            for (key, image), picture in zip(data, pictures, strict=True)
        )
        with torch.inference_mode():
            grid, vectors = self._model.encode_images(self._prepare(pictures)["pixel_values"])
        if vectors is None:
            raise InvalidInput(
                "this model's own tower has no vectors in a store's space: call join_encoder('hf:...') and save it first"
            )
        return Features(grid.cpu().clone(), vectors.cpu().clone(), identities)


class CachedFeatures:
    """From a cache, without touching a picture.

    Raises:
        FingerprintMismatch: it was made by another encoder or from another layer.
        InvalidInput: it was made of other images.
        Damaged: its files are not as long as it says.
    """

    def __init__(self, folder: Path, samples: Sequence[Sample], *, encoder: str, layer: int) -> None:
        meta = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
        if (meta["encoder"], meta["layer"]) != (encoder, layer):
            raise FingerprintMismatch(
                f"the features in {folder} are of encoder {meta['encoder']}, layer {meta['layer']}, and the model reads {encoder}, "
                f"layer {layer}: give another directory (data.features), or delete this one"
            )
        if meta["images"] != _digest(samples):
            raise InvalidInput(
                f"the features in {folder} are of other images than the data set's: give another directory, or delete this one"
            )
        self._samples = samples
        self._first = np.cumsum([0, *(len(sample.images) for sample in samples)])
        count, (points, channels), dimension = int(self._first[-1]), meta["grid"], meta["dimension"]
        for name, size in (
            ("grid.f16", count * points * channels * 2),
            ("vectors.f32", count * dimension * 4),
            ("hashes.bin", count * 40),
        ):
            if (folder / name).stat().st_size != size:
                raise Damaged(
                    f"{folder / name} has {(folder / name).stat().st_size} bytes instead of {size}: delete the directory"
                )
        self._grid = np.memmap(folder / "grid.f16", "<f2", "r", shape=(count, points, channels))
        self._vectors = np.memmap(folder / "vectors.f32", "<f4", "r", shape=(count, dimension))
        self._hashes = (folder / "hashes.bin").read_bytes()

    def __call__(self, samples: Sequence[int]) -> Features:
        rows = [row for i in samples for row in range(self._first[i], self._first[i + 1])]
        keys = [key for i in samples for key in self._samples[i].image_keys]
        identities = tuple(self._identity(key, row) for key, row in zip(keys, rows, strict=True))
        return Features(
            torch.from_numpy(self._grid[rows].copy()),
            torch.from_numpy(self._vectors[rows].copy()),
            identities,
        )

    def _identity(self, key: str, row: int) -> Identity:
        start = row * 40
        return Identity(
            key,
            self._hashes[start : start + 32],
            int.from_bytes(self._hashes[start + 32 : start + 40], "big"),
        )


def make_cache(
    folder: Path,
    live: LiveFeatures,
    samples: Sequence[Sample],
    *,
    encoder: str,
    layer: int,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Embed all images once. What is written appears under its name when it is complete.

    Args:
        encoder: digest of the fingerprint.
        progress: called with how many samples were just done.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shape: tuple[int, int] | None = None
    dimension = 0
    with (
        (part / "grid.f16").open("wb") as grid,
        (part / "vectors.f32").open("wb") as vectors,
        (part / "hashes.bin").open("wb") as hashes,
    ):
        for some in _slices(len(samples)):
            features = live(some)
            shape, dimension = (features.grid.shape[1], features.grid.shape[2]), features.vectors.shape[1]
            grid.write(_bytes(features.grid.to(torch.float16).numpy()))
            vectors.write(_bytes(features.vectors.numpy()))
            for identity in features.identities:
                hashes.write(identity.sha256 + int(identity.perceptual_hash or 0).to_bytes(8, "big"))
            progress(len(some))
    if shape is None:
        raise InvalidInput("there is no image to embed")
    meta = {
        "encoder": encoder,
        "layer": layer,
        "grid": shape,
        "dimension": dimension,
        "images": _digest(samples),
    }
    (part / "cache.json").write_text(json.dumps(meta), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _bytes(array: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _slices(count: int) -> Iterator[list[int]]:
    for start in range(0, count, _AT_ONCE):
        yield list(range(start, min(count, start + _AT_ONCE)))


def _digest(samples: Sequence[Sample]) -> str:
    """Of keys and places: cheap to check, and another when images are added, removed or move within their files."""
    digest = hashlib.sha256()
    for sample in samples:
        places = ((place.path.name, place.offset, place.length) for place in sample.images)
        digest.update(json.dumps([sample.key, *places]).encode())
    return digest.hexdigest()
