"""Attention from few tags to many patches in plain torch: the CPU path, and the kernels' reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import is_fake


def slots(cu_tags: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return two int64 `[T]` without a host sync: each packed tag's image, and its place in that image."""
    cu = cu_tags.long()
    index = torch.arange(total, device=cu.device)
    image = torch.searchsorted(cu[1:].contiguous(), index, right=True)
    return image, index - cu[image]


def most_tags(cu_tags: Tensor) -> int:
    """Return the largest number of tags of an image (a host sync on a GPU)."""
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
    """Return `(out [T, H, D], attention [T, H, P])` in the dtype of `q`. `op.py` documents the arguments.

    Tags are padded to `[B, max_tags]`, so that the work is two batched matrix products for any layout.
    """
    (total, heads, dim), (batch, patches, kv_heads, _) = q.shape, k.shape
    image, slot = slots(cu_tags, total)
    if max_tags is None:
        # without values one image may have all tags
        max_tags = total if is_fake(cu_tags) else most_tags(cu_tags)
    most = max_tags
    group = heads // kv_heads

    padded = (
        q.new_zeros(batch, most, heads, dim)
        .index_put((image, slot), q * scale)  # before the product, which may be beyond float16
        .view(batch, most, kv_heads, group, dim)
    )
    logits = torch.einsum("bnkgd,bpkd->bnkgp", padded, k).reshape(batch, most, heads, patches)
    logits = logits[image, slot]
    if bias is not None:
        logits = logits + (bias if bias.ndim == 3 else bias[:, None]).to(logits.dtype)
    if patch_mask is not None:
        logits = logits.masked_fill(~patch_mask[image][:, None], -torch.inf)
    # a row that sees no patch is all zeros, forward and backward: softmax alone would make it NaN
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
