"""The kernels on a GPU: correctness, determinism, and speed beside other implementations.

    python -m benchmarks.kernels.speed               # everything; writes results/kernels-DEVICE-DATE.md
    python -m benchmarks.kernels.speed --check       # only: correct, and the same bits in 100 runs
    python -m benchmarks.kernels.speed --dry-run     # every step on tiny sizes, on the CPU;
                                                     # with TRITON_INTERPRET=1 the kernels too
    python -m benchmarks.kernels.speed --roofline    # only the counts; needs no GPU
    compute-sanitizer --tool memcheck python -m benchmarks.kernels.speed --check --small
    PYTHONPATH=kernels python -m benchmarks.kernels.speed      # from a checkout that is not installed
    ncu --set full -k regex:'forward_kernel|backward_kernel' -o kernels \\
        python -m benchmarks.kernels.speed --profile

All contenders are checked against float64 before any is timed. Times are medians on the device with a cold L2
cache. Each contender is captured in a CUDA graph where possible, so that none waits for Python ("eager" marks
the others). Padded contenders get queries that are padded beforehand, FlexAttention its block mask: only our
side pays for its ragged layout. Images have 40 x Beta(1.5, 2.5) tags: 15 on average, at most 40.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tuna_kernels import gather_tags, tag_attention, tag_weights
from tuna_kernels.backend import interpreting
from tuna_kernels.tag_attention import reference

RESULTS = Path(__file__).parent.parent / "results"
Step = Callable[[], Any]


@dataclass
class Problem:
    """One batch: what the contenders get."""

    counts: list[int]
    patches: int
    heads: int
    dim: int
    dtype: torch.dtype
    device: str

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            if self.device == "meta":
                return torch.empty(shape, device="meta", dtype=self.dtype)
            return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

        total, batch, most = sum(self.counts), len(self.counts), max(self.counts)
        self.cu = torch.tensor([0, *self.counts]).cumsum(0).int().to(self.device)
        self.q, self.dout = draw(total, self.heads, self.dim), draw(total, self.heads, self.dim)
        self.k, self.v = (
            draw(batch, self.patches, self.heads, self.dim),
            draw(batch, self.patches, self.heads, self.dim),
        )
        self.where = reference.slots(self.cu, total)
        self.most = most

    def pad(self, x: Tensor) -> Tensor:
        """`[T, H, D]` to `[B, H, most, D]`."""
        padded = x.new_zeros(len(self.counts), self.most, self.heads, self.dim)
        return padded.index_put(self.where, x).transpose(1, 2).contiguous()

    def unpad(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)[self.where]

    @property
    def bytes(self) -> tuple[int, int]:
        """What must move at least: forward, backward."""
        total, element = sum(self.counts), self.q.element_size()
        tags, patches = total * self.heads * self.dim * element, self.k.numel() * element
        stats = 2 * total * self.heads * 4
        return 2 * patches + 2 * tags + stats, 4 * patches + 4 * tags + stats

    @property
    def flops(self) -> tuple[int, int]:
        products = 2 * sum(self.counts) * self.patches * self.heads * self.dim
        return 2 * products, 5 * products


@dataclass
class Contender:
    """`run(q, k, v)` on leaves in its own layout; `out` brings its result back to `[T, H, D]`."""

    name: str
    leaves: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    dout: Tensor
    out: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.run(*self.leaves)

    def both(self) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in self.leaves]
        return torch.autograd.grad(self.run(*leaves), leaves, self.dout)


def contenders(p: Problem, skip: set[str], dry: bool) -> Iterator[Contender]:
    """All that can be had here. One that fails to build or run is reported by the caller, not hidden."""
    impl = "reference" if p.device == "cpu" and not interpreting() else "triton"
    yield Contender(
        f"tag_attention ({impl})",
        (p.q, p.k, p.v),
        lambda q, k, v: tag_attention(q, k, v, p.cu, impl=impl),
        p.dout,
    )

    padded, keys, values = p.pad(p.q), p.k.transpose(1, 2), p.v.transpose(1, 2)
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ):

        def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        yield Contender(
            f"padded SDPA {backend.name.split('_')[0].lower()}",
            (padded, keys, values),
            sdpa,
            p.pad(p.dout),
            p.unpad,
        )

    flat = [x.flatten(0, 1) for x in (p.k, p.v)]
    cu_k = torch.arange(0, len(p.counts) + 1, dtype=torch.int32, device=p.device) * p.patches
    try:
        from torch.nn.attention.varlen import varlen_attn

        yield Contender(
            "torch varlen_attn",
            (p.q, *flat),
            lambda q, k, v: varlen_attn(q, k, v, p.cu, cu_k, p.most, p.patches),
            p.dout,
        )
    except ImportError:
        print("  torch varlen_attn: not in this torch")
    try:
        from flash_attn import flash_attn_varlen_func

        yield Contender(
            "flash-attn varlen",
            (p.q, *flat),
            lambda q, k, v: flash_attn_varlen_func(q, k, v, p.cu, cu_k, p.most, p.patches),
            p.dout,
        )
    except ImportError:
        print("  flash-attn varlen: not installed")

    if "flex" not in skip:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        image_of_tag = p.where[0]

        def same_image(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return image_of_tag[q] == k // p.patches

        mask = create_block_mask(same_image, None, None, p.q.shape[0], flat[0].shape[0], device=p.device)
        flex = flex_attention if dry else torch.compile(flex_attention, dynamic=False)
        packed = tuple(x.transpose(0, 1)[None] for x in (p.q, *flat))
        yield Contender(
            "FlexAttention, block mask", packed, lambda q, k, v: flex(q, k, v, block_mask=mask),
            p.dout.transpose(0, 1)[None],
            lambda x: x[0].transpose(0, 1),
        )  # fmt: skip
    if "compile" not in skip:

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return reference.tag_attention(q, k, v, p.cu, scale=p.dim**-0.5, max_tags=p.most)[0]

        compiled = torch.compile(plain, dynamic=False, backend="aot_eager" if dry else "inductor")
        yield Contender("torch.compile of the reference", (p.q, p.k, p.v), compiled, p.dout)


# ---- right, and always the same


def gradients(
    p: Problem, extras: dict[str, Tensor], mask: Tensor | None, impl: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and every gradient, computed in `dtype`."""
    leaves = {
        name: x.to(dtype).requires_grad_() for name, x in {"q": p.q, "k": p.k, "v": p.v, **extras}.items()
    }
    out = tag_attention(cu_tags=p.cu, patch_mask=mask, impl=impl, **leaves)  # type: ignore[call-overload]
    found = torch.autograd.grad(out, list(leaves.values()), p.dout.to(dtype))
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(leaves, found, strict=True)}}


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want).norm() / want.norm())


