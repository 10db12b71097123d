"""What a model sees of a store: a tag source, and the pin that a checkpoint remembers and checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from tagstore.client.options import SearchOptions
from tagstore.client.queries import Image
from tagstore.client.stats import Stats
from tagstore.errors import InvalidInput
from tagstore.types import Fingerprint, Identity, Retrieval, StoreInfo, TagInfo


@dataclass(frozen=True, slots=True)
class Pin:
    """Which version of which store answers: what a checkpoint has to remember."""

    store: str
    version: int
    fingerprint: Fingerprint

    def __str__(self) -> str:
        return f"{self.store}@{self.version}"


class TagSource(Protocol):
    """Where a model gets tags from. Safe for threads; each process opens its own connections."""

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
        """Retrieve tags of each image, then each vector, then each caption, from one version of the store.

        Args:
            images: encoded images or paths; embedded where they are answered.
            vectors: `[N, D]` float32 or float16 of the store's encoder.
            captions: what the pictures should show; embedded by the text tower of the store's encoder.
            fingerprint: of the encoder that computed `vectors`; required with them.
            keys: one for each query, for the leak guard and for replay://.
            identities: the key and hashes of each query's own image, for the leak guard.
            options: `k`, `max_tags`, `exclude` ...; those of the source where not given.

        Raises:
            InvalidInput: a query that means nothing; the message says which and why.
            NotFound: no such store, version or image file, or a sample that a map does not hold.
            FingerprintMismatch: vectors of another encoder.
            Unavailable: no answer in time; with `on_failure="empty"` the answer has no tags instead.
        """
        ...

    def tags(self, tag_ids: Sequence[int], *, embeddings: bool = False) -> list[TagInfo]:
        """Look up tags by id. Text embeddings are read-only and stay in memory. Raises `NotFound`."""
        ...

    def embeddings(self, answer: Retrieval) -> NDArray[np.float32]:
        """Look up the text embeddings `[n, D]` of an answer's tags; each crosses the wire once.

        With `preload=True` they come with the answer. Raises `InvalidInput` for a store without text
        embeddings.
        """
        ...

    def vocabulary(self, *, embeddings: bool = False) -> Iterator[TagInfo]:
        """Yield all tags of the version by ascending id, fetched page by page."""
        ...

    def info(self) -> StoreInfo:
        """Describe the version that answers now."""
        ...

    def pin(self, version: int = 0) -> Pin:
        """Stay with a version, the current one if 0, in this process and in workers that get the source
        later.

        Returns what a checkpoint has to remember. Raises `NotFound` if there is no such version.
        """
        ...

    def stats(self) -> Stats:
        """Sum up what this process and all workers that share the source have done."""
        ...

    def close(self) -> None:
        """Close connections. A closed source opens again when it is used."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def require(answers: Iterable[Retrieval], store: str = "", version: int = 0) -> None:
    """Refuse answers of another store or version than a checkpoint names; empty and 0 allow any.

    Answers without tags and those of random:// pass. Raises `InvalidInput`.
    """
    for answer in answers:
        if not answer.tags or answer.store == "random":  # random tags are a control experiment
            continue
        if (store and answer.store != store) or (version and answer.version != version):
            required = f"{store or answer.store}@{version}" if version else store
            raise InvalidInput(
                f"{required} is required, and {answer.store}@{answer.version} answered: "
                f"end the URL with /{required}"
            )
