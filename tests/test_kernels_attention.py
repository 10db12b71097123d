"""`tag_attention`: the reference against an independent formula, and the kernels against the reference."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ragged import DEVICE, EXHAUSTIVE, Case, dtypes, in_float64, inputs, offsets, with_gradients
from rounding import assert_rounds, attention, rounding_errors
from tuna_kernels import tag_attention
from tuna_kernels.backend import interpreting

HALF, SINGLE = torch.float16, torch.float32
reference = partial(tag_attention, impl="reference")
kernel = partial(tag_attention, impl="triton")
on_gpu = pytest.mark.skipif(
    interpreting() or not torch.cuda.is_available(), reason="needs a CUDA device and no TRITON_INTERPRET"
)

# every count, patch number and head size at least once, at and beside the edges of blocks
CASES = [
    Case((0, 1, 2, 15), 49, 2, 2, 24, SINGLE, "wbm"),
    Case((16, 0, 17), 49, 4, 2, 64, SINGLE, "wB"),
    Case((40, 1), 196, 1, 1, 64, HALF, "w"),
    Case((0, 40, 3), 257, 2, 1, 80, HALF, "bm"),
    Case((17,), 577, 1, 1, 128, HALF, ""),
    Case((2, 15), 2, 3, 1, 128, SINGLE, "wb"),
    Case((40, 16), 49, 4, 1, 64, HALF, "wBm"),
    Case((5, 40), 49, 2, 2, 33, SINGLE, "m"),
    Case((3, 1), 49, 1, 1, 256, HALF, "wbm"),
    Case((0, 0), 49, 2, 2, 16, SINGLE, "wbm"),
    Case((70, 2), 65, 1, 1, 16, HALF, "w"),
]

MATRIX = [
    Case((0, 1, 2, 15, 16, 17, 40), patches, *heads, dim, dtype, flags)
    for dim, patches, heads, dtype, flags in product(
        (24, 64, 80, 128), (49, 196, 257, 577), ((2, 2), (4, 2)), (SINGLE, HALF), ("", "wbm")
    )
]  # fmt: skip
if not EXHAUSTIVE:
    MATRIX = [
        pytest.param(
            None,
            marks=pytest.mark.skip("half an hour of interpreter: TUNA_KERNELS_EXHAUSTIVE=1 pytest -k matrix"),
        )
    ]


def compare(case: Case, seed: int = 0) -> None:
    grads, rest, dout = inputs(case, seed)
    exact = with_gradients(reference, in_float64(grads), rest, dout.double())
    errors = rounding_errors(attention, case.dtype, **grads, **rest, dout=dout)
    results = with_gradients(kernel, grads, rest, dout)
    assert dtypes(results) == dtypes(with_gradients(reference, grads, rest, dout))
    assert_rounds(results, exact, errors)


def by_sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_tags: Tensor, weights: Tensor | None = None,
    bias: Tensor | None = None, patch_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute `tag_attention` by torch's own attention with an additive mask, image after image."""
    outs = []
    for b, (start, stop) in enumerate(zip(cu_tags[:-1].tolist(), cu_tags[1:].tolist(), strict=True)):
        group = q.shape[1] // k.shape[2]
        keys, values = (x[b].repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        added = q.new_zeros(q.shape[1], stop - start, k.shape[1])
        if bias is not None:
            added = added + (bias[:, None] if bias.ndim == 2 else bias)[start:stop].transpose(0, 1)
        if patch_mask is not None:
            added = added.masked_fill(~patch_mask[b], -torch.inf)
        out = F.scaled_dot_product_attention(
            q[start:stop].transpose(0, 1), keys, values, attn_mask=added
        ).transpose(0, 1)
        outs.append(out if weights is None else out * weights[start:stop, None, None])
    return torch.cat(outs)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if "m" not in c.flags] + [Case((3, 0, 17, 2), 49, 4, 2, 24, flags="wBm")],
    ids=str,
)
def test_reference_is_attention(case: Case):
    grads, rest, dout = inputs(case, device="cpu")
    if "patch_mask" in rest:
        rest["patch_mask"][-1, :5] = True  # SDPA has no answer for a row that sees nothing
    values = in_float64(grads)
    ours, theirs = (with_gradients(op, values, rest, dout.double()) for op in (reference, by_sdpa))
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize("flags", ["", "wbm", "wB"])
def test_reference_gradients(flags: str):
    grads, rest, _ = inputs(Case((2, 0, 1), 5, 2, 1, 16, flags=flags), device="cpu")
    leaves = {name: x.double().requires_grad_() for name, x in grads.items()}
    assert torch.autograd.gradcheck(
        lambda *xs: reference(**dict(zip(leaves, xs, strict=True)), **rest), tuple(leaves.values())
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_against_reference(case: Case):
    compare(case)


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_matrix(case: Case):
    compare(case)


def test_one_patch():
    """The attention is 1, so the output is v, and the gradients of the logits are 0 but for rounding."""
    compare(Case((2, 0, 15), 1, 2, 1, 24, flags="wb"))


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(1, 20)), min_size=1, max_size=5),
    patches=st.integers(1, 70),
    group=st.sampled_from([1, 2, 3]),
    dim=st.integers(16, 48),
    flags=st.sampled_from(["", "w", "bm", "wB"]),
)
def test_any_layout(counts: list[int], patches: int, group: int, dim: int, flags: str):
    compare(Case(tuple(counts), patches, group, 1, dim, HALF, flags))