def check(device: str, dry: bool, small: bool) -> list[str]:
    """Check kernel errors against twice plain torch's for every dtype, and the bits of 100 runs."""
    impl = "triton" if device == "cuda" or interpreting() else "reference"
    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if device == "cuda" else [])
    rows = [
        "| dtype | H x D | with | what | kernel's error | plain torch's | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    shapes = [(2, 16)] if dry else [(16, 64), (8, 128), (4, 80)]
    counts = [3, 0, 5] if dry else [15, 0, 40, 1, 16, 17]
    patches = 33 if dry or small else 576
    for dtype, (heads, dim), full in product(dtypes, shapes, (False, True)):
        p = Problem(counts, patches, heads, dim, dtype, device)
        extras: dict[str, Tensor] = {}
        mask = None
        if full:
            extras["weights"] = torch.rand(sum(counts), device=device).to(dtype)
            extras["bias"] = torch.randn(sum(counts), 1, patches, device=device).to(dtype)
            mask = torch.rand(len(counts), patches, device=device) > 0.3
        want = gradients(p, extras, mask, "reference", torch.float64)
        ours, plain = (gradients(p, extras, mask, who, dtype) for who in (impl, "reference"))
        for what in want:
            e, allowed = error(ours[what], want[what]), error(plain[what], want[what])
            name, extra = str(dtype).removeprefix("torch."), "weights, bias, mask" if full else "-"
            rows.append(
                f"| {name} | {heads} x {dim} | {extra} | {what} | {e:.2e} | {allowed:.2e} | "
                f"{e / allowed:.2f} |"
            )
            assert e <= 2 * allowed + torch.finfo(dtype).eps / 2, rows[-1]
    p = Problem(counts, patches, *shapes[0], dtypes[-1], device)
    runs = 3 if dry or small else 100
    ours_again = next(contenders(p, set(), dry))
    first = ours_again.both()
    same = all(
        all(torch.equal(x, y) for x, y in zip(first, ours_again.both(), strict=True)) for _ in range(runs - 1)
    )
    assert same, f"the gradients of {runs} runs on the same inputs differ"
    for name, ours_step, plain_step in small_operators(device, dry or small):
        for got, right in zip(ours_step(), plain_step(), strict=True):
            assert error(got, right.double()) < 1e-4, f"{name} and plain torch differ"
    return [
        *rows,
        "",
        f"Gradients of {runs} runs on the same inputs: the same bits. "
        "tag_weights and gather_tags agree with plain torch.",
    ]


# ---- time


def timed(step: Step, device: str) -> tuple[float, float, str]:
    """`(median, interquartile range, how)` in microseconds."""
    if device == "cpu":
        times = []
        for _ in range(3):
            start = time.perf_counter()
            step()
            times.append(1e6 * (time.perf_counter() - start))
        return statistics.median(times), max(times) - min(times), "CPU"
    from triton.testing import do_bench

    run, how = step, "graph"
    try:
        run = captured(step)
    except Exception as problem:  # noqa: BLE001 - whatever keeps a contender out of a graph, it is timed without one and marked
        torch.cuda.synchronize()
        print(f"    not in a CUDA graph ({type(problem).__name__}): timed eagerly")
        how = "eager"
    low, median, high = do_bench(run, warmup=25, rep=150, quantiles=[0.25, 0.5, 0.75])
    return 1e3 * median, 1e3 * (high - low), how


def captured(step: Step) -> Step:
    """`step` as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def roofs(device: str) -> tuple[float, float]:
    """Measured bytes/s of a large copy, and FLOP/s of a large bf16 product."""
    if device == "cpu":
        return 1e10, 1e11
    from triton.testing import do_bench

    x = torch.empty(2**30, dtype=torch.int32, device=device).random_()
    y = torch.empty_like(x)
    copy = 2 * x.numel() * 4 / (1e-3 * do_bench(lambda: y.copy_(x), return_mode="median"))
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / (1e-3 * do_bench(lambda: a @ b, return_mode="median"))
    return copy, product


def ragged(batch: int) -> list[int]:
    draw = random.Random(batch)
    return [15] if batch == 1 else [round(40 * draw.betavariate(1.5, 2.5)) for _ in range(batch)]


def race(device: str, dry: bool, skip: set[str], until: float, bandwidth: float) -> list[str]:
    """Everybody, forward and forward + backward."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    lines = []
    for heads, dim in [(2, 16)] if dry else [(16, 64), (8, 128)]:
        for batch in (1, 2) if dry else (1, 8, 64, 256):
            p = Problem(
                ragged(batch) if not dry else [3, 5][:batch], 33 if dry else 576, heads, dim, dtype, device
            )
            want = gradients(p, {}, None, "reference", torch.float64)["out"] if batch <= 64 else None
            print(f"B {batch}, H x D {heads} x {dim}, T {sum(p.counts)}", flush=True)
            rows = []
            # late in the budget, leave out those that compile for minutes
            late = {"flex", "compile"} if time.monotonic() > until else set()
            for contender in contenders(p, skip | late, dry):
                try:
                    got = contender.out(contender.forward())
                    off = error(got, want) if want is not None else 0.0
                    contender.both()
                except Exception as problem:  # noqa: BLE001 - a contender that cannot run here is listed with its reason
                    reason = str(problem).strip().splitlines()
                    rows.append(
                        (
                            contender.name,
                            None,
                            None,
                            f"{type(problem).__name__}: {reason[0][:80] if reason else ''}",
                        )
                    )
                    continue
                if off > 0.02:
                    rows.append((contender.name, None, None, f"wrong: relative error {off:.2g}, not timed"))
                    continue
                forward, both = timed(contender.forward, device), timed(contender.both, device)
                rows.append((contender.name, forward, both, f"{off:.1e}" if want is not None else "-"))
                print(f"  {contender.name}: {forward[0]:.1f} us, {both[0]:.1f} us", flush=True)
            rows += [(name, None, None, "left out: time budget") for name in sorted(late - skip)]
            lines += report(p, rows, bandwidth)
    return lines


def report(p: Problem, rows: list[tuple[str, Any, Any, str]], bandwidth: float) -> list[str]:
    move, work = p.bytes, p.flops
    ours = rows[0]
    lines = [
        "",
        f"### B {len(p.counts)}, H x D {p.heads} x {p.dim}, P {p.patches}, T {sum(p.counts)} "
        f"(at most {p.most} an image)", "",
        f"Least bytes: forward {move[0] / 1e6:.2f} MB, backward {move[1] / 1e6:.2f} MB; "
        f"FLOP {work[0] / 1e9:.2f} and {work[1] / 1e9:.2f} G.", "",
        "| | forward us (iqr) | forward + backward us (iqr) | ours is faster by, forward | both | how | "
        "relative error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, forward, both, note in rows:
        if forward is None or ours[1] is None:
            lines.append(f"| {name} | - | - | - | - | - | {note} |")
            continue
        lines.append(
            f"| {name} | {forward[0]:.1f} ({forward[1]:.1f}) | {both[0]:.1f} ({both[1]:.1f}) | "
            f"{forward[0] / ours[1][0]:.2f} | "
            f"{both[0] / ours[2][0]:.2f} | {forward[2]}/{both[2]} | {note} |"
        )
    others = [row for row in rows[1:] if row[1] is not None]
    if ours[1] is not None and others:
        best = min(row[2][0] for row in others) / ours[2][0]
        share = move[0] / (1e-6 * ours[1][0]) / bandwidth
        lines += [
            "",
            f"Over the best other: forward + backward {best:.2f}x. "
            f"Forward moves its least bytes at {100 * share:.0f} % of a copy's rate.",
        ]
    return lines


def latency(device: str, dry: bool) -> list[str]:
    """The whole tag path at small batches, in a CUDA graph with warm caches, as a server runs it."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    heads, dim, patches, columns = (2, 16, 33, 32) if dry else (16, 64, 576, 768)
    impl = "reference" if device == "cpu" and not interpreting() else "triton"
    lines = ["| B | weights us | attention us | both us (one graph) |", "| --- | --- | --- | --- |"]
    for batch in (1, 2) if dry else (1, 2, 4, 8):
        p = Problem([15] * batch, patches, heads, dim, dtype, device)
        tags = torch.randn(sum(p.counts), columns, device=device, dtype=dtype)
        images = torch.randn(batch, columns, device=device, dtype=dtype)
        fixed = torch.rand(sum(p.counts), device=device)

        def weigh(tags: Tensor = tags, images: Tensor = images, p: Problem = p) -> Tensor:
            return tag_weights(tags, images, p.cu, temperature=0.1, impl=impl)

        def attend(weights: Tensor = fixed, p: Problem = p) -> Tensor:
            return tag_attention(p.q, p.k, p.v, p.cu, weights=weights, impl=impl)

        def whole(weigh: Step = weigh, attend: Callable[[Tensor], Tensor] = attend) -> Tensor:
            return attend(weigh())

        times = [per_replay(step, device) for step in (weigh, attend, whole)]
        lines.append(f"| {batch} | {times[0]:.1f} | {times[1]:.1f} | {times[2]:.1f} |")
    return lines


def per_replay(step: Step, device: str, times: int = 200) -> float:
    """Microseconds of a replay, from replays one after the other."""
    with torch.no_grad():
        if device == "cpu":
            return timed(step, device)[0]
        replay = captured(step)
        measured = []
        for _ in range(7):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(times):
                replay()
            stop.record()
            torch.cuda.synchronize()
            measured.append(1e3 * start.elapsed_time(stop) / times)
    return statistics.median(measured)


def small_operators(device: str, small: bool) -> list[tuple[str, Step, Step]]:
    """(name, with kernels, in plain torch) of tag_weights and gather_tags, forward + backward."""
    kernels = "triton" if device == "cuda" or interpreting() else "reference"
    counts = [3, 5] if small else ragged(64)
    total, columns, rows = sum(counts), 32 if small else 768, 100 if small else 100_000
    cu = torch.tensor([0, *counts]).cumsum(0).int().to(device)
    tags, images = (
        torch.randn(total, columns, device=device),
        torch.randn(len(counts), columns, device=device),
    )
    tau, grad = torch.tensor(0.1, device=device), torch.randn(total, device=device)
    table, ids = torch.randn(rows, columns, device=device), torch.randint(0, rows, (total,), device=device)
    ids[::2] = ids[0]
    wide = torch.randn(total, columns, device=device)

    def weigh(impl: str) -> Any:
        leaves = [x.detach().requires_grad_() for x in (tags, images, tau)]
        return torch.autograd.grad(
            tag_weights(leaves[0], leaves[1], cu, temperature=leaves[2], impl=impl), leaves, grad
        )

    def gather(impl: str) -> Any:
        leaf = table.detach().requires_grad_()
        return torch.autograd.grad(gather_tags(leaf, ids, impl=impl), leaf, wide)

    return [
        (f"{name}, T {total}, {columns} columns", partial(step, kernels), partial(step, "reference"))
        for name, step in (("tag_weights", weigh), ("gather_tags", gather))
    ]


def time_small_operators(device: str, dry: bool) -> list[str]:
    lines = ["| forward + backward | kernels us | plain torch us |", "| --- | --- | --- |"]
    for name, ours, plain in small_operators(device, dry):
        times = timed(ours, device), timed(plain, device)
        lines.append(f"| {name} | {times[0][0]:.1f} ({times[0][2]}) | {times[1][0]:.1f} ({times[1][2]}) |")
    return lines


def roofline(bandwidth: float, rate: float) -> list[str]:
    """What must move and be computed, counted, and the time no kernel can beat at these rates. Needs no GPU.

    Issued: GFLOP with the rows rounded up to the default blocks, which the tensor cores compute anyway;
    beside it, rounded up to 128 rows an image, FlashAttention's block.
    """
    from tuna_kernels.tag_attention.tuning import backward_default, forward_default

    lines = [
        f"At {bandwidth / 1e12:g} TB/s and {rate / 1e12:g} TFLOP/s (bf16); "
        f"the ridge is at {rate / bandwidth:.0f} FLOP a byte.", "",
        "| B | H x D | T | pass | MB | GFLOP | issued | padded to 128 rows | issued FLOP a byte | "
        "floor us: bytes | issued FLOP |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for (heads, dim), batch in product([(16, 64), (8, 128)], (1, 8, 64, 256)):
        counts = ragged(batch)
        p = Problem(counts, 576, heads, dim, torch.bfloat16, "meta")
        rows = -(-sum(counts) // batch)
        for name, move, work, block in zip(
            ("forward", "backward"), p.bytes, p.flops,
            (
                forward_default(dim, torch.bfloat16, rows).block_m,
                backward_default(dim, torch.bfloat16, rows).block_m,
            ),
            strict=True,
        ):  # fmt: skip
            issued, padded = (
                work * sum(-(-max(n, 1) // m) * m for n in counts) / sum(counts) for m in (block, 128)
            )
            numbers = [f"{x / 1e9:.2f}" for x in (work, issued, padded)]
            numbers += [f"{issued / move:.0f}", f"{1e6 * move / bandwidth:.1f}", f"{1e6 * issued / rate:.1f}"]
            lines.append(
                f"| {batch} | {heads} x {dim} | {sum(counts)} | {name} | {move / 1e6:.2f} | "
                f"{' | '.join(numbers)} |"
            )
    return lines


def memory(dry: bool) -> list[str]:
    """Memory that training keeps beyond inputs, output and row statistics, and the backward's peak."""
    p = Problem([3] if dry else ragged(64), 33 if dry else 576, 16, 64, torch.bfloat16, "cuda")
    leaves = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
    torch.autograd.grad(tag_attention(*leaves, p.cu, impl="triton"), leaves, p.dout)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = tag_attention(*leaves, p.cu, impl="triton")
    kept = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(out, leaves, p.dout)
    peak = torch.cuda.max_memory_allocated() - before - kept
    need = out.numel() * out.element_size() + 8 * out.shape[0] * out.shape[1]
    gradients = sum(x.numel() * x.element_size() for x in grads)
    return [
        f"Kept by the forward: {kept / 1e6:.2f} MB, of which output and row statistics {need / 1e6:.2f} MB. "
        f"Peak of the backward: {peak / 1e6:.2f} MB, of which gradients {gradients / 1e6:.2f} MB."
    ]


def profile() -> None:
    """A few plain launches at B 64 for ncu to look at."""
    for heads, dim in ((16, 64), (8, 128)):
        ours = next(
            contenders(
                Problem(ragged(64), 576, heads, dim, torch.bfloat16, "cuda"), {"flex", "compile"}, False
            )
        )
        for _ in range(3):
            ours.both()
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="every step on the CPU at tiny sizes; prints, writes no file"
    )
    parser.add_argument("--check", action="store_true", help="correctness and determinism only")
    parser.add_argument(
        "--small", action="store_true", help="with --check: few patches and runs, for compute-sanitizer"
    )
    parser.add_argument("--profile", action="store_true", help="only launch the kernels, for ncu")
    parser.add_argument(
        "--roofline",
        action="store_true",
        help="only count bytes and FLOP, at --bandwidth and --rate; needs no GPU",
    )
    parser.add_argument(
        "--bandwidth", type=float, default=3.35, help="TB/s for --roofline (default: an H100 SXM's datasheet)"
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=989,
        help="bf16 TFLOP/s for --roofline (default: an H100 SXM's datasheet)",
    )
    parser.add_argument(
        "--skip", default="", help="contenders to leave out: flex, compile (both compile for long)"
    )
    parser.add_argument(
        "--budget", type=float, default=420, help="seconds after which contenders that compile are left out"
    )
    parser.add_argument(
        "--out", type=Path, help="result file; benchmarks/results/kernels-DEVICE-DATE.md if not given"
    )
    options = parser.parse_args()
    started = time.monotonic()
    dry = options.dry_run
    device = "cpu" if dry else "cuda"
    if options.roofline:
        print("\n".join(roofline(options.bandwidth * 1e12, options.rate * 1e12)))
        return 0
    if not dry and not torch.cuda.is_available():
        parser.error("no CUDA device: run it where there is one, or with --dry-run")
    if not dry and interpreting():
        parser.error("TRITON_INTERPRET is set: unset it to run on the GPU")
    if options.small:
        # a search under compute-sanitizer would take its time for nothing
        os.environ["TUNA_AUTOTUNE"] = "0"
    if options.profile:
        profile()
        return 0

    import triton

    name = platform.processor() or platform.machine() if dry else torch.cuda.get_device_name()
    today = datetime.now(UTC).date().isoformat()
    versions = (
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}, "
        f"Python {platform.python_version()}"
    )
    head = f"{name}; {versions}; {today}"
    lines = [
        "# Kernels",
        "",
        head,
        "",
        "## Right, and the same every time",
        "",
        *check(device, dry, options.small),
    ]
    print("\n".join(lines), flush=True)
    if options.check:
        return 0

    bandwidth, rate = roofs(device)
    lines += [
        "",
        "## The roofs",
        "",
        f"Copy {bandwidth / 1e12:.2f} TB/s (read + written), bf16 product {rate / 1e12:.0f} TFLOP/s, "
        "measured in this run.",
    ]
    lines += ["", "## Latency of the tag path", "", *latency(device, dry)]
    lines += ["", "## Small operators", "", *time_small_operators(device, dry)]
    if not dry:
        lines += ["", "## Memory", "", *memory(dry)]
    lines += [
        "",
        "## Beside others",
        *race(device, dry, set(options.skip.split(",")), started + options.budget, bandwidth),
    ]
    lines += [
        "",
        f"`{' '.join(['python -m benchmarks.kernels.speed', *sys.argv[1:]])}`, "
        f"{time.monotonic() - started:.0f} s.",
    ]
    text = "\n".join(lines) + "\n"
    if dry:
        print(text)
        return 0
    out = options.out or RESULTS / f"kernels-{name.replace(' ', '-')}-{today}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(f"{text}\nwritten to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
