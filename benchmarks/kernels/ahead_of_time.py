"""Compile every kernel variant without a GPU, and print its registers, shared memory and spills.

    python -m benchmarks.kernels.ahead_of_time                 # the whole table, for sm_80, sm_90 and sm_100
    python -m benchmarks.kernels.ahead_of_time --arch 90 --only backward
    python -m benchmarks.kernels.ahead_of_time --candidates    # block sizes that the search on a GPU tries
    python -m benchmarks.kernels.ahead_of_time --markdown > table.md

A kernel that compiles here for an H100 compiles there: the compiler is the same, and it never looks at the
device. Registers and spills are read from the machine code with the disassembler in Triton's wheel. Exits
with 1 if a variant spills more than its limit.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHES = (80, 90, 100)

COUPLINGS = ("multiply_max", "multiply", "log_bias", "drop")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Variant:
    """One kernel with everything that is fixed at compile time."""

    kernel: str
    dtype: str
    dim: int
    flags: frozenset[str] = frozenset()
    group: int = 1
    rows: int = 15
    """Queries of an average (image, key/value head): decides the default blocks."""
    block: tuple[int, int, int, int] | None = None
    """(block_m, block_n, warps, stages); the default of the kernel if None."""

    @property
    def spill_limit(self) -> int:
        """Bytes of stack that the variant may use.

        16, because ptxas may park a few values outside of the loops to reach the next step of occupancy.
        Float32 beyond D = 128 uses more: exact products without tensor cores hold whole rows of both operands
        in registers. That is correct and slow, and nobody trains in it.
        """
        wide = self.dim > 128 and self.kernel in ("forward", "maps", "backward", "dbias")
        return 512 if self.dtype == "fp32" and wide else 16

    def __str__(self) -> str:
        return (
            f"{self.kernel} {self.dtype} D{self.dim} G{self.group} {'+'.join(sorted(self.flags)) or 'plain'}"
        )


@dataclass
class Result:
    """What the compiler made of a variant for one architecture."""

    variant: Variant
    arch: int
    config: str = ""
    registers: int = 0
    stack: int = 0
    shared: int = 0
    spills: int = 0
    """LDL and STL instructions in the machine code."""
    products: dict[str, int] = field(default_factory=dict)
    """Tensor core instructions by name."""

    @property
    def row(self) -> tuple[str, ...]:
        products = " ".join(f"{name} x{count}" for name, count in self.products.items()) or "FMA"
        v = self.variant
        flags = "+".join(sorted(v.flags)) or "-"
        numbers = (str(self.registers), str(self.shared), str(self.stack), str(self.spills))
        return (
            f"sm_{self.arch}",
            v.kernel,
            v.dtype,
            str(v.dim),
            str(v.group),
            flags,
            self.config,
            *numbers,
            products,
        )


HEADINGS = (
    "arch",
    "kernel",
    "dtype",
    "D",
    "G",
    "flags",
    "blocks",
    "registers",
    "shared B",
    "stack B",
    "LDL+STL",
    "products",
)


def variants(every: bool = True) -> list[Variant]:
    """All variants, or (`every=False`) one of each kernel and of each dtype, for a quick check."""
    full = frozenset({"weights", "bias", "mask"})
    found = []
    attention = ("forward", "backward")
    ones = frozenset({"ones"})
    found += [Variant(kernel, "bf16", 64, full | ones) for kernel in (*attention, "maps", "dbias")]
    found += [Variant(kernel, "bf16", 768, ones) for kernel in ("gather", "scatter")]
    found += [
        Variant("weights", "bf16", 768, ones | {"drop"}),
        Variant("weights_backward", "bf16", 768, ones | {"log_bias", "temperature"}),
    ]
    if every:
        for kernel in attention:
            for dtype in ("bf16", "fp16"):
                found += [
                    Variant(kernel, dtype, dim, flags)
                    for dim in (24, 64, 80, 128, 256)
                    for flags in (frozenset(), full)
                ]
            found += [Variant(kernel, "fp32", dim, full) for dim in (24, 64, 128, 256)]
            found += [
                Variant(kernel, "bf16", dim, frozenset({"weights"}), group=4, rows=60) for dim in (64, 128)
            ]
        found += [
            Variant(kernel, dtype, dim, full)
            for kernel in ("maps", "dbias")
            for dtype in ("bf16", "fp32")
            for dim in (64, 128, 256)
        ]
        for dtype in ("bf16", "fp32"):
            found += [Variant("weights", dtype, 768, frozenset({coupling})) for coupling in COUPLINGS]
            found += [
                Variant("weights_backward", dtype, 768, frozenset({coupling, "temperature"}))
                for coupling in COUPLINGS
            ]
            found += [
                Variant("weights_backward", dtype, 768, frozenset({"multiply", "scores", "temperature"}))
            ]
            found += [Variant(kernel, dtype, 768) for kernel in ("gather", "scatter")]
    else:
        found += [
            Variant("weights", "bf16", 768, frozenset({"multiply"})),
            Variant("gather", "bf16", 768),
            Variant("scatter", "bf16", 768),
        ]
        found += [Variant("weights_backward", "bf16", 768, frozenset({"multiply_max", "temperature"}))]
        for kernel in attention:
            found += [Variant(kernel, "bf16", dim, full) for dim in (64, 128, 256)] + [
                Variant(kernel, "fp32", 64, full)
            ]
        found += [Variant(kernel, "bf16", 64, full) for kernel in ("maps", "dbias")]
    return found


def candidates() -> list[Variant]:
    """What the search on a GPU tries. Spills are its own affair: the clock decides."""
    import torch

    from tuna_kernels.tag_attention import tuning

    search = {"forward": tuning.forward_candidates, "backward": tuning.backward_candidates}
    return [
        Variant(kernel, "bf16", dim, frozenset({"weights"}), block=(c.block_m, c.block_n, c.warps, c.stages))
        for kernel, found in search.items()
        for dim in (64, 128, 256)
        for c in found(dim, torch.bfloat16, 15, False)
    ]


def _kernel(variant: Variant) -> tuple[Any, dict[str, Any], tuple[int, int, int, int]]:
    """The function, its compile-time constants, and (block_m, block_n, warps, stages)."""
    import torch

    from tuna_kernels.gather_tags import kernels as gather
    from tuna_kernels.tag_attention import backward, forward, tuning
    from tuna_kernels.tag_weights import kernels as weights

    flags = variant.flags
    if variant.kernel in ("gather", "scatter"):
        block = (gather.BLOCK_R, gather.BLOCK_E, 2, 3)
        return getattr(gather, f"{variant.kernel}_kernel"), {"BLOCK_R": block[0], "BLOCK_E": block[1]}, block
    if variant.kernel.startswith("weights"):
        block = (weights.BLOCK_T, weights.BLOCK_E, 4, 3)
        constants = {
            "BLOCK_T": block[0], "BLOCK_E": block[1], "COUPLING": next(c for c in COUPLINGS if c in flags),
            "HAS_SCORES": "scores" in flags, "HAS_TEMPERATURE": "temperature" in flags,
            "NEED_TAGS": "scores" not in flags, "NEED_IMAGES": "scores" not in flags,
        }  # fmt: skip
        return getattr(weights, f"{variant.kernel}_kernel"), constants, block

    dtype = getattr(torch, _DTYPES[variant.dtype])
    functions = {
        "forward": (forward.forward_kernel, tuning.forward_default),
        "maps": (forward.maps_kernel, tuning.forward_default),
        "backward": (backward.backward_kernel, tuning.backward_default),
        "dbias": (backward.dbias_kernel, lambda dim, dtype, rows, bias: tuning.bias_default(dim, dtype)),
    }
    function, default = functions[variant.kernel]
    config = default(variant.dim, dtype, variant.rows, "bias" in flags)
    block = variant.block or (config.block_m, config.block_n, config.warps, config.stages)
    constants = {
        "D": variant.dim, "G": variant.group, "PRECISION": "ieee", "BLOCK_M": block[0], "BLOCK_N": block[1],
        "BLOCK_D": max(16, 1 << (variant.dim - 1).bit_length()),
        **{f"HAS_{flag.upper()}": flag in flags for flag in ("weights", "bias", "mask")},
    }  # fmt: skip
    return function, constants, block


_POINTERS = {
    "cu_tags": "*i32", "mask": "*i1", "ids": "*i64", "order": "*i64",
    **dict.fromkeys(
        ("stats", "weights", "dweights", "cosine", "tag_norm", "image_norm", "temperature", "dtemperature",
         "grad"),
        "*fp32",
    ),
}  # fmt: skip
_FLOATS = ("scale", "tau", "threshold")
_INTEGERS = (
    "total",
    "patches",
    "kv_heads",
    "heads",
    "groups",
    "blocks",
    "batch",
    "patches_each",
    "rows",
    "columns",
)


def _absent(name: str, variant: Variant) -> bool:
    """Whether a pointer argument is None in this variant."""
    if variant.kernel.startswith("weights"):
        if name in ("tags", "images", "dtags", "dimages"):
            return "scores" in variant.flags
        return (
            name.removeprefix("d") in ("scores", "temperature")
            and name.removeprefix("d") not in variant.flags
        )
    return (
        name.removeprefix("d") in ("weights", "bias", "mask") and name.removeprefix("d") not in variant.flags
    )


def _signature(
    function: Any, constants: dict[str, Any], variant: Variant
) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Argument types of a launch with aligned tensors; absent pointers and unit strides are constants."""
    signature: dict[str, str] = {}
    fixed: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], fixed[name] = "constexpr", constants[name]
        elif _absent(name, variant):
            signature[name], fixed[name] = "constexpr", None
        elif name in ("stride_bp", "stride_mp"):
            signature[name], fixed[name] = "constexpr", 1
        elif name in _FLOATS:
            signature[name] = "fp32"
        elif name in _INTEGERS and "ones" in variant.flags:
            # what Triton makes of an integer argument that is 1
            signature[name], fixed[name] = "constexpr", 1
        elif name in _INTEGERS:
            signature[name] = "i32"
        elif name.startswith("stride_"):
            signature[name] = "i32"
            attributes[(i,)] = [["tt.divisibility", 8 if variant.dim % 16 else 16]]
        else:
            signature[name] = _POINTERS.get(name, f"*{variant.dtype}")
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, fixed, attributes