def test_attention_maps():
    grads, rest, _ = inputs(Case((3, 0, 17), 49, 4, 2, 24, flags="wbm"))
    _, ours = kernel(**grads, **rest, return_attention=True)
    _, plain = reference(**grads, **rest, return_attention=True)
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)
    seen = rest["patch_mask"].any(1)
    torch.testing.assert_close(ours[:3].sum(-1), torch.ones(3, 4, device=DEVICE))
    assert seen[0]
    assert not seen[-1]
    assert not ours[3:].any()


@pytest.mark.parametrize("op", [kernel, reference], ids=["triton", "reference"])
def test_a_tag_that_sees_nothing_is_zero_and_moves_nothing(op: partial[Tensor]):
    grads, rest, dout = inputs(Case((3, 5), 49, 2, 2, 24, flags="wbm"))
    # the second image is masked; a tag of the first may be shut out by its bias too
    grads["bias"][0] = -torch.inf
    results = with_gradients(op, grads, rest, dout)
    assert all(x.isfinite().all() for x in results.values())
    for name in ("out", "dq", "dweights", "dbias"):
        assert not results[name][0].any()
        assert not results[name][3:].any()
    assert not results["dk"][1].any()
    assert not results["dv"][1].any()
    assert results["dk"][0].any()


@pytest.mark.parametrize("counts", [(), (0, 0)], ids=["no images", "no tags"])
def test_nothing_to_do(counts: tuple[int, ...]):
    grads, rest, dout = inputs(Case(counts, 49, 2, 2, 24, flags="w"))
    results = with_gradients(kernel, grads, rest, dout)
    assert results["out"].shape == (0, 2, 24)
    assert results["dk"].shape == (len(counts), 49, 2, 24)
    assert not results["dk"].any()
    assert not results["dv"].any()


@pytest.mark.parametrize("splits", [2, 3])
def test_splitting_the_patches_changes_little(splits: int):
    from tuna_kernels.tag_attention.backward import backward
    from tuna_kernels.tag_attention.forward import forward

    case = Case((3, 40), 257, 2, 1, 24, HALF, "w")
    grads, rest, dout = inputs(case)
    q, k, v, weights, cu_tags = *grads.values(), rest["cu_tags"]
    out, stats = forward(q, k, v, cu_tags, 0.2, weights, None, None)
    gradients = backward(dout, q, k, v, cu_tags, out, stats, 0.2, weights, None, None, splits=splits)
    exact = with_gradients(partial(reference, scale=0.2), in_float64(grads), rest, dout.double())
    errors = rounding_errors(attention, case.dtype, **grads, **rest, dout=dout, scale=0.2)
    assert_rounds(
        {"out": out, **dict(zip(("dq", "dk", "dv", "dweights"), gradients, strict=True))}, exact, errors
    )


