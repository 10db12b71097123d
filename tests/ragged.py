"""Ragged inputs and the error rule for the kernel tests. Importing this decides whether Triton interprets: import it first.

Without a GPU the kernels run in Triton's interpreter on the CPU; with one they run there, unless TRITON_INTERPRET=1 says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
import triton  # noqa: F401  (it reads the variable when it is imported)

from tuna_kernels.backend import interpreting

DEVICE = "cpu" if interpreting() else "cuda"
EXHAUSTIVE = os.environ.get("TUNA_KERNELS_EXHAUSTIVE") == "1"
"""The whole matrix of shapes: `TUNA_KERNELS_EXHAUSTIVE=1 pytest -n 2 tests/test_kernels_attention.py -k matrix`."""


@dataclass(frozen=True)
class Case:
    """One shape of `tag_attention`."""

    counts: tuple[int, ...]
    patches: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype = torch.float32
    flags: str = "wbm"
    """w: weights, b: bias shared by the heads, B: bias of each head, m: patch mask whose last image sees nothing."""

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{'-'.join(map(str, self.counts))}xP{self.patches}xH{self.heads}/{self.kv_heads}xD{self.dim}-{name}-{self.flags}"


def offsets(counts: Sequence[int], device: str = DEVICE) -> Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0).int()


def inputs(
    case: Case, seed: int = 0, device: str = DEVICE
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """`(what has gradients, what has none, dout)`; drawn in float32 on the CPU, so that all dtypes and devices see the same."""
    generator = torch.Generator().manual_seed(seed)
    total, batch = sum(case.counts), len(case.counts)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=case.dtype)

    grads = {
        "q": draw(total, case.heads, case.dim),
        "k": draw(batch, case.patches, case.kv_heads, case.dim),
        "v": draw(batch, case.patches, case.kv_heads, case.dim),
    }
    rest: dict[str, Any] = {"cu_tags": offsets(case.counts, device)}
    if "w" in case.flags:
        grads["weights"] = draw(total).abs()
    if "b" in case.flags.lower():
        grads["bias"] = draw(total, case.heads if "B" in case.flags else 1, case.patches)
    if "m" in case.flags:
        rest["patch_mask"] = (torch.rand(batch, case.patches, generator=generator) > 0.3).to(device)
        rest["patch_mask"][-1] = False
    return grads, rest, draw(total, case.heads, case.dim)


def with_gradients(
    op: Callable[..., Tensor], grads: dict[str, Tensor], rest: dict[str, Any], dout: Tensor
) -> dict[str, Tensor]:
    """The result of `op` and its gradient by every input in `grads`, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in grads.items()}
    out = op(**leaves, **rest)
    found = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(leaves, found, strict=True)}}


def in_float64(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in values.items()
    }


def assert_errs_at_most_twice(
    kernel: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """The rule for kernels: against float64, at most twice the error of plain torch in the same dtype, in mean square and at worst.

    Half a unit in the last place is allowed on top in mean square: where plain torch happens to be exact, twice nothing is nothing.
    At worst it is a whole unit of the largest value: for a tag that looks at one patch alone, the gradient of the logits is a
    difference of two nearly equal numbers, which plain torch computes from the same roundings and a kernel that keeps no
    attention (delta = dout . out) does not.
    """
    assert kernel.keys() == plain.keys() == exact.keys()
    for name, got in kernel.items():
        want = exact[name]
        assert got.dtype == plain[name].dtype, name
        assert got.shape == want.shape, name
        if not got.numel():
            continue
        assert got.isfinite().all(), f"{name} is not finite"
        eps = torch.finfo(got.dtype).eps
        error, allowed = (got.double() - want).abs(), (plain[name].double() - want).abs()
        for how, units, size in (
            ("mean square", 0.5, lambda x: x.square().mean().sqrt()),
            ("worst", 1, lambda x: x.max()),
        ):
            assert size(error) <= 2 * size(allowed) + units * eps * size(want.abs()), (
                f"{name}: {how} error {size(error):.3g}, plain torch errs {size(allowed):.3g}, values {size(want.abs()):.3g}"
            )
