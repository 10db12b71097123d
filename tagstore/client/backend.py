"""What stands behind a source: a server, a directory, a map. The source adds batches, caches and counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tagstore.client.queries import QueryBatch
from tagstore.types import Retrieval, StoreInfo, TagInfo


class Backend(Protocol):
    """Answers one request at a time. Opened at first use in each process; version 0 is the current one."""

    def retrieve(self, batch: QueryBatch) -> list[Retrieval]:
        """Answer each query of a batch."""
        ...

    def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        """Look up tags by id. Returns them and their version."""
        ...

    def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        """List tags from an id on. Returns them, the first id of the next page or 0, and their version."""
        ...

    def info(self, version: int) -> StoreInfo:
        """Describe a version."""
        ...

    def health(self) -> dict[str, str]:
        """Return the state of the circuit of each address; nothing for a backend without servers."""
        return {}

    def close(self) -> None:
        """Close what this process has open; the next use opens it again."""
        return
