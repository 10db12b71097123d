"""Gather tag embeddings in plain torch: the CPU path, and the kernels' reference."""

from __future__ import annotations

from torch import Tensor


def gather_tags(table: Tensor, ids: Tensor) -> Tensor:
    """Return rows `[T, E]` of `table`; zeros where an id is negative."""
    rows = table.index_select(0, ids.clamp_min(0).long())
    return rows.masked_fill((ids < 0)[:, None], 0)