def test_every_element_is_written():
    """torch.empty filled with NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all(), (
            "torch.utils.deterministic.fill_uninitialized_memory is off"
        )
        compare(Case((0, 3, 17), 49, 2, 1, 24, HALF, "wbm"))
        compare(Case((40, 0), 33, 2, 1, 17, SINGLE, "wB"))
    finally:
        torch.use_deterministic_algorithms(False)


def test_any_strides():
    case = Case((3, 0, 17), 49, 2, 2, 24, flags="wbm")
    grads, rest, dout = inputs(case)
    plain = with_gradients(kernel, grads, rest, dout)
    fused = torch.stack([grads["k"], grads["v"]], 2)
    strided = {
        "q": grads["q"].transpose(0, 1).contiguous().transpose(0, 1),
        "k": fused[:, :, 0],
        "v": grads["v"].permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
        "weights": grads["weights"].repeat_interleave(2)[::2],
        "bias": grads["bias"].transpose(0, 2).contiguous().transpose(0, 2),
    }
    rest["patch_mask"] = rest["patch_mask"].t().contiguous().t()
    results = with_gradients(kernel, strided, rest, dout.transpose(0, 2).contiguous().transpose(0, 2))
    for name, x in plain.items():
        assert torch.equal(results[name], x), name


def test_dout_may_be_expanded():
    grads, rest, _ = inputs(Case((3, 2), 49, 2, 2, 24, flags=""))
    q, *others = (x.requires_grad_() for x in grads.values())
    (got,) = torch.autograd.grad(kernel(q, *others, **rest).sum(), q)
    (want,) = torch.autograd.grad(reference(q, *others, **rest).sum(), q)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_properties(0).total_memory < 20e9,
    reason="needs 20 GB of GPU memory",
)
def test_beyond_two_to_the_31_elements():
    """Images 2^31 elements apart: only pages that are touched take memory on the CPU."""
    case = Case((2, 3), 17, 1, 1, 16, HALF, "")
    grads, rest, _ = inputs(case)
    store = torch.empty(2**31 + 17 * 16, dtype=HALF, device=DEVICE)
    far = store.as_strided((2, 17, 1, 16), (2**31, 16, 16, 1))
    far.copy_(grads["k"])
    assert torch.equal(kernel(grads["q"], far, grads["v"], **rest), kernel(**grads, **rest))
    far.copy_(grads["v"])
    assert torch.equal(kernel(grads["q"], grads["k"], far, **rest), kernel(**grads, **rest))


def test_wrong_offsets_read_nothing_outside():
    """On a GPU the values of cu_tags are not checked; the kernels clamp them."""
    from tuna_kernels.tag_attention.forward import forward

    grads, _, _ = inputs(Case((2, 3), 17, 1, 1, 16, HALF, ""))
    out, _ = forward(*grads.values(), offsets((2**30, 7)), 0.25, None, None, None)
    assert out[:5].isfinite().all()


def test_torch_compile_takes_it_whole():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *xs, **kw: kernel(*xs, **kw) * 2, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for counts in ((3, 0, 5), (1, 4, 8)):
        grads, rest, dout = inputs(Case(counts, 33, 2, 1, 24, flags="wbm"))
        ours = with_gradients(
            lambda q, k, v, cu_tags, **kw: compiled(q, k, v, cu_tags, **kw), grads, rest, dout
        )
        plain = with_gradients(lambda **kw: kernel(**kw) * 2, grads, rest, dout)
        for name, x in plain.items():
            assert torch.equal(ours[name], x), name


def test_torch_compile_takes_the_reference_whole():
    """Given `max_tags`, nothing in it depends on data."""
    torch._dynamo.reset()
    bounded = partial(reference, max_tags=8)
    compiled = torch.compile(
        lambda q, k, v, cu_tags, **kw: bounded(q, k, v, cu_tags, **kw),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for counts in ((3, 0, 5), (1, 4, 8)):
        grads, rest, dout = inputs(Case(counts, 33, 2, 1, 24, flags="wbm"))
        ours, plain = (
            with_gradients(op, grads, rest, dout)
            for op in (lambda q, k, v, cu_tags, **kw: compiled(q, k, v, cu_tags, **kw), reference)
        )
        for name, x in plain.items():
            torch.testing.assert_close(ours[name], x, atol=1e-6, rtol=1e-5)


def test_torch_library_rules():
    grads, rest, _ = inputs(Case((3, 0, 2), 17, 2, 1, 16, flags="wbm"))
    q, k, v, weights, bias = (x.requires_grad_() for x in grads.values())
    arguments = (q, k, v, rest["cu_tags"], 0.25, weights, bias, rest["patch_mask"])
    torch.library.opcheck(torch.ops.tuna_kernels.tag_attention_forward.default, arguments)


class Reader(nn.Module):
    """A tag encoder in small: learned projections around the attention."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.kv, self.o = nn.Linear(32, 32), nn.Linear(24, 64), nn.Linear(32, 8)
        self.impl = impl

    def forward(self, tags: Tensor, patches: Tensor, cu_tags: Tensor, weights: Tensor) -> Tensor:
        k, v = self.kv(patches).view(*patches.shape[:2], 2, 2, 16).unbind(2)
        return self.o(
            tag_attention(
                self.q(tags).view(-1, 2, 16), k, v, cu_tags, weights=weights, impl=self.impl
            ).flatten(1)
        )


