"""Features of the frozen image tower: computed when needed, or once into files that are mapped into memory.

A cache is a directory:

    grid.f16      [images, P, C] float16, little endian; an image that several samples show is there once
    vectors.f32   [images, D] float32
    hashes.bin    [images] of sha256 (32 bytes) and perceptual hash (8 bytes, big endian), for the leak guard
    cache.json    encoder's fingerprint, layer, shapes, and a digest of the images; written last

The tower takes most of a training step on a small machine and never learns: a cache pays its cost once, not
every epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tagstore.encoding.images import decode, identify
from tagstore.errors import Damaged, FingerprintMismatch, InvalidInput
from tagstore.readers.samples import Place, Sample
from tagstore.types import Identity

_CHUNK = 16
"""Images embedded together when a cache is made."""


@dataclass(frozen=True, slots=True)
class Features:
    """Features of some images, in the order of the request."""

    grid: Tensor
    """`[N, P, C]`: float16 from a cache, else of the tower's dtype."""
    vectors: Tensor
    """`[N, D]` float32, unit rows."""
    identities: tuple[Identity, ...]
    """Of each image, for the leak guard."""

    def take(self, rows: Sequence[int]) -> Features:
        """Those of these rows, in this order."""
        index = torch.tensor(list(rows))
        return Features(self.grid[index], self.vectors[index], tuple(self.identities[i] for i in rows))


class ImageFeatures(Protocol):
    """Features of a data set's images."""

    def __call__(self, samples: Sequence[int]) -> Features:
        """Features of all images of these samples, one sample after the other."""
        ...


class LiveFeatures:
    """Reads, decodes and embeds images at every call."""

    def __init__(self, model: Any, image_processor: Any, samples: Sequence[Sample]) -> None:
        self._model, self._prepare, self._samples = model, image_processor, samples

    def __call__(self, samples: Sequence[int]) -> Features:
        chosen = [self._samples[i] for i in samples]
        keys = [key for sample in chosen for key in sample.image_keys]
        features = self.of_places([place for sample in chosen for place in sample.images])
        identities = (replace(i, key=key) for i, key in zip(features.identities, keys, strict=True))
        return replace(features, identities=tuple(identities))

    def of_places(self, places: Sequence[Place]) -> Features:
        """Features of the images at these places; their identities have no keys."""
        data = [place.read() for place in places]
        pictures = [decode(image) for image in data]
        identities = tuple(map(identify, data, pictures))
        with torch.inference_mode():
            grid, vectors = self._model.encode_images(self._prepare(pictures)["pixel_values"])
        if vectors is None:
            raise InvalidInput(
                "this model's own tower has no vectors in a store's space: "
                "call join_encoder('hf:...') and save it first"
            )
        return Features(grid.cpu().clone(), vectors.cpu().clone(), identities)


class CachedFeatures:
    """Reads features from a cache, without opening a picture.

    Raises:
        FingerprintMismatch: it was made by another encoder or from another layer.
        InvalidInput: it was made of other images.
        Damaged: a file has the wrong length.
    """

    def __init__(self, folder: Path, samples: Sequence[Sample], *, encoder: str, layer: int) -> None:
        meta = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
        if (meta["encoder"], meta["layer"]) != (encoder, layer):
            raise FingerprintMismatch(
                f"the features in {folder} are of encoder {meta['encoder']}, layer {meta['layer']}, and the "
                f"model reads {encoder}, layer {layer}: give another directory (data.features), "
                "or delete this one"
            )
        if meta["images"] != _digest(samples):
            raise InvalidInput(
                f"the features in {folder} are of other images than the data set's: "
                "give another directory, or delete this one"
            )
        self._samples = samples
        self._rows = {place: row for row, place in enumerate(_places(samples))}
        count, (points, channels), dimension = len(self._rows), meta["grid"], meta["dimension"]
        for name, row in (
            ("grid.f16", points * channels * 2), ("vectors.f32", dimension * 4), ("hashes.bin", 40)
        ):  # fmt: skip
            size = (folder / name).stat().st_size
            if size != count * row:
                raise Damaged(
                    f"{folder / name} has {size} bytes instead of {count * row}: delete the directory"
                )
        self._grid = np.memmap(folder / "grid.f16", "<f2", "r", shape=(count, points, channels))
        self._vectors = np.memmap(folder / "vectors.f32", "<f4", "r", shape=(count, dimension))
        self._hashes = (folder / "hashes.bin").read_bytes()

    def __call__(self, samples: Sequence[int]) -> Features:
        rows = [self._rows[place] for i in samples for place in self._samples[i].images]
        keys = [key for i in samples for key in self._samples[i].image_keys]
        identities = tuple(self._identity(key, row) for key, row in zip(keys, rows, strict=True))
        grid, vectors = self._grid[rows].copy(), self._vectors[rows].copy()
        return Features(torch.from_numpy(grid), torch.from_numpy(vectors), identities)

    def _identity(self, key: str, row: int) -> Identity:
        hashes = self._hashes[row * 40 : row * 40 + 40]
        return Identity(key, hashes[:32], int.from_bytes(hashes[32:], "big"))


def make_cache(
    folder: Path,
    live: LiveFeatures,
    samples: Sequence[Sample],
    *,
    encoder: str,
    layer: int,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> None:
    """Embed all images once. The directory gets its name when it is complete.

    Args:
        live: of the same samples.
        encoder: digest of the fingerprint.
        progress: called with the number of images embedded so far, and of all.
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
        places = _places(samples)
        for start in range(0, len(places), _CHUNK):
            features = live.of_places(places[start : start + _CHUNK])
            shape, dimension = (features.grid.shape[1], features.grid.shape[2]), features.vectors.shape[1]
            grid.write(_bytes(features.grid.to(torch.float16).numpy()))
            vectors.write(_bytes(features.vectors.numpy()))
            for identity in features.identities:
                hashes.write(identity.sha256 + int(identity.perceptual_hash or 0).to_bytes(8, "big"))
            progress(min(start + _CHUNK, len(places)), len(places))
    if shape is None:
        raise InvalidInput("there is no image to embed")
    images = _digest(samples)
    meta = {"encoder": encoder, "layer": layer, "grid": shape, "dimension": dimension, "images": images}
    (part / "cache.json").write_text(json.dumps(meta), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _bytes(array: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _places(samples: Sequence[Sample]) -> list[Place]:
    """Where the images of a data set are, each once, in the order of their first samples."""
    return list(dict.fromkeys(place for sample in samples for place in sample.images))


def _digest(samples: Sequence[Sample]) -> str:
    """Digest of the places: cheap, and different when images are added, removed or moved within their
    files."""
    places = ((place.path.name, place.offset, place.length) for place in _places(samples))
    return hashlib.sha256(json.dumps(list(places)).encode()).hexdigest()
