"""Turn what a caller passes into requests: read images, match identities, resolve the guard, cut batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tagstore.client.options import Options
from tagstore.errors import BadVector, InvalidInput, MissingExtra, NotFound
from tagstore.readers.image_files import png_of
from tagstore.types import Exclude, Fingerprint, Identity, Search

Image = Any
"""An encoded image, the path of a file that holds one, a PIL image, or an array `[H, W, 3]` of uint8."""

BATCH_IMAGES = 32
"""Images in a request."""
_BATCH_CAPTIONS = 32
"""Captions in a request."""
_BATCH_VECTORS = 256
"""Vectors in a request."""
_BATCH_BYTES = 16 << 20
"""Bytes of images in a request, but for a single larger image."""
_BATCH_NEIGHBOURS = 1 << 14
"""Neighbours that a request may ask for, over all its queries."""


@dataclass(frozen=True, slots=True)
class QueryBatch:
    """One request: queries of one kind, few enough for one message."""

    images: tuple[bytes, ...]
    vectors: NDArray[np.floating] | None
    """`[N, D]` float16 or float32."""
    captions: tuple[str, ...]
    fingerprint: str
    """Digest of the encoder that computed `vectors`, or empty."""
    search: Search
    """The search that `options` ask for, its leak guard resolved for these queries."""
    identities: tuple[Identity, ...]
    """None, or one for each query."""
    options: Options
    """What the caller asked for."""
    version: int = 0

    def __len__(self) -> int:
        return len(self.images or self.captions) if self.vectors is None else len(self.vectors)

    @property
    def kind(self) -> Literal["image", "vector", "caption"]:
        if self.vectors is not None:
            return "vector"
        return "caption" if self.captions else "image"

    def query_bytes(self, row: int) -> bytes:
        """Return the bytes of one query. Queries of different kinds may have equal bytes."""
        if self.vectors is not None:
            data: bytes = self.vectors[row].tobytes()
            return data
        return self.captions[row].encode() if self.captions else self.images[row]

    def select(self, rows: Sequence[int]) -> QueryBatch:
        """Return a batch of only these queries."""
        return replace(
            self,
            images=tuple(self.images[i] for i in rows) if self.images else (),
            vectors=None if self.vectors is None else self.vectors[list(rows)],
            captions=tuple(self.captions[i] for i in rows) if self.captions else (),
            identities=tuple(self.identities[i] for i in rows) if self.identities else (),
        )


def query_batches(
    images: Iterable[Image],
    vectors: NDArray[np.floating] | None,
    captions: Sequence[str],
    fingerprint: Fingerprint | str,
    keys: Sequence[str],
    identities: Sequence[Identity],
    options: Options,
) -> Iterator[QueryBatch]:
    """Cut queries into requests: images, then vectors, then captions. Images are read batch by batch.

    Raises `InvalidInput`, `BadVector`, or `NotFound` for a path that cannot be read.
    """
    if isinstance(images, bytes | str | os.PathLike):
        raise InvalidInput("images is a list: pass [image] for one")
    images = list(images)
    matrix = None if vectors is None else _checked_vectors(vectors)
    captions = _checked_captions(captions)
    first_vector = len(images)
    first_caption = first_vector + (0 if matrix is None else len(matrix))
    known = _merged_identities(first_caption + len(captions), keys, identities)
    digest = fingerprint if isinstance(fingerprint, str) else fingerprint.digest
    limit = max(1, _BATCH_NEIGHBOURS // max(1, options.search.k))

    def batch(
        first: int,
        count: int,
        images: tuple[bytes, ...] = (),
        vectors: NDArray[np.floating] | None = None,
        captions: tuple[str, ...] = (),
    ) -> QueryBatch:
        own = known[first : first + count]
        search = options.search
        if options.exclude is not None or options.exclude_keys:
            search = replace(search, exclude=_resolved_guard(options, own, by_image=bool(images)))
        return QueryBatch(images, vectors, captions, digest, search, own, options)

    first = 0
    for group in _image_groups(images, min(BATCH_IMAGES, limit)):
        yield batch(first, len(group), images=group)
        first += len(group)
    if matrix is not None:
        step = min(_BATCH_VECTORS, limit)
        for start in range(0, len(matrix), step):
            rows = matrix[start : start + step]
            yield batch(first_vector + start, len(rows), vectors=rows)
    step = min(_BATCH_CAPTIONS, limit)
    for start in range(0, len(captions), step):
        texts = captions[start : start + step]
        yield batch(first_caption + start, len(texts), captions=texts)


def _image_groups(images: Sequence[Image], limit: int) -> Iterator[tuple[bytes, ...]]:
    group: list[bytes] = []
    size = 0
    for position, image in enumerate(images):
        data = image if isinstance(image, bytes) else _bytes_of(image, position)
        if group and (size + len(data) > _BATCH_BYTES or len(group) == limit):
            yield tuple(group)
            group, size = [], 0
        group.append(data)
        size += len(data)
    if group:
        yield tuple(group)


def _checked_vectors(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    vectors = np.asarray(vectors)
    if vectors.ndim != 2:
        raise BadVector(f"vectors have shape {list(vectors.shape)}: pass [N, D]")
    return vectors if vectors.dtype in (np.float16, np.float32) else vectors.astype(np.float32)


def _checked_captions(captions: Sequence[str]) -> tuple[str, ...]:
    if isinstance(captions, str):
        raise InvalidInput(f"captions is a list: pass [{captions!r}] for one")
    for position, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise InvalidInput(f"caption {position} is of type {type(caption).__name__}, not a string")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"caption {position} is no Unicode text: {error}") from error
    return tuple(captions)


def _merged_identities(
    count: int, keys: Sequence[str], identities: Sequence[Identity]
) -> tuple[Identity, ...]:
    if isinstance(keys, str):
        raise InvalidInput(f"keys is a list: pass [{keys!r}] for one")
    for name, values in (("keys", keys), ("identities", identities)):
        if len(values) not in (0, count):
            raise InvalidInput(
                f"{len(values)} {name} for {count} queries: pass one for each, images first, or none"
            )
    if not keys:
        return tuple(identities)
    if not identities:
        return tuple(Identity(key=key) for key in keys)
    return tuple(
        identity if identity.key else replace(identity, key=key)
        for key, identity in zip(keys, identities, strict=True)
    )


def _resolved_guard(options: Options, identities: Sequence[Identity], *, by_image: bool) -> Exclude:
    """Name what the store has to keep out. It hashes images itself; other queries bring their identity."""
    exclude = options.exclude
    if exclude is None:
        exclude = Exclude()
    elif exclude == "self":
        hashed = by_image or any(i.perceptual_hash is not None for i in identities)
        exclude = Exclude(
            key=any(i.key for i in identities),
            sha256=by_image or any(i.sha256 for i in identities),
            hash_distance=options.exclude_distance if hashed else -1,
        )
        if not (exclude.key or exclude.sha256 or exclude.hash_distance >= 0):
            raise InvalidInput(
                'exclude="self" cannot know which image a vector or caption is of: pass keys= or identities='
            )
    return replace(exclude, keys=(*exclude.keys, *options.exclude_keys)) if options.exclude_keys else exclude


def _bytes_of(image: Image, position: int) -> bytes:
    """The encoded image; pixels become PNG."""
    if isinstance(image, str | os.PathLike):
        return _read(image)
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if hasattr(image, "getbands"):
        return png_of(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise InvalidInput(
                f"image {position} is an array of shape {list(image.shape)} and type {image.dtype}: pass "
                "[H, W, 3] of uint8"
            )
        try:
            from PIL.Image import fromarray
        except ImportError as error:
            raise MissingExtra("an array as an image needs Pillow: pip install pillow") from error
        return png_of(fromarray(image))
    raise InvalidInput(
        f"image {position} is of type {type(image).__name__}: pass a path, encoded bytes, a PIL image, or an "
        "array [H, W, 3] of uint8"
    )


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise NotFound(f"cannot read image {os.fspath(path)}: {error.strerror}") from error
