"""The error rule of the kernel tests: how far from the exact result the roundings of a kernel can take it.

The formulas of a kernel (see its README) are evaluated in float64 `SAMPLES` times. Each time, every
intermediate result that the kernel rounds gets an error as large as rounding can make it, with a random sign
(Monte Carlo arithmetic: Parker, Pierce and Eggert, 2000). The deviations show what the roundings do together,
wherever terms cancel or add up. No other implementation has a say, so the verdict does not depend on how a
BLAS, its threads or a CPU round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLES = 32
"""Evaluations with random signs: enough to know a mean square error within 25 % even if it has one cause."""
RISK = 1e-6
"""Probability that one result of a correct kernel is refused."""


class Rounding:
    """Arithmetic in float64 with the errors of float32 arithmetic and of storage in `dtype`.

    The first dimension of every value is the sample. With a single sample there are no errors.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, samples: int = SAMPLES) -> None:
        self.samples = samples
        self.generator = torch.Generator(device).manual_seed(0)
        self.unit = torch.finfo(torch.float32).eps / 2 if samples > 1 else 0.0
        """Largest relative error of one float32 operation."""
        self.store_unit = torch.finfo(dtype).eps / 2 if samples > 1 else 0.0
        self.store_floor = self.store_unit * torch.finfo(dtype).tiny
        """Largest error of storing a number that is subnormal in `dtype`."""

    def repeat(self, x: Tensor) -> Tensor:
        return x.double().expand(self.samples, *x.shape)

    def err(self, x: Tensor, size: Tensor) -> Tensor:
        """Return `x` plus or minus `size`."""
        if not self.unit:
            return x
        signs = torch.randint(0, 2, x.shape, generator=self.generator, device=x.device, dtype=torch.int8)
        return x + (2 * signs - 1) * size

    def round(self, x: Tensor, operations: int = 1) -> Tensor:
        """Return `x` as the result of one or several float32 operations, each rounded to nearest."""
        return self._relative(x, math.sqrt(operations))

    def quick(self, x: Tensor) -> Tensor:
        """Return `x` as a GPU's exp2, division or square root gives it: two units in the last place off."""
        return self._relative(x, 4)

    def _relative(self, x: Tensor, units: float) -> Tensor:
        return x * self.err(torch.ones_like(x), torch.tensor(units * self.unit, device=x.device))

    def store(self, x: Tensor) -> Tensor:
        """Return `x` as stored in the dtype of the inputs."""
        return self.err(x, (x.abs() * self.store_unit).clamp_min(self.store_floor))

    def dot(self, equation: str, x: Tensor, y: Tensor) -> Tensor:
        """Return `einsum` as `tl.dot` computes it: rounded products, added one by one in any order."""
        return self._sum_of_products(equation, x, y, block=1)

    def inner(self, equation: str, x: Tensor, y: Tensor) -> Tensor:
        """Return `einsum` as `tl.sum` computes it: sums of up to 16 rounded products, and their sum."""
        return self._sum_of_products(equation, x, y, block=16)

    def _sum_of_products(self, equation: str, x: Tensor, y: Tensor, block: int) -> Tensor:
        operands, result = equation.split("->")
        sizes = dict(zip(operands.replace(",", ""), (*x.shape, *y.shape), strict=True))
        terms = math.prod(size for letter, size in sizes.items() if letter not in result)
        total, squares = torch.einsum(equation, x, y), torch.einsum(equation, x * x, y * y)
        return self.err(total, self.unit * (squares + partial_sums(total, squares, terms, block)).sqrt())

    def sum(self, x: Tensor, dim: int, block: int = 16) -> Tensor:
        """Return the sum over `dim` as `tl.sum` computes it: sums of up to `block` terms, and their sum."""
        total, squares = x.sum(dim), (x * x).sum(dim)
        return self.err(total, self.unit * partial_sums(total, squares, x.shape[dim], block).sqrt())


