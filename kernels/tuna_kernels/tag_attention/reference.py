"""Attention from few tags to many patches in plain torch: the CPU path, and what the kernels are measured against."""

from __future__ import annotations

import torch
from torch import Tensor


def slots(cu_tags: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For each of the `total` packed tags: its image, and its place among that image's tags. Two int64 `[T]`; no host sync."""
    cu = cu_tags.long()
    index = torch.arange(total, device=cu.device)
    image = torch.searchsorted(cu[1:].contiguous(), index, right=True)
    return image, index - cu[image]


def most_tags(cu_tags: Tensor) -> int:
    """The largest number of tags that one image has (a host sync on a GPU)."""
    return int((cu_tags[1:] - cu_tags[:-1]).max()) if cu_tags.numel() > 1 else 0


def tag_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_tags: Tensor,
    *,
    scale: float,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    patch_mask: Tensor | None = None,
    max_tags: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`(out [T, H, D], attention [T, H, P])` in the dtype of `q`; the arguments are those of the operator (see `op.py`).

    Tags are padded to `[B, max_tags]`, so that the work is two batched matrix products whatever the layout.
    """
    (total, heads, dim), (batch, patches, kv_heads, _) = q.shape, k.shape
    image, slot = slots(cu_tags, total)
    most = most_tags(cu_tags) if max_tags is None else max_tags
    group = heads // kv_heads

    padded = (
        q.new_zeros(batch, most, heads, dim)
        .index_put((image, slot), q)
        .view(batch, most, kv_heads, group, dim)
    )
    logits = torch.einsum("bnkgd,bpkd->bnkgp", padded, k).reshape(batch, most, heads, patches)
    logits = logits[image, slot] * scale
    if bias is not None:
        logits = logits + (bias if bias.ndim == 3 else bias[:, None]).to(logits.dtype)
    if patch_mask is not None:
        logits = logits.masked_fill(~patch_mask[image][:, None], -torch.inf)
    # a row that may see nothing is all zeros, forward and backward: softmax alone would make it NaN
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    attention = logits.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)

    padded = attention.new_zeros(batch, most, heads, patches).index_put((image, slot), attention)
    out = torch.einsum("bnkgp,bpkd->bnkgd", padded.view(batch, most, kv_heads, group, patches), v).reshape(
        batch, most, heads, dim
    )
    out = out[image, slot]
    if weights is not None:
        out = out * weights[:, None, None].to(out.dtype)
    return out, attention
