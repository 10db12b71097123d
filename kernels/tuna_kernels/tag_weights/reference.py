"""The adaptive weight tuner in plain torch: the CPU path, and what the kernels are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tag_attention.reference import slots


def _inverse_norms(x: Tensor) -> Tensor:
    """1 / |x| of every row; 0 for a row of zeros, which so has cosine 0 with everything and no gradient."""
    squared = (x * x).sum(-1)
    return torch.where(squared > 0, squared.masked_fill(squared == 0, 1).rsqrt(), 0)


def cosines(tags: Tensor, images: Tensor, cu_tags: Tensor) -> Tensor:
    """`[T]`: cosine of each tag and its own image, in float32 (float64 if that came in)."""
    wide = torch.promote_types(tags.dtype, torch.float32)
    tags, images = tags.to(wide), images.to(wide)
    image, _ = slots(cu_tags, tags.shape[0])
    return (tags * images[image]).sum(-1) * _inverse_norms(tags) * _inverse_norms(images)[image]


def score_weights(
    scores: Tensor, cu_tags: Tensor, *, temperature: float | Tensor, coupling: str, threshold: float
) -> Tensor:
    """`[T]` weights in float32 (float64 if that came in); the arguments are those of the operator (see `op.py`)."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    image, _ = slots(cu_tags, scores.shape[0])
    batch = cu_tags.numel() - 1
    logits = scores / temperature
    most = logits.new_full((batch,), -torch.inf).scatter_reduce(0, image, logits, "amax", include_self=False)
    if coupling in ("multiply", "log_bias"):
        shifted = logits - most.detach()[image]
        total = shifted.new_zeros(batch).index_add(0, image, shifted.exp())[image]
        return shifted.exp() / total if coupling == "multiply" else shifted - total.log()
    ratio = (logits - most[image]).exp()
    return ratio if coupling == "multiply_max" else torch.where(ratio >= threshold, ratio, 0)