def partial_sums(total: Tensor, squares: Tensor, terms: int, block: int) -> Tensor:
    """Return the sum of the squares of the partial sums that additions round: the mean over all orders.

    `total` is the sum of the terms, `squares` the sum of their squares. The mean square of a sum of j of n
    terms is j/n squares + j(j-1)/(n(n-1)) (total^2 - squares). Blocks of terms are added, then their sums.
    """
    if terms < 2:
        return torch.zeros_like(total)
    blocks = math.ceil(terms / block)
    sizes = [*range(2, block + 1)] * blocks + [min(block * i, terms) for i in range(2, blocks + 1)]
    linear, quadratic = sum(sizes) / terms, sum(j * (j - 1) for j in sizes) / (terms * (terms - 1))
    return (linear * squares + quadratic * (total.square() - squares)).clamp_min(0)


def rounding_errors(
    operation: Callable[..., dict[str, Tensor]], dtype: torch.dtype, **arguments: Any
) -> dict[str, Tensor]:
    """Return the errors `[SAMPLES, ...]` of every result of `operation`, by name.

    `operation` is one of the functions below that take a `Rounding` and the arguments of an operator.
    """
    device = arguments["dout"].device
    exact = operation(Rounding(dtype, device, samples=1), **arguments)
    rounded = operation(Rounding(dtype, device), **arguments)
    return {name: x - exact[name] for name, x in rounded.items()}


def assert_rounds(kernel: dict[str, Tensor], exact: dict[str, Tensor], errors: dict[str, Tensor]) -> None:
    """Assert that a kernel errs no more than `errors` say, in mean square and for every single element.

    `errors` take every rounding error as its largest value u; real ones spread over [-u, u], with mean square
    u^2 / 3. The probability that a sum of such errors exceeds f times its root mean square is at most
    2 exp(-f^2 / 2). The probability that the sum of squares over a tensor exceeds its mean by a factor
    1 + 2 sqrt(x / n) + 2 x / sqrt(n) is at most exp(-x), where n = (tr C)^2 / tr C^2, for the covariance C of
    the errors, counts independent causes (Hsu, Kakade and Zhang, 2012). Both probabilities are `RISK`.
    """
    assert kernel.keys() == exact.keys() == errors.keys()
    for name, result in kernel.items():
        want, samples = exact[name], errors[name]
        assert result.shape == want.shape == samples.shape[1:], name
        if not result.numel():
            continue
        assert result.isfinite().all(), f"{name} is not finite"
        error = (result.double() - want).abs()
        expected = samples.square().mean(0)
        gram = samples.reshape(SAMPLES, -1) @ samples.reshape(SAMPLES, -1).T
        between = (gram.square().sum() - gram.diag().square().sum()) / (SAMPLES * (SAMPLES - 1))
        causes = max(1.0, float(gram.diag().mean().square() / between)) if between else 1.0
        tail = math.log(1 / RISK)
        factor = (1 + 2 * math.sqrt(tail / causes) + 2 * tail / math.sqrt(causes)) / 3
        mean, allowed = error.square().mean().sqrt(), (factor * expected.mean()).sqrt()
        assert mean <= allowed, f"{name}: mean square error {mean:.3g}, roundings explain {allowed:.3g}"
        largest = math.sqrt(2 / 3 * math.log(2 * result.numel() / RISK)) * expected.sqrt()
        worst = int((error - largest).argmax())
        assert (error <= largest).all(), (
            f"{name}: element {worst} errs by {error.flatten()[worst]:.3g}, "
            f"roundings explain {largest.flatten()[worst]:.3g}"
        )


