"""The backward kernels: one pass over K and V for an image whose rows fit one block (nearly all do), no atomics, same bits every run.

Attention with long queries needs two passes or atomics, because dq sums over keys and dk, dv sum over queries. Here the queries
of one (image, key/value head) are few: one program keeps all of them and their dq on chip while it walks the patches, and
finishes dk and dv of each patch block on the way.
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
from .forward import (
    LOG2E,
    bias_strides,
    load_stats,
    load_tile,
    logits_tile,
    mask_strides,
    place,
    row_programs,
    split_rows,
)
from .tuning import Config, backward_candidates, backward_default, bias_default, pick, tuning_key


@triton.jit
def load_rows(
    q, dout, out, stats, weights, r, rows, start, head, total, kv_heads,
    stride_qt, stride_qh, stride_gt, stride_gh,
    D: tl.constexpr, G: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q, dout, delta = rowsum(dout * out), largest logit, 1 / sum and weight of a block of rows."""
    o_tag, o_head, m_r = split_rows(r, rows, start, head, G, BLOCK_M)
    o_row = o_tag * (kv_heads * G) + o_head
    b_q = load_tile(q, o_tag * stride_qt + o_head * stride_qh, 1, m_r, D, BLOCK_D)
    b_g = load_tile(dout, o_tag * stride_gt + o_head * stride_gh, 1, m_r, D, BLOCK_D)
    b_o = load_tile(out, o_row, D, m_r, D, BLOCK_D)
    b_delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), 1)
    b_m, b_r = load_stats(stats, o_row, m_r, total, kv_heads * G)
    b_w = tl.full([BLOCK_M], 1.0, tl.float32)
    if HAS_WEIGHTS:
        b_w = tl.load(weights + o_tag, mask=m_r, other=0.0).to(tl.float32)
    return o_tag, o_head, o_row, m_r, b_q, b_g, b_delta, b_m, b_r, b_w


