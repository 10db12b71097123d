"""The weight tuner as one launch forward and one backward: cosine, ragged softmax and coupling, a program for each image.

The cosines `[T]` and the inverse norms are kept for the backward; the tags' embeddings are read once in the forward.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton's own conventions: constants in capitals, and arguments whose types are those of the launch.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import check_interpreter

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK_T, BLOCK_E = 16, 256
"""Tags and columns of a tile: 16 tags is the mean of an image, and 256 columns keep the loads of one row in flight together."""


@triton.jit
def image_tags(cu_tags, image, total):
    """Where an image's tags start (int64) and how many there are; clamped, so that wrong offsets never read outside."""
    start = tl.minimum(tl.maximum(tl.load(cu_tags + image), 0), total)
    stop = tl.minimum(tl.maximum(tl.load(cu_tags + image + 1), start), total)
    return start.to(tl.int64), stop - start


@triton.jit
def inverse(squared):
    """1 / sqrt, and 0 for 0: a row of zeros has no direction."""
    return tl.where(squared > 0, 1.0 / tl.sqrt(tl.where(squared > 0, squared, 1.0)), 0.0)


@triton.jit
def weights_kernel(
    tags, images, scores, temperature, cu_tags, weights, cosine, tag_norm, image_norm,
    stride_t, stride_i, tau, threshold, total, columns,
    HAS_SCORES: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, COUPLING: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    start, count = image_tags(cu_tags, image, total)
    if HAS_TEMPERATURE:
        tau = tl.load(temperature).to(tl.float32)
    o_e = tl.arange(0, BLOCK_E)
    b_m = tl.full([1], float("-inf"), tl.float32)
    b_l = tl.zeros([1], tl.float32)
    if not HAS_SCORES:
        b_ii = tl.zeros([BLOCK_E], tl.float32)
        for e in range(0, columns, BLOCK_E):
            b_i = tl.load(images + image * stride_i + e + o_e, mask=e + o_e < columns, other=0.0).to(
                tl.float32
            )
            b_ii += b_i * b_i
        i_norm = inverse(tl.sum(b_ii, 0))
        tl.store(image_norm + image, i_norm)
    for t in range(0, count, BLOCK_T):
        m_t = t + tl.arange(0, BLOCK_T) < count
        o_t = start + t + tl.arange(0, BLOCK_T)
        if HAS_SCORES:
            b_c = tl.load(scores + o_t, mask=m_t, other=0.0).to(tl.float32)
        else:
            b_ti = tl.zeros([BLOCK_T], tl.float32)
            b_tt = tl.zeros([BLOCK_T], tl.float32)
            for e in range(0, columns, BLOCK_E):
                m_e = e + o_e < columns
                b_i = tl.load(images + image * stride_i + e + o_e, mask=m_e, other=0.0).to(tl.float32)
                p_t = tags + o_t[:, None] * stride_t + (e + o_e)[None, :]
                b_t = tl.load(p_t, mask=m_t[:, None] & m_e[None, :], other=0.0).to(tl.float32)
                b_ti += tl.sum(b_t * b_i[None, :], 1)
                b_tt += tl.sum(b_t * b_t, 1)
            b_norm = inverse(b_tt)
            b_c = b_ti * b_norm * i_norm
            tl.store(tag_norm + o_t, b_norm, mask=m_t)
        tl.store(cosine + o_t, b_c, mask=m_t)
        b_c = tl.where(m_t, b_c, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_c, 0))
        b_l = b_l * tl.exp2((b_m - b_m_new) / tau * LOG2E) + tl.sum(tl.exp2((b_c - b_m_new) / tau * LOG2E), 0)
        b_m = b_m_new
    # the cosines are read back below by other threads than wrote them
    tl.debug_barrier()
    for t in range(0, count, BLOCK_T):
        m_t = t + tl.arange(0, BLOCK_T) < count
        o_t = start + t + tl.arange(0, BLOCK_T)
        # the difference first: it is exact for neighbours, and small
        b_s = (tl.load(cosine + o_t, mask=m_t, other=0.0) - b_m) / tau * LOG2E
        if COUPLING == "log_bias":
            b_w = (b_s - tl.log2(b_l)) / LOG2E
        else:
            b_w = tl.exp2(b_s)
            if COUPLING == "multiply":
                b_w /= b_l
            if COUPLING == "drop":
                b_w = tl.where(b_w >= threshold, b_w, 0.0)
        tl.store(weights + o_t, b_w, mask=m_t)


