"""Which implementation runs: Triton kernels or the plain torch reference. Nothing here falls back without saying so.

`impl` of every operator of this package:

| impl | on a GPU | on the CPU | on the CPU under `TRITON_INTERPRET=1` |
| --- | --- | --- | --- |
| `"auto"` | Triton if it is installed and takes the dtype, else reference | reference | reference |
| `"triton"` | Triton or an error | an error | Triton's interpreter (slow: for tests) |
| `"reference"` | reference | reference | reference |

What `auto` chose is logged once for each operator, choice and reason (logger `tuna_kernels`, level INFO).
"""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "reference"]
IMPLS = ("auto", "triton", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels take; float64 goes through the reference."""

log = logging.getLogger("tuna_kernels")
_said: set[tuple[str, str]] = set()
# asked once: find_spec walks the import path
_INSTALLED = find_spec("triton") is not None


def interpreting() -> bool:
    """Whether `TRITON_INTERPRET` asks for kernels to run on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def obstacle(tensor: Tensor) -> str | None:
    """What keeps the kernels from taking `tensor`, as a sentence for the person who asked; None if nothing does."""
    if not _INSTALLED:
        return "the package triton is not installed: install it (it comes with torch's CUDA wheels)"
    if tensor.dtype not in DTYPES:
        return (
            f"the kernels take float32, float16 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
        )
    if tensor.device.type == "cuda":
        return None
    if not interpreting():
        return f"the tensors are on '{tensor.device.type}': move them to a GPU, or set TRITON_INTERPRET=1 (slow: for tests)"
    if tensor.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly (products of raw bits, truncated casts): use float16 there"
    return None


def choose(impl: str, op: str, tensor: Tensor) -> bool:
    """Whether `op` runs on Triton for inputs like `tensor`.

    Raises:
        ValueError: `impl` is none of `IMPLS`.
        RuntimeError: `impl="triton"` cannot be had; the message says what is missing.
    """
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "reference":
        return False
    problem = obstacle(tensor)
    if impl == "triton":
        if problem is not None:
            raise RuntimeError(
                f"{op}: impl='triton' was asked for, but {problem}; impl='reference' runs anywhere"
            )
        return True
    use = problem is None and tensor.device.type == "cuda"
    # a log call would break the graph that torch.compile traces
    if not torch.compiler.is_compiling():
        _say(
            op,
            "Triton kernels"
            if use
            else f"the torch reference, because {problem or 'the tensors are on the CPU'}",
        )
    return use


def _say(op: str, choice: str) -> None:
    if (op, choice) not in _said:
        _said.add((op, choice))
        log.info("%s: impl='auto' uses %s", op, choice)


def check_interpreter() -> None:
    """Refuse a half-set interpreter: Triton decides when it is imported, not when a kernel runs."""
    import triton.language as tl

    interpreted = type(tl.sum).__name__ == "InterpretedFunction"
    if interpreted != interpreting():
        raise RuntimeError(
            f"TRITON_INTERPRET is {os.environ.get('TRITON_INTERPRET', 'unset')} now and was not when triton was imported: "
            "set it in the environment of the process, before the first import of torch or triton"
        )


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 matrix products are computed: exactly, unless torch itself was told that TF32 is good enough."""
    tf32 = dtype == torch.float32 and getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") == "tf32"
    return "tf32" if tf32 else "ieee"