@triton.jit
def gradient_tile(
    b_q, b_g, b_k, b_v, b_delta, b_m, b_r, b_w,
    bias, o_tag, o_head, m_r, mask, o_p, m_p, stride_bt, stride_bh, stride_bp, stride_mp, scale,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention, its gradient before the weight, and the gradient of the logits; each `[BLOCK_M, BLOCK_N]`."""
    b_s = logits_tile(
        b_q, b_k, bias, o_tag, o_head, m_r, mask, o_p, m_p, stride_bt, stride_bh, stride_bp, stride_mp, scale,
        HAS_BIAS, HAS_MASK, PRECISION,
    )  # fmt: skip
    b_a = tl.exp2((b_s - b_m[:, None]) * LOG2E) * b_r[:, None]
    b_da = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_a * (b_w[:, None] * b_da - b_delta[:, None])
    return b_a, b_da, b_ds


@triton.jit
def backward_kernel(
    q, k, v, weights, bias, mask, cu_tags, out, stats, dout, dq, dk, dv, dweights,
    stride_qt, stride_qh, stride_kb, stride_kp, stride_kh, stride_vb, stride_vp, stride_vh, stride_gt, stride_gh,
    stride_bt, stride_bh, stride_bp, stride_mb, stride_mp,
    scale, total, patches, kv_heads, batch, patches_each,
    D: tl.constexpr, G: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns (image, key/value head, a range of patches): all of dk, dv there, and one summand of dq and dweights.

    dq `[splits, T, H, D]`, dweights `[splits, T, H]`, dk and dv `[B, P, Hkv, D]`; contiguous.
    """
    pid = tl.program_id(0)
    split = pid // (kv_heads * batch)
    image, head, _, start, tags = place(pid % (kv_heads * batch), kv_heads, 1, cu_tags, total)
    rows = tags * G
    first = split * patches_each
    last = tl.minimum(first + patches_each, patches)
    p_k = k + image * stride_kb + head.to(tl.int64) * stride_kh
    p_v = v + image * stride_vb + head.to(tl.int64) * stride_vh
    p_dk = dk + (image * patches * kv_heads + head) * D
    p_dv = dv + (image * patches * kv_heads + head) * D
    stride_dp = kv_heads * D
    if HAS_MASK:
        mask += image * stride_mb
    o_rows = split.to(tl.int64) * total * (kv_heads * G)
    dq += o_rows * D
    if HAS_WEIGHTS:
        dweights += o_rows
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]

    if rows <= BLOCK_M:
        o_tag, o_head, o_row, m_r, b_q, b_g, b_delta, b_m, b_r, b_w = load_rows(
            q, dout, out, stats, weights, 0, rows, start, head, total, kv_heads, stride_qt, stride_qh, stride_gt, stride_gh,
            D, G, HAS_WEIGHTS, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        b_dw = tl.zeros([BLOCK_M], tl.float32)
        for p in range(first, last, BLOCK_N):
            o_p = (p + tl.arange(0, BLOCK_N)).to(tl.int64)
            m_p = o_p < last
            b_k = load_tile(p_k, o_p, stride_kp, m_p, D, BLOCK_D)
            b_v = load_tile(p_v, o_p, stride_vp, m_p, D, BLOCK_D)
            b_a, b_da, b_ds = gradient_tile(
                b_q, b_g, b_k, b_v, b_delta, b_m, b_r, b_w, bias, o_tag, o_head, m_r, mask, o_p, m_p,
                stride_bt, stride_bh, stride_bp, stride_mp, scale, HAS_BIAS, HAS_MASK, PRECISION,
            )  # fmt: skip
            if HAS_WEIGHTS:
                b_dw += tl.sum(b_a * b_da, 1)
                b_a *= b_w[:, None]
            b_ds = b_ds.to(b_q.dtype)
            b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
            b_dv = tl.dot(tl.trans(b_a.to(b_g.dtype)), b_g, input_precision=PRECISION)
            b_dk = tl.dot(tl.trans(b_ds), b_q, input_precision=PRECISION) * scale
            o_tile = o_p[:, None] * stride_dp + o_d[None, :]
            tl.store(p_dv + o_tile, b_dv.to(dv.dtype.element_ty), mask=m_p[:, None] & m_d)
            tl.store(p_dk + o_tile, b_dk.to(dk.dtype.element_ty), mask=m_p[:, None] & m_d)
        tl.store(
            dq + o_row[:, None] * D + o_d[None, :],
            (b_dq * scale).to(dq.dtype.element_ty),
            mask=m_r[:, None] & m_d,
        )
        if HAS_WEIGHTS:
            tl.store(dweights + o_row, b_dw, mask=m_r)
    else:
        # more rows than one block holds: dq row block by row block, then dk and dv patch block by patch block;
        # num_stages=1 keeps this rare branch from taking the registers of the usual one
        for r in range(0, rows, BLOCK_M):
            o_tag, o_head, o_row, m_r, b_q, b_g, b_delta, b_m, b_r, b_w = load_rows(
                q, dout, out, stats, weights, r, rows, start, head, total, kv_heads, stride_qt, stride_qh, stride_gt, stride_gh,
                D, G, HAS_WEIGHTS, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            b_dw = tl.zeros([BLOCK_M], tl.float32)
            for p in tl.range(first, last, BLOCK_N, num_stages=1):
                o_p = (p + tl.arange(0, BLOCK_N)).to(tl.int64)
                m_p = o_p < last
                b_k = load_tile(p_k, o_p, stride_kp, m_p, D, BLOCK_D)
                b_v = load_tile(p_v, o_p, stride_vp, m_p, D, BLOCK_D)
                b_a, b_da, b_ds = gradient_tile(
                    b_q, b_g, b_k, b_v, b_delta, b_m, b_r, b_w, bias, o_tag, o_head, m_r, mask, o_p, m_p,
                    stride_bt, stride_bh, stride_bp, stride_mp, scale, HAS_BIAS, HAS_MASK, PRECISION,
                )  # fmt: skip
                if HAS_WEIGHTS:
                    b_dw += tl.sum(b_a * b_da, 1)
                b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
            tl.store(
                dq + o_row[:, None] * D + o_d[None, :],
                (b_dq * scale).to(dq.dtype.element_ty),
                mask=m_r[:, None] & m_d,
            )
            if HAS_WEIGHTS:
                tl.store(dweights + o_row, b_dw, mask=m_r)
        for p in tl.range(first, last, BLOCK_N, num_stages=1):
            o_p = (p + tl.arange(0, BLOCK_N)).to(tl.int64)
            m_p = o_p < last
            b_k = load_tile(p_k, o_p, stride_kp, m_p, D, BLOCK_D)
            b_v = load_tile(p_v, o_p, stride_vp, m_p, D, BLOCK_D)
            b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for r in tl.range(0, rows, BLOCK_M, num_stages=1):
                o_tag, o_head, o_row, m_r, b_q, b_g, b_delta, b_m, b_r, b_w = load_rows(
                    q, dout, out, stats, weights, r, rows, start, head, total, kv_heads, stride_qt, stride_qh, stride_gt, stride_gh,
                    D, G, HAS_WEIGHTS, BLOCK_M, BLOCK_D,
                )  # fmt: skip
                b_a, b_da, b_ds = gradient_tile(
                    b_q, b_g, b_k, b_v, b_delta, b_m, b_r, b_w, bias, o_tag, o_head, m_r, mask, o_p, m_p,
                    stride_bt, stride_bh, stride_bp, stride_mp, scale, HAS_BIAS, HAS_MASK, PRECISION,
                )  # fmt: skip
                if HAS_WEIGHTS:
                    b_a *= b_w[:, None]
                b_dv = tl.dot(tl.trans(b_a.to(b_g.dtype)), b_g, b_dv, input_precision=PRECISION)
                b_dk = tl.dot(tl.trans(b_ds.to(b_q.dtype)), b_q, b_dk, input_precision=PRECISION)
            o_tile = o_p[:, None] * stride_dp + o_d[None, :]
            tl.store(p_dv + o_tile, b_dv.to(dv.dtype.element_ty), mask=m_p[:, None] & m_d)
            tl.store(p_dk + o_tile, (b_dk * scale).to(dk.dtype.element_ty), mask=m_p[:, None] & m_d)


@triton.jit
def dbias_kernel(
    q, k, v, weights, bias, mask, cu_tags, out, stats, dout, dbias,
    stride_qt, stride_qh, stride_kb, stride_kp, stride_kh, stride_vb, stride_vp, stride_vh, stride_gt, stride_gh,
    stride_bt, stride_bh, stride_bp, stride_mb, stride_mp,
    scale, total, patches, heads, groups, blocks,
    D: tl.constexpr, G: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dbias `[T, Hb, P]`: the gradient of the logits, summed in order over the heads that share a bias. Rows are tags here."""
    # (image, bias head, block of tags) and, in the second grid dimension, the patch block
    image, group, block, start, tags = place(tl.program_id(0), groups, blocks, cu_tags, total)
    o_p = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m_p = o_p < patches
    if HAS_MASK:
        mask += image * stride_mb
    shared = heads // groups
    for r in range(block * BLOCK_M, tags, blocks * BLOCK_M):
        b_db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for head in range(group * shared, group * shared + shared):
            o_tag, o_head, _, m_r, b_q, b_g, b_delta, b_m, b_r, b_w = load_rows(
                q, dout, out, stats, weights, r, tags, start, head, total, heads, stride_qt, stride_qh, stride_gt, stride_gh,
                D, 1, HAS_WEIGHTS, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            kv = tl.cast(head // G, tl.int64)
            b_k = load_tile(k + image * stride_kb + kv * stride_kh, o_p, stride_kp, m_p, D, BLOCK_D)
            b_v = load_tile(v + image * stride_vb + kv * stride_vh, o_p, stride_vp, m_p, D, BLOCK_D)
            _, _, b_ds = gradient_tile(
                b_q, b_g, b_k, b_v, b_delta, b_m, b_r, b_w, bias, o_tag, o_head, m_r, mask, o_p, m_p,
                stride_bt, stride_bh, stride_bp, stride_mp, scale, True, HAS_MASK, PRECISION,
            )  # fmt: skip
            b_db += b_ds
        o_tag = start + r + tl.arange(0, BLOCK_M)
        p_db = dbias + (o_tag * groups + group)[:, None] * patches + o_p[None, :]
        tl.store(p_db, b_db.to(dbias.dtype.element_ty), mask=(o_tag < start + tags)[:, None] & m_p[None, :])


def patch_splits(batch: int, kv_heads: int, patches: int, block_n: int, device: torch.device) -> int:
    """Ranges of patches that one (image, head) is cut into, so that a small batch still fills the GPU. One means that dq is
    written once, in its own dtype; more cost a float32 copy of dq each, which is little: tags are few."""
    programs = batch * kv_heads
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    )
    return max(
        1,
        min(triton.cdiv(2 * processors, programs), triton.cdiv(patches, 2 * block_n))
        if programs < processors
        else 1,
    )


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_tags: Tensor, out: Tensor, stats: Tensor, scale: float,
    weights: Tensor | None, bias: Tensor | None, mask: Tensor | None, splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`(dq, dk, dv, dweights)`; dweights is None without weights. `splits` is chosen by `patch_splits` unless given."""
    check_interpreter()
    (total, heads, dim), (batch, patches, kv_heads, _) = q.shape, k.shape
    dk, dv = (
        torch.empty(k.shape, dtype=k.dtype, device=k.device),
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
    )
    if total == 0 or patches == 0:
        zero = None if weights is None else torch.zeros_like(weights)
        return torch.zeros_like(q, memory_format=torch.contiguous_format), dk.zero_(), dv.zero_(), zero
    group = heads // kv_heads
    rows = triton.cdiv(total * group, batch)
    shape = (dim, q.dtype, rows, bias is not None)
    default = backward_default(*shape)
    splits = splits or patch_splits(batch, kv_heads, patches, default.block_n, q.device)
    dq = torch.empty(
        (splits, total, heads, dim), dtype=q.dtype if splits == 1 else torch.float32, device=q.device
    )
    dweights = (
        None if weights is None else torch.empty((splits, total, heads), dtype=torch.float32, device=q.device)
    )

    def launch(config: Config) -> None:
        each = triton.cdiv(triton.cdiv(patches, splits), config.block_n) * config.block_n
        backward_kernel[(batch * kv_heads * splits,)](
            q, k, v, weights, bias, mask, cu_tags, out, stats, dout, dq, dk, dv, dweights,
            q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], dout.stride(0), dout.stride(1),
            *bias_strides(bias), *mask_strides(mask), scale, total, patches, kv_heads, batch, each,
            D=dim, G=group, HAS_WEIGHTS=weights is not None, HAS_BIAS=bias is not None, HAS_MASK=mask is not None,
            PRECISION=dot_precision(q.dtype), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_D=max(16, triton.next_power_of_2(dim)), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    key = tuning_key("backward", q.dtype, dim, group, rows, patches, bias is not None, mask is not None)
    launch(pick(key, q.device, default, backward_candidates(*shape), launch))
    dq = dq[0] if splits == 1 else dq.sum(0).to(q.dtype)
    if dweights is None or weights is None:
        return dq, dk, dv, None
    return dq, dk, dv, dweights.sum((0, 2)).to(weights.dtype)


def bias_gradient(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_tags: Tensor, out: Tensor, stats: Tensor, scale: float,
    weights: Tensor | None, bias: Tensor, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """dbias in the shape and dtype of bias. A launch of its own that reads everything again: few train a bias, and all
    others should not pay for `[T, H, P]` in memory."""
    (total, heads, dim), (batch, patches, kv_heads, _) = q.shape, k.shape
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    if dbias.numel() == 0:
        return dbias
    groups = 1 if bias.ndim == 2 else bias.shape[1]
    config = bias_default(dim, q.dtype)
    blocks = row_programs(total, 1, batch, config.block_m)
    dbias_kernel[(batch * groups * blocks, triton.cdiv(patches, config.block_n))](
        q, k, v, weights, bias, mask, cu_tags, out, stats, dout, dbias,
        q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3], dout.stride(0), dout.stride(1),
        *bias_strides(bias), *mask_strides(mask), scale, total, patches, heads, groups, blocks,
        D=dim, G=heads // kv_heads, HAS_WEIGHTS=weights is not None, HAS_MASK=mask is not None,
        PRECISION=dot_precision(q.dtype), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(dim)), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return dbias