def test_training_is_the_same():
    generator = torch.Generator().manual_seed(0)
    tags, patches, target = (
        torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((9, 32), (3, 20, 24), (9, 8))
    )
    weights, cu_tags = torch.rand(9, generator=generator).to(DEVICE), offsets((4, 0, 5))
    losses = {}
    for impl in ("triton", "reference"):
        model = Reader(impl).to(DEVICE)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses[impl] = []
        for _ in range(12):
            loss = F.mse_loss(model(tags, patches, cu_tags, weights), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[impl].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-4)
    assert losses["triton"][-1] < 0.8 * losses["triton"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(5, 32)}, r"expected q \[T, H, D\]"),
        ({"k": torch.zeros(2, 17, 2, 16).half()}, "one dtype"),
        ({"q": torch.zeros(5, 3, 16)}, "3 heads of q must be a multiple of the 2"),
        ({"cu_tags": torch.tensor([0, 2, 5])}, r"int32 \[B \+ 1\], got int64"),
        ({"cu_tags": torch.tensor([0, 2, 4]).int()}, "from 0 to 5"),
        ({"cu_tags": torch.tensor([0, 7, 5]).int()}, "must not fall"),
        ({"cu_tags": torch.tensor([0, 5]).int()}, "3 values for the 2 images"),
        ({"weights": torch.zeros(4)}, r"weights must be \[5\]"),
        ({"bias": torch.zeros(5)}, "changes nothing under softmax"),
        ({"bias": torch.zeros(5, 3, 17)}, "bias must be"),
        ({"patch_mask": torch.ones(2, 17)}, "patch_mask must be bool"),
        ({"max_tags": 2}, "an image has 3 tags, more than max_tags=2"),
        ({"impl": "cuda"}, "impl must be one of"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refusals(changes: dict[str, object], message: str):
    good = {
        "q": torch.zeros(5, 2, 16),
        "k": torch.zeros(2, 17, 2, 16),
        "v": torch.zeros(2, 17, 2, 16),
        "cu_tags": offsets((2, 3), "cpu"),
    }
    with pytest.raises(ValueError, match=message):
        tag_attention(**(good | changes))


def test_head_size_is_refused_by_the_kernels_only():
    grads, rest, _ = inputs(Case((2,), 5, 1, 1, 8, flags=""))
    with pytest.raises(ValueError, match="from 16 to 256, got 8; impl='reference' takes any"):
        kernel(**grads, **rest)
    assert reference(**grads, **rest).shape == (2, 1, 8)


# ---- on a GPU


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    "case",
    [Case(tuple(c), p, h, kv, d, torch.bfloat16, f) for (c, p, h, kv, d), f in product(
        [((0, 1, 2, 15, 16, 17, 40), 577, 16, 16, 64), ((15,) * 64, 576, 8, 8, 128),
         ((40, 3), 1025, 8, 2, 80), ((15, 0), 576, 16, 1, 256)],
        ["", "wbm", "wB"])],
    ids=str,
)  # fmt: skip
def test_bfloat16_on_gpu(case: Case):
    compare(case)


@pytest.mark.gpu
@on_gpu
def test_same_bits_in_100_runs():
    grads, rest, dout = inputs(Case((15, 0, 40, 3) * 16, 576, 16, 16, 64, torch.bfloat16, "wb"))
    first = with_gradients(kernel, grads, rest, dout)
    for _ in range(99):
        again = with_gradients(kernel, grads, rest, dout)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.gpu
@on_gpu
def test_cuda_graph_replays_new_layouts():
    """The grid depends on T and B only, so that one graph serves any layout of the same T."""
    grads, rest, _ = inputs(Case((15, 15), 576, 16, 16, 64, torch.bfloat16, "w"))
    kernel(**grads, **rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel(**grads, **rest)
    rest["cu_tags"].copy_(offsets((3, 27)))
    graph.replay()
    assert torch.equal(out, kernel(**grads, **rest))


@pytest.mark.gpu
@on_gpu
@pytest.mark.slow
def test_compute_sanitizer_finds_nothing():
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    script = Path(__file__).parent.parent / "benchmarks" / "kernels" / "speed.py"
    for check in ("memcheck", "racecheck"):
        done = subprocess.run(
            [
                tool,
                "--tool",
                check,
                "--error-exitcode",
                "9",
                sys.executable,
                str(script),
                "--check",
                "--small",
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
