"""From what a caller passes to requests: images read, identities matched to queries, the leak guard resolved, batches cut."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tagstore.client.options import Options
from tagstore.errors import BadVector, InvalidInput, NotFound
from tagstore.types import Exclude, Fingerprint, Identity, Search

Image = bytes | str | os.PathLike[str]
"""An encoded image, or the path of a file that holds one."""

BATCH_IMAGES = BATCH_CAPTIONS = 32
BATCH_ROWS = 256
_BATCH_BYTES = 16 << 20
_BATCH_NEIGHBOURS = 1 << 14


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: queries of one kind, few enough for the wire."""

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
    captions: tuple[str, ...] = ()
    """Queries by text."""
    version: int = 0

    def __len__(self) -> int:
        return len(self.images or self.captions) if self.vectors is None else len(self.vectors)

    @property
    def kind(self) -> Literal["image", "vector", "caption"]:
        if self.vectors is not None:
            return "vector"
        return "caption" if self.captions else "image"

    def query(self, row: int) -> bytes:
        """One of the queries; equal bytes of another kind are another query."""
        if self.vectors is not None:
            data: bytes = self.vectors[row].tobytes()
            return data
        return self.captions[row].encode() if self.captions else self.images[row]

    def only(self, rows: Sequence[int]) -> Ask:
        """The same of some of its queries."""
        return replace(
            self,
            images=tuple(self.images[i] for i in rows) if self.images else (),
            vectors=None if self.vectors is None else self.vectors[list(rows)],
            captions=tuple(self.captions[i] for i in rows) if self.captions else (),
            identities=tuple(self.identities[i] for i in rows) if self.identities else (),
        )


def asks(
    images: Iterable[Image],
    vectors: NDArray[np.floating] | None,
    captions: Sequence[str],
    fingerprint: Fingerprint | str,
    keys: Sequence[str],
    identities: Sequence[Identity],
    options: Options,
) -> Iterator[Ask]:
    """Requests small enough for the wire: first of the images, then of the vectors, then of the captions. Images are read as they are
    asked for.

    Raises `InvalidInput`, `BadVector`, or `NotFound` for a path that cannot be read.
    """
    if isinstance(images, bytes | str | os.PathLike):
        raise InvalidInput("images is a list: pass [image] for one")
    images = list(images)
    rows = None if vectors is None else _matrix(vectors)
    captions = _captions(captions)
    before = len(images) + (0 if rows is None else len(rows))
    known = _identities(before + len(captions), keys, identities)
    digest = fingerprint if isinstance(fingerprint, str) else fingerprint.digest
    limit = max(1, _BATCH_NEIGHBOURS // max(1, options.search.k))

    def ask(
        first: int,
        some: tuple[bytes, ...] = (),
        matrix: NDArray[np.floating] | None = None,
        said: tuple[str, ...] = (),
    ) -> Ask:
        count = len(some or said) if matrix is None else len(matrix)
        own = known[first : first + count]
        return Ask(
            some,
            matrix,
            digest,
            replace(options.search, exclude=_guard(options, own, bool(some))),
            own,
            options,
            said,
        )

    batch: list[bytes] = []
    first = size = 0
    for image in images:
        data = _read(image)
        if batch and (size + len(data) > _BATCH_BYTES or len(batch) == min(BATCH_IMAGES, limit)):
            yield ask(first, tuple(batch))
            first += len(batch)
            batch, size = [], 0
        batch.append(data)
        size += len(data)
    if batch:
        yield ask(first, tuple(batch))
    if rows is not None:
        step = min(BATCH_ROWS, limit)
        for start in range(0, len(rows), step):
            yield ask(len(images) + start, matrix=rows[start : start + step])
    step = min(BATCH_CAPTIONS, limit)
    for start in range(0, len(captions), step):
        yield ask(before + start, said=captions[start : start + step])


def _matrix(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    vectors = np.asarray(vectors)
    if vectors.ndim != 2:
        raise BadVector(f"vectors have shape {list(vectors.shape)}: pass [N, D]")
    return vectors if vectors.dtype in (np.float16, np.float32) else vectors.astype(np.float32)


def _captions(captions: Sequence[str]) -> tuple[str, ...]:
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


def _identities(queries: int, keys: Sequence[str], identities: Sequence[Identity]) -> tuple[Identity, ...]:
    if isinstance(keys, str):
        raise InvalidInput(f"keys is a list: pass [{keys!r}] for one")
    for name, given in (("keys", keys), ("identities", identities)):
        if len(given) not in (0, queries):
            raise InvalidInput(
                f"{len(given)} {name} for {queries} queries: pass one for each, images first, or none"
            )
    if not keys:
        return tuple(identities)
    if not identities:
        return tuple(Identity(key=key) for key in keys)
    return tuple(
        identity if identity.key else replace(identity, key=key)
        for key, identity in zip(keys, identities, strict=True)
    )


def _guard(options: Options, own: Sequence[Identity], by_image: bool) -> Exclude:
    """What the server is to keep out. Of a query by image it computes the hashes; another is known by what its identity says."""
    exclude = options.exclude
    if exclude is None:
        exclude = Exclude()
    elif exclude == "self":
        exclude = Exclude(
            key=any(i.key for i in own),
            sha256=by_image or any(i.sha256 for i in own),
            hash_distance=options.exclude_distance
            if by_image or any(i.perceptual_hash is not None for i in own)
            else -1,
        )
        if not (exclude.key or exclude.sha256 or exclude.hash_distance >= 0):
            raise InvalidInput(
                'exclude="self" cannot know which image a vector or caption is of: pass keys= or identities='
            )
    return replace(exclude, keys=(*exclude.keys, *options.exclude_keys)) if options.exclude_keys else exclude


def _read(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise NotFound(f"cannot read image {os.fspath(image)}: {error.strerror}") from error
