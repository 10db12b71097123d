"""`gather_tags`: its checks, the choice of its implementation, and its registration with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import choose, values_known
from . import reference


def gather_tags(table: Tensor, ids: Tensor, *, impl: str = "auto") -> Tensor:
    """Return the embeddings of a batch's tags, `table[ids]`; the backward gives the same bits every run.

    The table may lie on another device than the ids (a vocabulary of millions in host memory, ids on the
    GPU). Then each distinct id is copied once, and the call waits for the device.

    Args:
        table: `[V, E]`. Its gradient is dense, `[V, E]`.
        ids: int32 or int64 `[T]`, rows of the table. A negative id is a tag without an embedding: zeros, and
            no gradient. An id of V or more is an error on the CPU, and a row of NaN on a GPU, where a check
            would wait.
        impl: "auto", "triton" or "reference"; see `tuna_kernels.backend`.

    Returns:
        `[T, E]` in the dtype of the table, on the device of the ids.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        IndexError: an id of V or more, on the CPU.
        RuntimeError: `impl="triton"` cannot run; the message says why.
    """
    if table.ndim != 2 or ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"gather_tags: expected table [V, E] and int32 or int64 ids [T], "
            f"got {list(table.shape)} and {ids.dtype} {list(ids.shape)}"
        )
    if values_known(ids) and ids.numel() and int(ids.max()) >= table.shape[0]:
        raise IndexError(f"gather_tags: id {int(ids.max())} is beyond the table's {table.shape[0]} rows")
    if table.device != ids.device:
        distinct, ids = torch.unique(ids, return_inverse=True)
        table = reference.gather_tags(table, distinct.to(table.device)).to(ids.device)
    if not choose(impl, "gather_tags", table):
        return reference.gather_tags(table, ids)
    table = table if table.stride(-1) == 1 else table.contiguous()
    return torch.ops.tuna_kernels.gather_tags_forward(table, ids.contiguous())  # type: ignore[no-any-return]


@torch.library.custom_op("tuna_kernels::gather_tags_forward", mutates_args=())
def _forward(table: Tensor, ids: Tensor) -> Tensor:
    from .kernels import gather

    with torch.cuda.device_of(ids):
        return gather(table, ids)


@_forward.register_fake
def _(table: Tensor, ids: Tensor) -> Tensor:
    return table.new_empty((ids.shape[0], table.shape[1]))


@torch.library.custom_op("tuna_kernels::gather_tags_backward", mutates_args=())
def _backward(dout: Tensor, ids: Tensor, rows: int) -> Tensor:
    from .kernels import scatter

    with torch.cuda.device_of(ids):
        return scatter(dout, ids, rows, dout.dtype)


@_backward.register_fake
def _(dout: Tensor, ids: Tensor, rows: int) -> Tensor:
    return dout.new_empty((rows, dout.shape[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, ids = inputs
    ctx.save_for_backward(ids)
    ctx.rows = table.shape[0]


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    (ids,) = ctx.saved_tensors
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    return torch.ops.tuna_kernels.gather_tags_backward(dout, ids, ctx.rows), None


_forward.register_autograd(_gradients, setup_context=_setup)
