"""No tags for any query: the control experiment without retrieval."""

from __future__ import annotations

from collections.abc import Sequence

from tagstore.client.backend import Backend
from tagstore.client.queries import QueryBatch
from tagstore.errors import NotFound
from tagstore.types import Fingerprint, Retrieval, StoreInfo, TagInfo

NO_FINGERPRINT = Fingerprint("none", "", {}, False, True, 0)
"""Stands for the fingerprint where there is no encoder."""


class NullBackend(Backend):
    """Answers every query without tags."""

    def retrieve(self, batch: QueryBatch) -> list[Retrieval]:
        return [Retrieval("null", 0, "", (), ())] * len(batch)

    def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        if tag_ids:
            raise NotFound(f"no tag {tag_ids[0]}: null:// has none")
        return [], 0

    def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        return [], 0, 0

    def info(self, version: int) -> StoreInfo:
        return StoreInfo("null", 0, 0, 0, 0, NO_FINGERPRINT, {"kind": "null"}, "")
