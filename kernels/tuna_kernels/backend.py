"""Choose the implementation of an operator: Triton kernels or the plain torch reference.

Every operator takes `impl`:

| impl | on a GPU | on the CPU | on the CPU under `TRITON_INTERPRET=1` |
| --- | --- | --- | --- |
| `"auto"` | Triton if it is installed and takes the dtype, else reference | reference | reference |
| `"triton"` | Triton or an error | an error | Triton's interpreter (slow: for tests) |
| `"reference"` | reference | reference | reference |

The kernels have no forward-mode derivatives, and refuse inputs that carry some; the reference has them.
The choice of `auto` is logged once per operator, with its reason (logger `tuna_kernels`, level INFO).
"""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._guards import detect_fake_mode

Impl = Literal["auto", "triton", "reference"]
IMPLS = ("auto", "triton", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of the kernels; the reference also takes float64."""

log = logging.getLogger("tuna_kernels")
_logged: set[tuple[str, str]] = set()
"""Operators and their choices that were logged."""
# once: find_spec walks the import path
_INSTALLED = find_spec("triton") is not None


def interpreting() -> bool:
    """Return whether `TRITON_INTERPRET` tells Triton to run kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def obstacle(tensor: Tensor) -> str | None:
    """Return why the kernels cannot take `tensor`, as part of an error message; None if they can."""
    if not _INSTALLED:
        return "the package triton is not installed: install it (it comes with torch's CUDA wheels)"
    if tensor.dtype not in DTYPES:
        return (
            f"the kernels take float32, float16 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
        )
    if tensor.device.type == "cuda":
        return None
    if not interpreting():
        device = tensor.device.type
        return (
            f"the tensors are on '{device}': move them to a GPU, or set TRITON_INTERPRET=1 (slow: for tests)"
        )
    if tensor.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly (it multiplies raw bits): use float16 there"
    return None


def choose(impl: str, op: str, tensor: Tensor, *others: Tensor | None) -> bool:
    """Return whether `op` runs on Triton for inputs like `tensor`.

    Args:
        others: the other inputs that the operator has derivatives for.

    Raises:
        ValueError: `impl` is none of `IMPLS`.
        RuntimeError: `impl="triton"` cannot run; the message says what is missing. Or the kernels would run
            on inputs with forward-mode derivatives, which they don't have.
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
        _refuse_tangents(op, tensor, *others)
        return True
    use = problem is None and tensor.device.type == "cuda"
    if use:
        _refuse_tangents(op, tensor, *others)
    # a log call would break the graph that torch.compile traces
    if not torch.compiler.is_compiling():
        _log_once(
            op,
            "Triton kernels"
            if use
            else f"the torch reference, because {problem or 'the tensors are on the CPU'}",
        )
    return use


def values_known(tensor: Tensor) -> bool:
    """Return whether the values of a tensor can be read without waiting: it is on the CPU, and has some.

    Neither torch.compile nor a `FakeTensorMode` has values while it traces.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(tensor)


def is_fake(tensor: Tensor) -> bool:
    """Return whether a `FakeTensorMode` traces this tensor: shapes without values."""
    return not torch.compiler.is_compiling() and detect_fake_mode([tensor]) is not None


def _refuse_tangents(op: str, *inputs: Tensor | None) -> None:
    """Refuse inputs with forward-mode derivatives: torch takes those of an operator without any for zero."""
    if forward_ad._current_level < 0:
        return
    for tensor in inputs:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{op}: the kernels have no forward-mode derivatives (jvp, jacfwd, dual tensors): "
                "take impl='reference', which has them, or reverse mode"
            )


def _log_once(op: str, choice: str) -> None:
    if (op, choice) not in _logged:
        _logged.add((op, choice))
        log.info("%s: impl='auto' uses %s", op, choice)


def check_interpreter() -> None:
    """Refuse a `TRITON_INTERPRET` that was changed after Triton read it, which is when it is imported."""
    import triton.language as tl

    interpreted = type(tl.sum).__name__ == "InterpretedFunction"
    if interpreted != interpreting():
        setting = os.environ.get("TRITON_INTERPRET", "unset")
        raise RuntimeError(
            f"TRITON_INTERPRET is {setting} now and was not when triton was "
            "imported: set it in the environment of the process, before the first import of torch or triton"
        )


def dot_precision(dtype: torch.dtype) -> str:
    """Return the precision of `tl.dot`: "ieee", or "tf32" for float32 where torch's own setting allows it."""
    tf32 = dtype == torch.float32 and getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") == "tf32"
    return "tf32" if tf32 else "ieee"