def attention(
    r: Rounding, *, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, cu_tags: Tensor,
    scale: float | None = None, weights: Tensor | None = None, bias: Tensor | None = None,
    patch_mask: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return `tag_attention` and its gradients, rounded as its kernels round (`tag_attention/README.md`)."""
    (total, heads, dim), (batch, patches, kv_heads, _) = q.shape, k.shape
    scale = dim**-0.5 if scale is None else scale
    inputs = {"q": q, "k": k, "v": v, "weights": weights, "bias": bias}
    results: dict[str, list[Tensor]] = {
        "out": [],
        **{f"d{name}": [] for name, x in inputs.items() if x is not None},
    }
    # letters of the products: r sample, t tag, k key/value head, g query head of its group, p patch, d column
    q, dout = (r.repeat(x.reshape(total, kv_heads, heads // kv_heads, dim)) for x in (q, dout))
    k, v = r.repeat(k), r.repeat(v)
    w = r.repeat(torch.ones_like(q[0, :, 0, 0, 0]) if weights is None else weights)[:, None, None, :, None]
    bias_heads = 1 if bias is None or bias.ndim == 2 else bias.shape[1]
    if bias is not None:
        bias = bias.reshape(total, bias_heads, patches).expand(total, heads, patches)
        bias = r.repeat(bias.reshape(total, kv_heads, heads // kv_heads, patches).movedim(0, 2))

    def weigh(x: Tensor, w: Tensor) -> Tensor:
        return x if weights is None else r.round(x * w)

    for b in range(batch):
        tags = slice(int(cu_tags[b]), int(cu_tags[b + 1]))
        q_b, g_b, k_b, v_b, w_b = q[:, tags], dout[:, tags], k[:, b], v[:, b], w[:, :, :, tags]
        # computed once in the forward and once again in the backward
        logits = []
        for _ in range(2):
            s = r.round(r.dot("rtkgd,rpkd->rkgtp", q_b, k_b) * scale)
            s = s if bias is None else r.round(s + bias[:, :, :, tags])
            logits.append(s if patch_mask is None else s.masked_fill(~patch_mask[b], -torch.inf))
        largest = logits[0].amax(-1, keepdim=True)
        largest = largest.masked_fill(largest == -torch.inf, 0)
        numerators, again = (r.quick(r.round(s - largest, operations=2).exp()) for s in logits)
        sums = r.sum(numerators, -1)[..., None]
        blind = sums == 0
        sums = sums.masked_fill(blind, 1)
        out = r.store(weigh(r.quick(r.dot("rkgtp,rpkd->rkgtd", r.store(numerators), v_b) / sums), w_b))
        a = r.round(again * r.quick(1 / sums).masked_fill(blind, 0))
        da = r.dot("rtkgd,rpkd->rkgtp", g_b, v_b)
        delta = r.inner("rtkgd,rkgtd->rkgt", g_b, out)[..., None]
        ds = r.round(a * r.round(weigh(da, w_b) - delta))
        results["out"].append(out.movedim(3, 1))
        results["dq"].append(r.store(r.round(r.dot("rkgtp,rpkd->rtkgd", r.store(ds), k_b) * scale)))
        results["dk"].append(r.store(r.round(r.dot("rkgtp,rtkgd->rpkd", r.store(ds), q_b) * scale)))
        results["dv"].append(r.store(r.dot("rkgtp,rtkgd->rpkd", r.store(weigh(a, w_b)), g_b)))
        if weights is not None:
            results["dweights"].append(r.store(r.sum(r.inner("rkgtp,rkgtp->rkgt", a, da).flatten(1, 2), 1)))
        if bias is not None:
            of_bias = ds.flatten(1, 2).unflatten(1, (bias_heads, -1))
            results["dbias"].append(r.store(r.sum(of_bias, 2)).movedim(1, 2))
    shapes = {"out": q.shape[1:], **{f"d{name}": x.shape for name, x in inputs.items() if x is not None}}
    shapes["out"] = shapes["dq"] = (total, heads, dim)
    # an image's part of dk and dv has patches, of all others tags
    joined = {
        name: (torch.stack if name in ("dk", "dv") else torch.cat)(parts, 1)
        for name, parts in results.items()
    }
    return {name: x.reshape(r.samples, *shapes[name]) for name, x in joined.items()}


def weighing(
    r: Rounding, *, temperature: Tensor, cu_tags: Tensor, coupling: str, threshold: float, dout: Tensor,
    tag_embeddings: Tensor | None = None, image_embeddings: Tensor | None = None,
    scores: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return `tag_weights`, or `score_weights` of `scores`, and gradients, rounded as the kernels round."""
    dout, tau = r.repeat(dout), r.repeat(temperature)[:, None]
    out, dscores, dtags, dimages, dtau = [], [], [], [], []
    for b in range(cu_tags.numel() - 1):
        tags = slice(int(cu_tags[b]), int(cu_tags[b + 1]))
        g = dout[:, tags]
        if tag_embeddings is not None and image_embeddings is not None:
            t, i = r.repeat(tag_embeddings[tags]), r.repeat(image_embeddings[b])
            squares = r.inner("rte,rte->rt", t, t), r.inner("re,re->r", i, i)[:, None]
            t_norm, i_norm = (r.quick(r.round(x.masked_fill(x == 0, torch.inf).rsqrt())) for x in squares)
            c = r.round(r.inner("rte,re->rt", t, i) * t_norm * i_norm, operations=2)
        elif scores is not None:
            c = r.repeat(scores[tags])
        largest = F.pad(c, (0, 1), value=-torch.inf).amax(1, keepdim=True)
        for_forward, e = (r.quick(r.round(r.quick(r.round(c - largest) / tau)).exp()) for _ in range(2))
        total, total_again = (r.sum(x, 1)[:, None] for x in (for_forward, e))
        if coupling == "log_bias":
            log = r.quick(r.round(c - largest) / tau)
            # a GPU's log2 errs by two units of 1 where its result is smaller
            out.append(
                r.round(r.round(r.round(log) - r.err(total.log(), 4 * r.unit * total.log().clamp_min(1))))
            )
            ds = r.round(g - r.round(r.quick(e / total_again) * r.sum(g, 1)[:, None]))
        elif coupling == "multiply":
            out.append(r.quick(for_forward / total))
            mean = r.quick(r.inner("rt,rt->r", g, e)[:, None] / total_again)
            ds = r.round(r.quick(e / total_again) * r.round(g - mean))
        else:
            kept = (e >= threshold) if coupling == "drop" else torch.ones_like(e, dtype=torch.bool)
            out.append(for_forward * kept)
            g = g * kept
            ds = r.round(r.round(g * e) - (c == largest) * r.inner("rt,rt->r", g, e)[:, None])
        dtau.append(r.sum(r.quick(r.round(ds * r.round(c - largest)) / r.round(tau * tau)), 1))
        dc = r.quick(ds / tau)
        dscores.append(r.store(dc))
        if scores is None:
            t, i = r.round(t * t_norm[..., None]), r.round(i * i_norm)[:, None]
            dtags.append(
                r.store(r.round(r.round(dc * t_norm)[..., None] * r.round(i - r.round(c[..., None] * t))))
            )
            dimages.append(
                r.store(r.inner("rt,rte->re", r.round(dc * i_norm), r.round(t - r.round(c[..., None] * i))))
            )
    results = {
        "out": torch.cat(out, 1),
        "dtemperature": -r.sum(torch.stack(dtau, 1), 1).reshape(-1, *temperature.shape),
    }
    if scores is not None:
        return {**results, "dscores": torch.cat(dscores, 1)}
    return {**results, "dtag_embeddings": torch.cat(dtags, 1), "dimage_embeddings": torch.stack(dimages, 1)}


def gathering(r: Rounding, *, table: Tensor, ids: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Return `gather_tags` and its gradient, rounded as its kernels round."""
    out = r.repeat(table)[:, ids.clamp_min(0).long()] * (ids >= 0)[:, None]
    dout = r.repeat(dout)
    return {
        "out": out,
        "dtable": torch.stack(
            [r.store(r.sum(dout[:, ids == row], 1, block=8)) for row in range(len(table))], 1
        ),
    }