def compile_variant(variant: Variant, arch: int) -> Result:
    """Compile one variant for one architecture and read its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, constants, block = _kernel(variant)
    signature, fixed, attributes = _signature(function, constants, variant)
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": block[2], "num_stages": block[3]}
    )
    result = Result(
        variant,
        arch,
        config=f"{block[0]}x{block[1]} w{block[2]} s{block[3]}",
        shared=compiled.metadata.shared,
    )
    _read_machine_code(compiled.asm["cubin"], result)
    return result


def _read_machine_code(cubin: bytes, result: Result) -> None:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run(
            [tool, "--dump-sass", str(path)], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no resource usage in the output of {tool}: {usage!r}")
    result.registers, result.stack = int(found[1]), int(found[2])
    result.spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    for name in ("HGMMA", "UTCHMMA", "HMMA"):
        if count := len(re.findall(rf"\b{name}\b", code)):
            result.products[name] = count


def compile_all(todo: list[tuple[Variant, int]], workers: int) -> list[Result]:
    """Compile in parallel processes; the results are in the order of `todo`."""
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError(
            "TRITON_INTERPRET is set: kernels would be interpreted, not compiled. Unset it for this script."
        )
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(compile_variant, *zip(*todo, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch",
        type=int,
        action="append",
        choices=ARCHES,
        help="compute capability times ten; may be repeated",
    )
    parser.add_argument("--only", default="", help="a part of a variant's name, such as 'backward bf16'")
    parser.add_argument("--quick", action="store_true", help="one variant of each kernel and dtype")
    parser.add_argument(
        "--candidates", action="store_true", help="what the search on a GPU tries, instead of the defaults"
    )
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()

    import torch
    import triton

    chosen = [
        v
        for v in (candidates() if options.candidates else variants(not options.quick))
        if options.only in str(v)
    ]
    if not chosen:
        parser.error(f"no variant's name holds {options.only!r}")
    results = compile_all([(v, arch) for arch in options.arch or ARCHES for v in chosen], options.workers)
    rows = [HEADINGS, *(r.row for r in results)]
    print(f"torch {torch.__version__}, triton {triton.__version__}\n")
    if options.markdown:
        rows.insert(1, tuple("---" for _ in HEADINGS))
        print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    else:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print(
            "\n".join(
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                for row in rows
            )
        )
    spilled = [r for r in results if not options.candidates and r.stack > r.variant.spill_limit]
    for r in spilled:
        print(
            f"spills: {r.variant} on sm_{r.arch}: {r.stack} bytes of stack, limit {r.variant.spill_limit}",
            file=sys.stderr,
        )
    return 1 if spilled else 0


if __name__ == "__main__":
    raise SystemExit(main())
