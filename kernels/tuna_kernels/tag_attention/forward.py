"""The forward kernel: one program reads the keys and values of one (image, key/value head) once for a block of that image's tags.

Rows: with G = H / Hkv query heads to a key/value head, row r of an image is tag r // G, head r % G of the group. So all the
queries that share keys sit in one block, and grouped-query attention reads K and V no more often than multi-head attention.

For the backward a row keeps the largest logit and 1 / (sum of exponentials), not their usual combination lse: exp(s - lse) would
carry the rounding of lse, one unit of its last place, into every attention weight, and break the error rule in float32.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton's own conventions: constants in capitals, and arguments whose types are those of the launch.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import check_interpreter, dot_precision
from .tuning import Config, forward_candidates, forward_default, pick, tuning_key

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def place(pid, kv_heads, blocks, cu_tags, total):
    """Which (image, key/value head, row block) a program is, and where the image's tags are; heads vary fastest, so that
    programs that run together read neighbouring bytes of one patch."""
    head = pid % kv_heads
    block = (pid // kv_heads) % blocks
    image = pid // (kv_heads * blocks)
    # clamped: offsets that are wrong give a wrong answer, never a read outside of q
    start = tl.minimum(tl.maximum(tl.load(cu_tags + image), 0), total)
    stop = tl.minimum(tl.maximum(tl.load(cu_tags + image + 1), start), total)
    return image.to(tl.int64), head, block, start.to(tl.int64), stop - start


@triton.jit
def split_rows(r, rows, start, head, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """The packed tag (int64) and the query head of each row of the block that begins at row r, and which rows exist."""
    o_r = r + tl.arange(0, BLOCK_M)
    return start + o_r // G, head * G + o_r % G, o_r < rows


@triton.jit
def load_tile(base, o_n, stride, m_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[len(o_n), BLOCK_D]`: rows o_n of a matrix with D columns, zeros outside."""
    o_d = tl.arange(0, BLOCK_D)
    return tl.load(
        base + o_n[:, None] * stride + o_d[None, :], mask=m_n[:, None] & (o_d < D)[None, :], other=0.0
    )


