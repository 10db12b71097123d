"""Gather rows; in the backward, sort the ids and sum each run of equal ids, without atomics."""

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
"""Rows of a run that are summed at once, and columns of a tile."""


@triton.jit
def gather_kernel(table, ids, out, stride_v, rows, columns, BLOCK_E: tl.constexpr):
    """Copy a range of columns of a row; a row beyond the table is NaN: a check would wait for the device."""
    row = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < columns
    index = tl.load(ids + row).to(tl.int64)
    exists = (index >= 0) & (index < rows)
    b_x = tl.load(table + index * stride_v + o_e, mask=m_e & exists, other=0.0)
    b_x = tl.where(index < rows, b_x, float("nan"))
    tl.store(out + row * columns + o_e, b_x.to(out.dtype.element_ty), mask=m_e)


@triton.jit
def scatter_kernel(
    dout, ids, order, dtable, stride_g, total, rows, columns, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Sum the rows of a run of equal ids in float32 and write the table's row once.

    ids are sorted; order holds the place of each in the batch. The program at the start of a run sums it.
    """
    first = tl.program_id(0)
    index = tl.load(ids + first).to(tl.int64)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1).to(tl.int64)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < columns
    starts_run = (index >= 0) & (index < rows) & (index != before)
    b_x = tl.zeros([BLOCK_E], tl.float32)
    row = first
    more = starts_run
    while more:
        o_r = row + tl.arange(0, BLOCK_R)
        same = tl.load(ids + o_r, mask=o_r < total, other=-1).to(tl.int64) == index
        o_from = tl.load(order + o_r, mask=same, other=0)
        p_g = dout + o_from[:, None] * stride_g + o_e[None, :]
        b_x += tl.sum(tl.load(p_g, mask=same[:, None] & m_e[None, :], other=0.0).to(tl.float32), 0)
        row += BLOCK_R
        more = tl.sum(same.to(tl.int32), 0) == BLOCK_R
    tl.store(dtable + index * columns + o_e, b_x.to(dtable.dtype.element_ty), mask=m_e & starts_run)


def gather(table: Tensor, ids: Tensor) -> Tensor:
    """Return `[T, E]` in one launch; the L2 cache serves repeated rows for less than sorting would cost."""
    check_interpreter()
    out = torch.empty((ids.shape[0], table.shape[1]), dtype=table.dtype, device=table.device)
    if out.numel():
        grid = (ids.shape[0], triton.cdiv(table.shape[1], BLOCK_E))
        gather_kernel[grid](
            table, ids, out, table.stride(0), table.shape[0], table.shape[1], BLOCK_E=BLOCK_E, num_warps=2
        )
    return out


def scatter(dout: Tensor, ids: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Return `[rows, E]`: the rows of dout summed by id, in the order of the batch."""
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