@triton.jit
def logit_gradient(cosine, grad, o_t, m_t, tau, b_m, b_l, b_sum, b_ties, threshold, COUPLING: tl.constexpr):
    """Gradient of `cosine / tau` for a block of tags, and the cosines. README, "Gradients"."""
    b_c = tl.load(cosine + o_t, mask=m_t, other=0.0)
    b_g = tl.load(grad + o_t, mask=m_t, other=0.0).to(tl.float32)
    b_e = tl.where(m_t, tl.exp2((b_c - b_m) / tau * LOG2E), 0.0)
    if COUPLING == "multiply":
        b_ds = b_e / b_l * (b_g - b_sum)
    elif COUPLING == "log_bias":
        b_ds = b_g - b_e / b_l * b_sum
    else:
        if COUPLING == "drop":
            b_g = tl.where(b_e >= threshold, b_g, 0.0)
        # the largest divides: what it takes, it takes from all (equal ones share it)
        b_ds = b_g * b_e - tl.where(m_t & (b_c == b_m), b_sum / b_ties, 0.0)
    return tl.where(m_t, b_ds, 0.0), b_c


@triton.jit
def weights_backward_kernel(
    tags, images, temperature, cu_tags, cosine, tag_norm, image_norm, grad, dtags, dimages, dscores, dtemperature,
    stride_t, stride_i, tau, threshold, total, columns,
    HAS_SCORES: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, NEED_TAGS: tl.constexpr, NEED_IMAGES: tl.constexpr,
    COUPLING: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A program owns an image and a range of columns. The `[T]` part is so small that every range computes it again."""
    image = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    start, count = image_tags(cu_tags, image, total)
    if HAS_TEMPERATURE:
        tau = tl.load(temperature).to(tl.float32)

    b_m = tl.full([1], float("-inf"), tl.float32)
    for t in range(0, count, BLOCK_T):
        m_t = t + tl.arange(0, BLOCK_T) < count
        b_c = tl.load(cosine + start + t + tl.arange(0, BLOCK_T), mask=m_t, other=0.0)
        b_m = tl.maximum(b_m, tl.max(tl.where(m_t, b_c, float("-inf")), 0))
    b_l = tl.zeros([1], tl.float32)
    b_sum = tl.zeros([1], tl.float32)
    b_ties = tl.zeros([1], tl.float32)
    for t in range(0, count, BLOCK_T):
        m_t = t + tl.arange(0, BLOCK_T) < count
        o_t = start + t + tl.arange(0, BLOCK_T)
        b_c = tl.load(cosine + o_t, mask=m_t, other=0.0)
        b_g = tl.load(grad + o_t, mask=m_t, other=0.0).to(tl.float32)
        b_e = tl.where(m_t, tl.exp2((b_c - b_m) / tau * LOG2E), 0.0)
        b_l += tl.sum(b_e, 0)
        if COUPLING == "drop":
            b_g = tl.where(b_e >= threshold, b_g, 0.0)
        b_sum += tl.sum(b_g, 0) if COUPLING == "log_bias" else tl.sum(b_g * b_e, 0)
        b_ties += tl.sum(tl.where(m_t & (b_c == b_m), 1.0, 0.0), 0)
    if COUPLING == "multiply":
        b_sum /= tl.where(b_l > 0, b_l, 1.0)

    o_e = chunk * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < columns
    b_dtau = tl.zeros([BLOCK_T], tl.float32)
    b_di = tl.zeros([BLOCK_E], tl.float32)
    if NEED_TAGS or NEED_IMAGES:
        i_norm = tl.load(image_norm + image)
        b_i = tl.load(images + image * stride_i + o_e, mask=m_e, other=0.0).to(tl.float32) * i_norm
    for t in range(0, count, BLOCK_T):
        m_t = t + tl.arange(0, BLOCK_T) < count
        o_t = start + t + tl.arange(0, BLOCK_T)
        b_ds, b_c = logit_gradient(cosine, grad, o_t, m_t, tau, b_m, b_l, b_sum, b_ties, threshold, COUPLING)
        # b_ds sums to 0, so the largest cosine may be taken off: less to cancel
        b_dtau -= tl.where(m_t, b_ds * (b_c - b_m), 0.0) / (tau * tau)
        b_dc = b_ds / tau
        if HAS_SCORES:
            tl.store(dscores + o_t, b_dc.to(dscores.dtype.element_ty), mask=m_t & (chunk == 0))
        if NEED_TAGS or NEED_IMAGES:
            m_te = m_t[:, None] & m_e[None, :]
            b_norm = tl.load(tag_norm + o_t, mask=m_t, other=0.0)
            b_t = (
                tl.load(tags + o_t[:, None] * stride_t + o_e[None, :], mask=m_te, other=0.0).to(tl.float32)
                * b_norm[:, None]
            )
            if NEED_TAGS:
                b_dt = (b_dc * b_norm)[:, None] * (b_i[None, :] - b_c[:, None] * b_t)
                tl.store(
                    dtags + o_t[:, None] * columns + o_e[None, :], b_dt.to(dtags.dtype.element_ty), mask=m_te
                )
            if NEED_IMAGES:
                b_di += tl.sum((b_dc * i_norm)[:, None] * (b_t - b_c[:, None] * b_i[None, :]), 0)
    if NEED_IMAGES:
        tl.store(dimages + image * columns + o_e, b_di.to(dimages.dtype.element_ty), mask=m_e)
    if HAS_TEMPERATURE:
        tl.store(dtemperature + image, tl.sum(b_dtau, 0), mask=chunk == 0)


def forward(
    tags: Tensor | None, images: Tensor | None, scores: Tensor | None, temperature: Tensor | None, cu_tags: Tensor,
    tau: float, threshold: float, coupling: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`(weights [T], cosines [T], 1/|tag| [T], 1/|image| [B])`, all float32. From `scores` if given, else from embeddings."""
    check_interpreter()
    given = tags if scores is None else scores
    assert given is not None, "either embeddings or scores"
    total, batch = given.shape[0], cu_tags.numel() - 1
    weights, cosine, tag_norm = (
        torch.empty(total, dtype=torch.float32, device=given.device) for _ in range(3)
    )
    image_norm = torch.empty(batch, dtype=torch.float32, device=given.device)
    if total:
        weights_kernel[(batch,)](
            tags, images, scores, temperature, cu_tags, weights, cosine, tag_norm, image_norm,
            0 if tags is None else tags.stride(0), 0 if images is None else images.stride(0), tau, threshold,
            total, 0 if tags is None else tags.shape[1],
            HAS_SCORES=scores is not None, HAS_TEMPERATURE=temperature is not None, COUPLING=coupling,
            BLOCK_T=BLOCK_T, BLOCK_E=BLOCK_E, num_warps=4,
        )  # fmt: skip
    return weights, cosine, tag_norm, image_norm


def backward(
    grad: Tensor, tags: Tensor | None, images: Tensor | None, scores: Tensor | None, temperature: Tensor | None, cu_tags: Tensor,
    cosine: Tensor, tag_norm: Tensor, image_norm: Tensor, tau: float, threshold: float, coupling: str,
    need_tags: bool, need_images: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`(dtags, dimages, dscores, dtemperature)`; None where there was no such input or no gradient of it is needed."""
    check_interpreter()
    total, batch = grad.shape[0], cu_tags.numel() - 1
    device = grad.device
    dtags = (
        torch.empty(tags.shape, dtype=tags.dtype, device=device) if tags is not None and need_tags else None
    )
    dimages = (
        torch.empty(images.shape, dtype=images.dtype, device=device)
        if images is not None and need_images
        else None
    )
    dscores = None if scores is None else torch.empty(scores.shape, dtype=scores.dtype, device=device)
    dtau = None if temperature is None else torch.empty(batch, dtype=torch.float32, device=device)
    if batch:
        columns = 0 if tags is None else tags.shape[1]
        wide = dtags is not None or dimages is not None
        weights_backward_kernel[(batch, triton.cdiv(columns, BLOCK_E) if wide else 1)](
            tags, images, temperature, cu_tags, cosine, tag_norm, image_norm, grad, dtags, dimages, dscores, dtau,
            0 if tags is None else tags.stride(0), 0 if images is None else images.stride(0), tau, threshold, total, columns,
            HAS_SCORES=scores is not None, HAS_TEMPERATURE=temperature is not None,
            NEED_TAGS=dtags is not None, NEED_IMAGES=dimages is not None, COUPLING=coupling,
            BLOCK_T=BLOCK_T, BLOCK_E=BLOCK_E, num_warps=4,
        )  # fmt: skip
    if dtau is None or temperature is None:
        return dtags, dimages, dscores, None
    return dtags, dimages, dscores, dtau.sum().to(temperature.dtype).reshape(temperature.shape)