@triton.jit
def logits_tile(
    b_q, b_k, bias, o_tag, o_head, m_r, mask, o_p, m_p, stride_bt, stride_bh, stride_bp, stride_mp, scale,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_M, BLOCK_N]` logits; -inf where a patch may not be seen."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    if HAS_BIAS:
        p_bias = bias + o_tag[:, None] * stride_bt + o_head[:, None] * stride_bh + o_p[None, :] * stride_bp
        b_s += tl.load(p_bias, mask=m_r[:, None] & m_p[None, :], other=0.0).to(tl.float32)
    seen = m_p
    if HAS_MASK:
        seen = seen & (tl.load(mask + o_p * stride_mp, mask=m_p, other=0) != 0)
    return tl.where(seen[None, :], b_s, float("-inf"))


@triton.jit
def load_stats(stats, o_row, m_r, total, heads):
    """Largest logit and 1 / sum of each row; a row that does not exist has no attention."""
    b_m = tl.load(stats + o_row, mask=m_r, other=0.0)
    return b_m, tl.load(stats + tl.cast(total, tl.int64) * heads + o_row, mask=m_r, other=0.0)


@triton.jit
def forward_kernel(
    q, k, v, weights, bias, mask, cu_tags, out, stats,
    stride_qt, stride_qh, stride_kb, stride_kp, stride_kh, stride_vb, stride_vp, stride_vh,
    stride_bt, stride_bh, stride_bp, stride_mb, stride_mp,
    scale, total, patches, kv_heads, blocks,
    D: tl.constexpr, G: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out `[T, H, D]` and stats `[2, T, H]`: largest logit and 1 / sum; (0, 0) for a row that sees nothing, so that its attention
    is 0 in the backward too."""
    image, head, block, start, tags = place(tl.program_id(0), kv_heads, blocks, cu_tags, total)
    rows = tags * G
    p_k = k + image * stride_kb + head.to(tl.int64) * stride_kh
    p_v = v + image * stride_vb + head.to(tl.int64) * stride_vh
    if HAS_MASK:
        mask += image * stride_mb
    o_d = tl.arange(0, BLOCK_D)

    for r in range(block * BLOCK_M, rows, blocks * BLOCK_M):
        o_tag, o_head, m_r = split_rows(r, rows, start, head, G, BLOCK_M)
        b_q = load_tile(q, o_tag * stride_qt + o_head * stride_qh, 1, m_r, D, BLOCK_D)
        b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_l = tl.zeros([BLOCK_M], tl.float32)
        b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for p in range(0, patches, BLOCK_N):
            o_p = (p + tl.arange(0, BLOCK_N)).to(tl.int64)
            m_p = o_p < patches
            b_k = load_tile(p_k, o_p, stride_kp, m_p, D, BLOCK_D)
            b_s = logits_tile(
                b_q, b_k, bias, o_tag, o_head, m_r, mask, o_p, m_p, stride_bt, stride_bh, stride_bp, stride_mp, scale,
                HAS_BIAS, HAS_MASK, PRECISION,
            )  # fmt: skip
            b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
            # -inf - -inf is NaN: while nothing was seen, subtract 0
            b_base = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
            b_p = tl.exp2((b_s - b_base[:, None]) * LOG2E)
            b_scale = tl.exp2((b_m - b_base) * LOG2E)
            b_l = b_l * b_scale + tl.sum(b_p, 1)
            b_v = load_tile(p_v, o_p, stride_vp, m_p, D, BLOCK_D)
            b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_scale[:, None], input_precision=PRECISION)
            b_m = b_m_new
        blind = b_l == 0.0
        b_l = tl.where(blind, 1.0, b_l)
        b_o = b_o / b_l[:, None]
        if HAS_WEIGHTS:
            b_o *= tl.load(weights + o_tag, mask=m_r, other=0.0).to(tl.float32)[:, None]
        o_row = o_tag * (kv_heads * G) + o_head
        p_out = out + o_row[:, None] * D + o_d[None, :]
        tl.store(p_out, b_o.to(out.dtype.element_ty), mask=m_r[:, None] & (o_d < D)[None, :])
        tl.store(stats + o_row, tl.where(blind, 0.0, b_m), mask=m_r)
        tl.store(
            stats + tl.cast(total, tl.int64) * (kv_heads * G) + o_row,
            tl.where(blind, 0.0, 1.0 / b_l),
            mask=m_r,
        )


@triton.jit
def maps_kernel(
    q, k, bias, mask, cu_tags, stats, maps,
    stride_qt, stride_qh, stride_kb, stride_kp, stride_kh, stride_bt, stride_bh, stride_bp, stride_mb, stride_mp,
    scale, total, patches, kv_heads, blocks,
    D: tl.constexpr, G: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """maps `[T, H, P]`: the attention itself, from the saved stats. For looking at, so not part of the forward."""
    image, head, block, start, tags = place(tl.program_id(0), kv_heads, blocks, cu_tags, total)
    rows = tags * G
    p_k = k + image * stride_kb + head.to(tl.int64) * stride_kh
    if HAS_MASK:
        mask += image * stride_mb
    for r in range(block * BLOCK_M, rows, blocks * BLOCK_M):
        o_tag, o_head, m_r = split_rows(r, rows, start, head, G, BLOCK_M)
        b_q = load_tile(q, o_tag * stride_qt + o_head * stride_qh, 1, m_r, D, BLOCK_D)
        o_row = o_tag * (kv_heads * G) + o_head
        b_m, b_r = load_stats(stats, o_row, m_r, total, kv_heads * G)
        for p in range(0, patches, BLOCK_N):
            o_p = (p + tl.arange(0, BLOCK_N)).to(tl.int64)
            m_p = o_p < patches
            b_k = load_tile(p_k, o_p, stride_kp, m_p, D, BLOCK_D)
            b_s = logits_tile(
                b_q, b_k, bias, o_tag, o_head, m_r, mask, o_p, m_p, stride_bt, stride_bh, stride_bp, stride_mp, scale,
                HAS_BIAS, HAS_MASK, PRECISION,
            )  # fmt: skip
            b_a = tl.exp2((b_s - b_m[:, None]) * LOG2E) * b_r[:, None]
            p_maps = maps + o_row[:, None] * patches + o_p[None, :]
            tl.store(p_maps, b_a.to(maps.dtype.element_ty), mask=m_r[:, None] & m_p[None, :])


def bias_strides(bias: Tensor | None) -> tuple[int, int, int]:
    """(tag, head, patch) strides of a bias `[T, P]`, `[T, 1, P]` or `[T, H, P]`; a head that is shared has stride 0."""
    if bias is None:
        return 0, 0, 0
    if bias.ndim == 2:
        return bias.stride(0), 0, bias.stride(1)
    return bias.stride(0), bias.stride(1) if bias.shape[1] > 1 else 0, bias.stride(2)


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else (mask.stride(0), mask.stride(1))


def row_programs(total: int, group: int, batch: int, block_m: int) -> int:
    """Programs that share one image's row blocks: as many as an average image has blocks. Known without asking the GPU for the
    layout; an image with more blocks makes its programs loop."""
    return max(1, -(-total * group // (batch * block_m)))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_tags: Tensor,
    scale: float,
    weights: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`(out [T, H, D], stats [2, T, H] float32)`. One launch; no host sync."""
    check_interpreter()
    (total, heads, dim), (batch, patches, kv_heads, _) = q.shape, k.shape
    out = torch.empty((total, heads, dim), dtype=q.dtype, device=q.device)
    stats = torch.empty((2, total, heads), dtype=torch.float32, device=q.device)
    if total == 0:
        return out, stats
    group = heads // kv_heads

    def launch(config: Config) -> None:
        blocks = row_programs(total, group, batch, config.block_m)
        forward_kernel[(batch * kv_heads * blocks,)](
            q, k, v, weights, bias, mask, cu_tags, out, stats,
            q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], *bias_strides(bias), *mask_strides(mask),
            scale, total, patches, kv_heads, blocks,
            D=dim, G=group, HAS_WEIGHTS=weights is not None, HAS_BIAS=bias is not None, HAS_MASK=mask is not None,
            PRECISION=dot_precision(q.dtype), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_D=max(16, triton.next_power_of_2(dim)), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    rows = triton.cdiv(total * group, batch)
    key = tuning_key("forward", q.dtype, dim, group, rows, patches, bias is not None, mask is not None)
    shape = (dim, q.dtype, rows, bias is not None)
    launch(pick(key, q.device, forward_default(*shape), forward_candidates(*shape), launch))
    return out, stats


def attention_maps(
    q: Tensor,
    k: Tensor,
    cu_tags: Tensor,
    stats: Tensor,
    scale: float,
    bias: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """`[T, H, P]` in the dtype of q."""
    (total, heads, dim), (batch, patches, kv_heads, _) = q.shape, k.shape
    maps = torch.empty((total, heads, patches), dtype=q.dtype, device=q.device)
    if maps.numel() == 0:
        return maps
    group = heads // kv_heads
    config = forward_default(dim, q.dtype, triton.cdiv(total * group, batch), bias is not None)
    blocks = row_programs(total, group, batch, config.block_m)
    maps_kernel[(batch * kv_heads * blocks,)](
        q, k, bias, mask, cu_tags, stats, maps,
        q.stride(0), q.stride(1), *k.stride()[:3], *bias_strides(bias), *mask_strides(mask),
        scale, total, patches, kv_heads, blocks,
        D=dim, G=group, HAS_BIAS=bias is not None, HAS_MASK=mask is not None, PRECISION=dot_precision(q.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=max(16, triton.next_power_of_2(dim)),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return maps
