"""`connect(url)` gives a tag source: the same answers from a server, a directory or a recorded map.

    grpc://HOST:PORT/NAME               a server; several addresses as HOST:PORT,HOST:PORT
    grpcs://HOST:PORT/NAME              the same over TLS
    file://DIR/NAME                     a store on this machine, in process (`tagstore[server]`); file:///abs/dir/NAME for an absolute path
    replay://FILE                       answers that `tagstore record` kept for a data set
    null://                             no tags
    random://FILE, random+URL           random tags, of a file with one a line or of a store's vocabulary: the control experiment
    ...NAME@7                           version 7 instead of the current one
    ...?k=10&exclude=self               options, see `Options` and `tagstore.types.Search`

The base install is enough for all but file://: nothing heavier than grpcio and numpy is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from tagstore.client import forks as _forks  # noqa: F401  before anything imports grpc
from tagstore.client.connecting import connect
from tagstore.client.options import ConnectOptions, OnFailure, Options, SearchOptions
from tagstore.client.prefetch import TagPrefetcher
from tagstore.client.queries import Image
from tagstore.client.source import Pin, require
from tagstore.client.stats import Stats
from tagstore.client.urls import parse
from tagstore.types import Fingerprint, Identity, Retrieval, StoreInfo, TagInfo

__all__ = [
    "ConnectOptions",
    "Image",
    "OnFailure",
    "Options",
    "Pin",
    "SearchOptions",
    "Stats",
    "TagPrefetcher",
    "TagSource",
    "connect",
    "parse",
    "require",
]


class TagSource(Protocol):
    """Where a model gets tags from."""

    def retrieve(
        self,
        images: Sequence[Image] = (),
        *,
        vectors: NDArray[np.floating] | None = None,
        captions: Sequence[str] = (),
        fingerprint: Fingerprint | str = "",
        keys: Sequence[str] = (),
        identities: Sequence[Identity] = (),
        **options: Unpack[SearchOptions],
    ) -> list[Retrieval]:
        """Retrieved tags of each image, then of each vector, then of each caption, all from one version of the store.

        Args:
            images: encoded images or paths; the store's side embeds them.
            vectors: `[N, D]` float32 or float16 of the store's encoder.
            captions: what the pictures should show, in words; the store's side embeds them with the text tower of its encoder.
            fingerprint: of the encoder that made `vectors`; required with them.
            keys: of each query, for the leak guard and for replay://.
            identities: more of the same: key, sha256, perceptual hash of each query.
            options: `k`, `max_tags`, `exclude` ...; the source's own where not given.

        Raises:
            InvalidInput: a query that means nothing; the message says which and why.
            NotFound: no such store, version or image file, or a sample that a map does not hold.
            FingerprintMismatch: vectors of another encoder.
            Unavailable: no server there, or no answer in time; with `on_failure="empty"` answers without tags instead.
        """
        ...

    def tags(self, tag_ids: Sequence[int], *, embeddings: bool = False) -> list[TagInfo]:
        """Tags by id, with their text embeddings (read-only) if asked for, which are kept in memory. Raises `NotFound`."""
        ...

    def embeddings(self, answer: Retrieval) -> NDArray[np.float32]:
        """Text embeddings `[n, D]` of the tags of an answer, in their order; each crosses the wire once.

        With `preload=True` they come with the answer. Raises `InvalidInput` for a store without text embeddings.
        """
        ...

    def vocabulary(self, *, embeddings: bool = False) -> Iterator[TagInfo]:
        """All tags of the version in order of their ids, fetched page by page."""
        ...

    def info(self) -> StoreInfo:
        """The version that answers now."""
        ...

    def pin(self, version: int = 0) -> Pin:
        """Stay with a version, the current one if none is given, here and in workers that get this source later.

        Returns what a checkpoint has to remember. Raises `NotFound` for a version that there is not.
        """
        ...

    def stats(self) -> Stats:
        """What was done so far, summed up over this process and all workers that share the source."""
        ...

    def close(self) -> None:
        """Let go of connections. A closed source opens again when used."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
