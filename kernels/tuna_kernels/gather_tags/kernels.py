"""Gather forward; backward as a sum over runs of equal ids in sorted order: no atomics, the same bits every run."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def"
# Triton's own conventions: constants in capitals, and arguments whose types are those of the launch.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import check_interpreter

BLOCK_R, BLOCK_E = 8, 256
"""Rows of a run that are summed together, and columns of a tile."""


@triton.jit
def gather_kernel(table, ids, out, stride_v, rows, columns, BLOCK_E: tl.constexpr):
    """A program copies one row's range of columns. Beyond the table there is no row: NaN says so without waiting for the device."""
    row = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < columns
    index = tl.load(ids + row).to(tl.int64)
    found = (index >= 0) & (index < rows)
    b_x = tl.load(table + index * stride_v + o_e, mask=m_e & found, other=0.0)
    b_x = tl.where(index < rows, b_x, float("nan"))
    tl.store(out + row * columns + o_e, b_x.to(out.dtype.element_ty), mask=m_e)


@triton.jit
def scatter_kernel(
    dout, ids, order, dtable, stride_g, total, rows, columns, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr
):
    """ids are sorted, order says where each came from. The program at the first of a run of equal ids sums the run's rows in
    float32 and writes the table's row once; all others have nothing to do."""
    first = tl.program_id(0)
    index = tl.load(ids + first).to(tl.int64)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1).to(tl.int64)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < columns
    # a negative id (no row) fails index != before at the start of the sorted ids, and the range check anywhere
    go = (index >= 0) & (index < rows) & (index != before)
    mine = go
    b_x = tl.zeros([BLOCK_E], tl.float32)
    at = first
    while go:
        o_r = at + tl.arange(0, BLOCK_R)
        same = tl.load(ids + o_r, mask=o_r < total, other=-1).to(tl.int64) == index
        o_from = tl.load(order + o_r, mask=same, other=0)
        p_g = dout + o_from[:, None] * stride_g + o_e[None, :]
        b_x += tl.sum(tl.load(p_g, mask=same[:, None] & m_e[None, :], other=0.0).to(tl.float32), 0)
        at += BLOCK_R
        go = tl.sum(same.to(tl.int32), 0) == BLOCK_R
    tl.store(dtable + index * columns + o_e, b_x.to(dtable.dtype.element_ty), mask=m_e & mine)


def gather(table: Tensor, ids: Tensor) -> Tensor:
    """`[T, E]`. One launch: sorting first, to read a row that two images share only once, costs more than the L2 cache does."""
    check_interpreter()
    out = torch.empty((ids.shape[0], table.shape[1]), dtype=table.dtype, device=table.device)
    if out.numel():
        grid = (ids.shape[0], triton.cdiv(table.shape[1], BLOCK_E))
        gather_kernel[grid](
            table, ids, out, table.stride(0), table.shape[0], table.shape[1], BLOCK_E=BLOCK_E, num_warps=2
        )
    return out


def scatter(dout: Tensor, ids: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """`[rows, E]`: rows of dout summed by id, in the order of the batch."""
    check_interpreter()
    total, columns = dout.shape
    dtable = torch.zeros((rows, columns), dtype=dtype, device=dout.device)
    if dout.numel() and rows:
        ordered, order = torch.sort(ids, stable=True)
        grid = (total, triton.cdiv(columns, BLOCK_E))
        scatter_kernel[grid](
            dout,
            ordered,
            order,
            dtable,
            dout.stride(0),
            total,
            rows,
            columns,
            BLOCK_R=BLOCK_R,
            BLOCK_E=BLOCK_E,
            num_warps=2,
        )
    return dtable
