"""The error rule of the kernel tests refuses errors of 1e-5, missing factors, dropped patches and tags."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ragged import DEVICE, Case, in_float64, inputs, offsets, with_gradients
from rounding import Rounding, assert_rounds, attention, gathering, rounding_errors, weighing
from test_kernels_attention import CASES as ALL_CASES
from test_kernels_weights import COUNTS, draw
from tuna_kernels import gather_tags, score_weights, tag_attention, tag_weights
from tuna_kernels.tag_weights import COUPLINGS

reference = partial(tag_attention, impl="reference")
CASES = [case for case in ALL_CASES if sum(case.counts)]
WRONG = {torch.float32: 1e-5, torch.float16: 4e-3}
"""A relative error that must be refused: 84 units of float32's precision, 4 of float16's."""


@cache
def estimate(case: Case) -> dict[str, Tensor]:
    grads, rest, dout = inputs(case)
    return rounding_errors(attention, case.dtype, **grads, **rest, dout=dout)


def exact_results(case: Case, **changes: Any) -> dict[str, Tensor]:
    """The results of `case` in float64, with `changes` to its inputs."""
    grads, rest, dout = inputs(case)
    values = {name: changes.pop(name, x) for name, x in in_float64(grads).items()}
    return with_gradients(
        partial(reference, scale=changes.pop("scale", None)), values, rest | changes, dout.double()
    )


def refused(case: Case, results: dict[str, Tensor]) -> bool:
    return not_rounding(results, exact_results(case), estimate(case))


def not_rounding(results: dict[str, Tensor], exact: dict[str, Tensor], errors: dict[str, Tensor]) -> bool:
    try:
        assert_rounds(results, exact, errors)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_without_roundings_is_the_reference(case: Case):
    grads, rest, dout = inputs(case)
    without = attention(Rounding(case.dtype, dout.device, samples=1), **grads, **rest, dout=dout)
    for name, x in exact_results(case).items():
        torch.testing.assert_close(without[name][0], x, atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("op", [tag_weights, score_weights])
def test_weights_without_roundings_are_the_reference(op: Callable[..., Tensor], coupling: str):
    values, rest, dout = weights_inputs(op, coupling)
    without = weighing(Rounding(torch.float32, dout.device, samples=1), **values, **rest, dout=dout)
    for name, x in with_gradients(
        partial(op, impl="reference"), in_float64(values), rest, dout.double()
    ).items():
        torch.testing.assert_close(without[name][0], x, atol=1e-10, rtol=1e-10, msg=name)


def weights_inputs(
    op: Callable[..., Tensor], coupling: str
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    values, dout = draw(COUNTS, 300, torch.float32)
    if op is score_weights:
        scores = torch.rand(sum(COUNTS), generator=torch.Generator().manual_seed(1)).to(DEVICE)
        values = {"scores": scores, "temperature": values["temperature"]}
    return values, {"cu_tags": offsets(COUNTS), "coupling": coupling, "threshold": 0.3}, dout


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_result_is_refused_that_is_wrong_by_a_small_factor(case: Case):
    exact = exact_results(case)
    assert not refused(case, exact)
    for name, x in exact.items():
        assert refused(case, {**exact, name: x * (1 + WRONG[case.dtype])}), name


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("op", [tag_weights, score_weights])
def test_a_weight_is_refused_that_is_wrong_by_a_small_factor(op: Callable[..., Tensor], coupling: str):
    values, rest, dout = weights_inputs(op, coupling)
    exact = with_gradients(partial(op, impl="reference"), in_float64(values), rest, dout.double())
    errors = rounding_errors(weighing, torch.float32, **values, **rest, dout=dout)
    assert not not_rounding(exact, exact, errors)
    for name, x in exact.items():
        # the gradient of the temperature is one number, the small rest of large terms
        wrong = 1e-4 if name == "dtemperature" else 1e-5
        assert not_rounding({**exact, name: x * (1 + wrong)}, exact, errors), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_single_wrong_element_is_refused(case: Case):
    exact = exact_results(case)
    for name, x in exact.items():
        changed = x.clone().flatten()
        changed[changed.abs().argmax()] *= 1 + 2 * WRONG[case.dtype]
        assert refused(case, {**exact, name: changed.reshape(x.shape)}), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_missing_scale_is_refused(case: Case):
    exact, changed = exact_results(case), exact_results(case, scale=1.0)
    for name in exact:
        assert refused(case, {**exact, name: changed[name]}), name
    for name in ("dq", "dk"):
        assert refused(case, {**exact, name: exact[name] * case.dim**0.5}), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_dropped_patch_is_refused(case: Case):
    exact, (_, rest, _) = exact_results(case), inputs(case)
    mask = rest.get(
        "patch_mask", torch.ones(len(case.counts), case.patches, dtype=torch.bool, device=DEVICE)
    ).clone()
    image = next(b for b, count in enumerate(case.counts) if count and mask[b].any())
    mask[image, mask[image].nonzero()[-1]] = False
    changed = exact_results(case, patch_mask=mask)
    for name in exact:
        assert refused(case, {**exact, name: changed[name]}), name


@pytest.mark.parametrize("case", [case for case in CASES if "w" in case.flags], ids=str)
def test_a_missing_weight_is_refused(case: Case):
    exact, (grads, _, _) = exact_results(case), inputs(case)
    changed = exact_results(case, weights=torch.ones_like(grads["weights"]).double())
    for name in exact.keys() - {"dweights"}:
        assert refused(case, {**exact, name: changed[name]}), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gathered_gradient_is_refused_that_lacks_a_tag(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    table, dout = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in ((5, 8), (100, 8)))
    ids = torch.randint(-1, 4, (100,), generator=generator).to(DEVICE)
    op = partial(gather_tags, impl="reference")
    exact = with_gradients(op, in_float64({"table": table}), {"ids": ids}, dout.double())
    errors = rounding_errors(gathering, dtype, table=table, ids=ids, dout=dout)
    assert not not_rounding(exact, exact, errors)
    assert not_rounding({**exact, "out": exact["out"] * (1 + 1e-7)}, exact, errors)
    assert not_rounding({**exact, "dtable": exact["dtable"] * (1 + WRONG[dtype])}, exact, errors)
    dropped = ids.index_fill(0, (ids >= 0).nonzero()[-1], -1)
    changed = with_gradients(op, in_float64({"table": table}), {"ids": dropped}, dout.double())
    assert not_rounding({**exact, "dtable": changed["dtable"]}, exact, errors)
