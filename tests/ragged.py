"""Ragged inputs for the kernel tests. Import this before Triton: without a GPU it sets `TRITON_INTERPRET`.

With a GPU the kernels run there, unless `TRITON_INTERPRET=1` sends them to Triton's interpreter on the CPU.
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
"""Test every shape: `TUNA_KERNELS_EXHAUSTIVE=1 pytest -n 2 tests/test_kernels_attention.py -k matrix`."""


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
    """w: weights, b: one bias for all heads, B: a bias per head, m: patch mask that hides the last image."""

    def __str__(self) -> str:
        counts, dtype = "-".join(map(str, self.counts)), str(self.dtype).removeprefix("torch.")
        return f"{counts}xP{self.patches}xH{self.heads}/{self.kv_heads}xD{self.dim}-{dtype}-{self.flags}"


def offsets(counts: Sequence[int], device: str = DEVICE) -> Tensor:
    return torch.tensor([0, *counts], device=device).cumsum(0).int()


def inputs(
    case: Case, seed: int = 0, device: str = DEVICE
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """Return `(inputs with gradients, other inputs, dout)`; the same numbers for every dtype and device."""
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
    """Return the result of `op` as "out", and its gradients by the inputs x in `grads` as "dx"."""
    leaves = {name: x.detach().requires_grad_() for name, x in grads.items()}
    out = op(**leaves, **rest)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {
        "out": out.detach(),
        **{f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)},
    }


def dtypes(results: dict[str, Tensor]) -> dict[str, torch.dtype]:
    return {name: x.dtype for name, x in results.items()}


def in_float64(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in values.items()
    }
