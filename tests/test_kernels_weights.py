"""`tag_weights` and `score_weights`: the reference against a formula, the kernels against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ragged import DEVICE, dtypes, in_float64, offsets, with_gradients
from rounding import assert_rounds, rounding_errors, weighing
from tuna_kernels import score_weights, tag_attention, tag_weights
from tuna_kernels.tag_weights import COUPLINGS

COUNTS = (3, 0, 17, 40, 1, 16)
DTYPES = [torch.float32, torch.float16]


def draw(
    counts: tuple[int, ...], columns: int, dtype: torch.dtype, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Return embeddings whose cosines vary as CLIP's do, a temperature, and the gradient of the weights."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(counts), columns, generator=generator)
    own = images.repeat_interleave(torch.tensor(counts, dtype=torch.int64), 0)
    tags = 3 * torch.randn(sum(counts), columns, generator=generator) + own
    grads = {
        "tag_embeddings": tags.to(DEVICE, dtype),
        "image_embeddings": images.to(DEVICE, dtype),
        "temperature": torch.tensor(0.1, device=DEVICE),
    }
    return grads, torch.randn(sum(counts), generator=generator).to(DEVICE)


def compare(counts: tuple[int, ...], columns: int, dtype: torch.dtype, coupling: str, seed: int = 0) -> None:
    grads, dout = draw(counts, columns, dtype, seed)
    rest = {"cu_tags": offsets(counts), "coupling": coupling, "threshold": 0.3}
    kernel, plain = (
        with_gradients(partial(tag_weights, impl=impl), grads, rest, dout) for impl in ("triton", "reference")
    )
    assert dtypes(kernel) == dtypes(plain)
    exact = with_gradients(partial(tag_weights, impl="reference"), in_float64(grads), rest, dout.double())
    assert_rounds(kernel, exact, rounding_errors(weighing, dtype, **grads, **rest, dout=dout))


def by_image(
    tags: Tensor,
    images: Tensor,
    counts: tuple[int, ...],
    temperature: Tensor,
    coupling: str,
    threshold: float,
) -> Tensor:
    weights = []
    for image, own in zip(images, tags.split(counts), strict=True):
        logits = F.cosine_similarity(own, image[None], dim=-1) / temperature
        w = logits.softmax(0)
        if coupling == "log_bias":
            w = logits.log_softmax(0)
        elif coupling != "multiply" and len(w):
            w = w / w.amax()
            w = w * (w >= threshold) if coupling == "drop" else w
        weights.append(w)
    return torch.cat(weights)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_reference_is_the_formula(coupling: str):
    grads, dout = draw(COUNTS, 40, torch.float64)
    rest = {"cu_tags": offsets(COUNTS), "coupling": coupling, "threshold": 0.3}
    ours = with_gradients(partial(tag_weights, impl="reference"), in_float64(grads), rest, dout)

    def formula(tag_embeddings: Tensor, image_embeddings: Tensor, temperature: Tensor) -> Tensor:
        return by_image(tag_embeddings, image_embeddings, COUNTS, temperature, coupling, 0.3)

    theirs = with_gradients(formula, in_float64(grads), {}, dout)
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_reference_gradients(coupling: str):
    grads, _ = draw((3, 0, 2), 5, torch.float64)
    rest = {"cu_tags": offsets((3, 0, 2)), "coupling": coupling, "threshold": 0.3, "impl": "reference"}
    leaves = {name: x.double().requires_grad_() for name, x in grads.items()}
    assert torch.autograd.gradcheck(
        lambda *xs: tag_weights(**dict(zip(leaves, xs, strict=True)), **rest), tuple(leaves.values())
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_kernel_against_reference(coupling: str, dtype: torch.dtype):
    compare(COUNTS, 300, dtype, coupling)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    columns=st.integers(2, 300),
    coupling=st.sampled_from(COUPLINGS),
)
def test_any_layout(counts: list[int], columns: int, coupling: str):
    compare(tuple(counts), columns, torch.float32, coupling)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_scores_are_weighed_as_cosines_are(coupling: str):
    grads, dout = draw(COUNTS, 40, torch.float32)
    cu_tags = offsets(COUNTS)
    from tuna_kernels.tag_weights.reference import cosines

    scores = cosines(grads["tag_embeddings"], grads["image_embeddings"], cu_tags)
    rest = {"cu_tags": cu_tags, "coupling": coupling, "threshold": 0.3}
    values = {"scores": scores, "temperature": grads["temperature"]}
    kernel, plain = (
        with_gradients(partial(score_weights, impl=impl), values, rest, dout)
        for impl in ("triton", "reference")
    )
    assert dtypes(kernel) == dtypes(plain)
    exact = with_gradients(partial(score_weights, impl="reference"), in_float64(values), rest, dout.double())
    assert_rounds(kernel, exact, rounding_errors(weighing, torch.float32, **values, **rest, dout=dout))
    torch.testing.assert_close(
        kernel["out"], tag_weights(**grads, **rest, impl="triton"), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_what_the_couplings_promise(impl: str):
    grads, _ = draw(COUNTS, 40, torch.float32)
    images = offsets(COUNTS)
    weights = {
        c: tag_weights(**grads, cu_tags=images, coupling=c, threshold=0.3, impl=impl).split(COUNTS)
        for c in COUPLINGS
    }
    for multiply, largest, log_bias, drop in zip(
        *(weights[c] for c in ("multiply", "multiply_max", "log_bias", "drop")), strict=True
    ):
        if not len(multiply):
            continue
        assert multiply.sum().item() == pytest.approx(1, abs=1e-6)
        assert largest.max() == 1
        torch.testing.assert_close(log_bias.exp(), multiply, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(drop, largest * (largest >= 0.3), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_equal_tags_share_and_zero_tags_say_nothing(impl: str):
    counts = (4,)
    grads, dout = draw(counts, 20, torch.float32)
    best = grads["image_embeddings"][0] * 2
    grads["tag_embeddings"][:2] = best
    grads["tag_embeddings"][3] = 0
    rest = {"cu_tags": offsets(counts), "coupling": "multiply_max", "impl": impl}
    results = with_gradients(tag_weights, grads, rest, dout)
    assert results["out"][:2].tolist() == [1, 1]
    assert results["out"][3].item() == pytest.approx(torch.tensor(-1 / 0.1).exp().item(), rel=1e-4)
    assert all(x.isfinite().all() for x in results.values())
    assert not results["dtag_embeddings"][3].any()


def test_a_number_is_a_temperature_too():
    grads, _ = draw(COUNTS, 40, torch.float32)
    tau = grads.pop("temperature").item()
    for impl in ("triton", "reference"):
        learned = tag_weights(
            **grads, temperature=torch.tensor(tau, device=DEVICE), cu_tags=offsets(COUNTS), impl=impl
        )
        assert torch.equal(tag_weights(**grads, temperature=tau, cu_tags=offsets(COUNTS), impl=impl), learned)


def test_log_weights_are_refused_where_tags_are_queries():
    q, kv = torch.zeros(3, 1, 16), torch.zeros(1, 5, 1, 16)
    bias = score_weights(
        torch.zeros(3), offsets((3,), "cpu"), temperature=1.0, coupling="log_bias", impl="reference"
    )
    with pytest.raises(ValueError, match="where tags are keys"):
        tag_attention(q, kv, kv, offsets((3,), "cpu"), bias=bias)


def test_torch_compile_takes_it_whole():
    torch._dynamo.reset()
    compiled = torch.compile(
        partial(tag_weights, impl="triton"), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for counts in ((3, 0, 5), (2, 9, 1)):
        grads, dout = draw(counts, 30, torch.float32)
        rest = {"cu_tags": offsets(counts), "coupling": "multiply"}
        ours, plain = (
            with_gradients(op, grads, rest, dout) for op in (compiled, partial(tag_weights, impl="triton"))
        )
        assert all(torch.equal(x, ours[name]) for name, x in plain.items())


def test_torch_library_rules():
    grads, _ = draw((3, 0, 2), 20, torch.float32)
    tags, images, tau = (x.requires_grad_() for x in grads.values())
    operator = torch.ops.tuna_kernels.tag_weights_forward.default
    torch.library.opcheck(operator, (tags, images, None, tau, offsets((3, 0, 2)), 0.0, 0.0, "multiply"))


@pytest.mark.parametrize("counts", [(), (0, 0)], ids=["no images", "no tags"])
def test_nothing_to_do(counts: tuple[int, ...]):
    grads, dout = draw(counts, 20, torch.float32)
    results = with_gradients(partial(tag_weights, impl="triton"), grads, {"cu_tags": offsets(counts)}, dout)
    assert results["out"].shape == (0,)
    assert results["dimage_embeddings"].shape == (len(counts), 20)
    assert not results["dimage_embeddings"].any()
    assert results["dtemperature"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coupling": "add"}, "coupling must be one of multiply, multiply_max, log_bias, drop"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"temperature": torch.ones(2)}, "must have one element"),
        ({"threshold": 2.0}, r"threshold must be in \[0, 1\]"),
        ({"image_embeddings": torch.ones(2, 9)}, "expected tag_embeddings"),
        ({"image_embeddings": torch.ones(2, 8).half()}, "one dtype and device"),
        ({"cu_tags": torch.tensor([0, 3]).int()}, "must have 3 values"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refusals(changes: dict[str, object], message: str):
    good = {
        "tag_embeddings": torch.ones(3, 8),
        "image_embeddings": torch.ones(2, 8),
        "cu_tags": offsets((1, 2), "cpu"),
        "temperature": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        tag_weights(**(good | changes))
