"""From what a caller passes to requests: images read, identities matched to queries, the leak guard resolved, batches cut."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tagstore.client.options import Options
from tagstore.errors import BadVector, InvalidInput, NotFound
from tagstore.types import Exclude, Fingerprint, Identity, Search

Image = bytes | str | os.PathLike[str]
"""An encoded image, or the path of a file that holds one."""

BATCH_IMAGES = 32
BATCH_ROWS = 256
_BATCH_BYTES = 16 << 20
_BATCH_NEIGHBOURS = 1 << 14


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: images or vectors, never both, few enough for the wire."""

    images: tuple[bytes, ...]
    vectors: NDArray[np.floating] | None
    """`[N, D]` float16 or float32."""
    fingerprint: str
    """Digest of the encoder that made `vectors`, or empty."""
    search: Search
    identities: tuple[Identity, ...]
    """None, or one for each query."""
    options: Options
    """What the caller asked for; `search` is that with the leak guard made out for these queries."""
    version: int = 0

    def __len__(self) -> int:
        return len(self.images) if self.vectors is None else len(self.vectors)

    def only(self, rows: Sequence[int]) -> Ask:
        """The same of some of its queries."""
        return replace(
            self,
            images=tuple(self.images[i] for i in rows) if self.images else (),
            vectors=None if self.vectors is None else self.vectors[list(rows)],
            identities=tuple(self.identities[i] for i in rows) if self.identities else (),
        )


def asks(
    images: Iterable[Image],
    vectors: NDArray[np.floating] | None,
    fingerprint: Fingerprint | str,
    keys: Sequence[str],
    identities: Sequence[Identity],
    options: Options,
) -> Iterator[Ask]:
    """Requests small enough for the wire: first of the images, then of the vectors. Images are read as they are asked for.

    Raises `InvalidInput`, `BadVector`, or `NotFound` for a path that cannot be read.
    """
    if isinstance(images, bytes | str | os.PathLike):
        raise InvalidInput("images is a list: pass [image] for one")
    images = list(images)
    rows = None if vectors is None else _matrix(vectors)
    known = _identities(len(images) + (0 if rows is None else len(rows)), keys, identities)
    digest = fingerprint if isinstance(fingerprint, str) else fingerprint.digest
    limit = max(1, _BATCH_NEIGHBOURS // max(1, options.search.k))

    def ask(some: tuple[bytes, ...], matrix: NDArray[np.floating] | None, first: int) -> Ask:
        count = len(some) if matrix is None else len(matrix)
        own = known[first : first + count]
        return Ask(some, matrix, digest, replace(options.search, exclude=_guard(options, own, matrix is None)), own, options)

    batch: list[bytes] = []
    first = size = 0
    for image in images:
        data = _read(image)
        if batch and (size + len(data) > _BATCH_BYTES or len(batch) == min(BATCH_IMAGES, limit)):
            yield ask(tuple(batch), None, first)
            first += len(batch)
            batch, size = [], 0
        batch.append(data)
        size += len(data)
    if batch:
        yield ask(tuple(batch), None, first)
    if rows is not None:
        step = min(BATCH_ROWS, limit)
        for start in range(0, len(rows), step):
            yield ask((), rows[start : start + step], len(images) + start)


def _matrix(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    vectors = np.asarray(vectors)
    if vectors.ndim != 2:
        raise BadVector(f"vectors have shape {list(vectors.shape)}: pass [N, D]")
    return vectors if vectors.dtype in (np.float16, np.float32) else vectors.astype(np.float32)


def _identities(queries: int, keys: Sequence[str], identities: Sequence[Identity]) -> tuple[Identity, ...]:
    if isinstance(keys, str):
        raise InvalidInput(f"keys is a list: pass [{keys!r}] for one")
    for name, given in (("keys", keys), ("identities", identities)):
        if len(given) not in (0, queries):
            raise InvalidInput(f"{len(given)} {name} for {queries} queries: pass one for each, images first, or none")
    if not keys:
        return tuple(identities)
    if not identities:
        return tuple(Identity(key=key) for key in keys)
    return tuple(identity if identity.key else replace(identity, key=key) for key, identity in zip(keys, identities, strict=True))


def _guard(options: Options, own: Sequence[Identity], by_image: bool) -> Exclude:
    """What the server is to keep out. Of a query by image it computes the hashes; one by vector is known by what its identity says."""
    exclude = options.exclude
    if exclude is None:
        exclude = Exclude()
    elif exclude == "self":
        exclude = Exclude(
            key=any(i.key for i in own),
            sha256=by_image or any(i.sha256 for i in own),
            perceptual_hash=options.exclude_distance if by_image or any(i.perceptual_hash is not None for i in own) else -1,
        )
        if not (exclude.key or exclude.sha256 or exclude.perceptual_hash >= 0):
            raise InvalidInput('exclude="self" cannot know which image a vector is of: pass keys= or identities=')
    return replace(exclude, keys=(*exclude.keys, *options.exclude_keys)) if options.exclude_keys else exclude


def _read(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise NotFound(f"cannot read image {os.fspath(image)}: {error.strerror}") from error
