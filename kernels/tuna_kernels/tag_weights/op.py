"""`tag_weights` and `score_weights`: checks, choice of implementation, and registration with torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import choose
from ..tag_attention.op import check_cu_tags
from . import reference

COUPLINGS = ("multiply", "multiply_max", "log_bias", "drop")


def tag_weights(
    tag_embeddings: Tensor,
    image_embeddings: Tensor,
    cu_tags: Tensor,
    *,
    temperature: float | Tensor,
    coupling: str = "multiply",
    threshold: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Return each tag's weight: `softmax(cos(tag, image) / temperature)` over the tags of an image, coupled.

    TUNA's adaptive weight tuner (arXiv 2406.10839, section 3). Differentiable in all three.

    | coupling | weight of tag i, with w = softmax over its image's tags | where it goes |
    | --- | --- | --- |
    | `"multiply"` | w_i; sums to 1 over an image | `tag_attention(weights=)`; times the word embeddings |
    | `"multiply_max"` | w_i / max w: the best tag keeps 1 however many there are | the same |
    | `"drop"` | w_i / max w where that is >= threshold, else 0 | the same; prompts omit tags of weight 0 |
    | `"log_bias"` | log w_i | added to the logits of the LLM's attention at the keys of the tag's tokens |

    `"log_bias"` is not for `tag_attention(bias=)`: there tags are queries, and softmax over patches cancels a
    bias that is the same for all patches. `tag_attention` refuses it.

    Args:
        tag_embeddings: `[T, E]`, the tags of all images one after the other. Only directions count.
        image_embeddings: `[B, E]`, in the dtype of the tags. A row of zeros has cosine 0 and no gradient.
        cu_tags: int32 `[B + 1]`, as for `tag_attention`.
        temperature: a positive number, or a tensor of one element that may be trained. At CLIP's, about 0.01,
            one tag takes nearly all the weight; at 1 the weights are nearly equal.
        coupling: one of the above.
        threshold: for `"drop"`, in [0, 1].
        impl: "auto", "triton" or "reference"; see `tuna_kernels.backend`.

    Returns:
        `[T]` float32 (float64 for float64 input, which only the reference takes).

    Raises:
        ValueError: shapes, dtypes or settings that do not fit.
        RuntimeError: `impl="triton"` cannot run; the message says why.
    """
    if (
        tag_embeddings.ndim != 2
        or image_embeddings.ndim != 2
        or tag_embeddings.shape[1] != image_embeddings.shape[1]
    ):
        raise ValueError(
            f"tag_weights: expected tag_embeddings [T, E] and image_embeddings [B, E], "
            f"got {list(tag_embeddings.shape)} and {list(image_embeddings.shape)}"
        )
    if tag_embeddings.dtype != image_embeddings.dtype or tag_embeddings.device != image_embeddings.device:
        raise ValueError(
            f"tag_weights: tag_embeddings ({tag_embeddings.dtype}, {tag_embeddings.device}) and "
            f"image_embeddings ({image_embeddings.dtype}, {image_embeddings.device}) "
            "must have one dtype and device"
        )
    _check("tag_weights", tag_embeddings, cu_tags, temperature, coupling, threshold)
    if cu_tags.numel() != image_embeddings.shape[0] + 1:
        raise ValueError(
            f"tag_weights: cu_tags must have {image_embeddings.shape[0] + 1} values, got {cu_tags.numel()}"
        )
    learned = temperature if isinstance(temperature, Tensor) else None
    if not choose(impl, "tag_weights", tag_embeddings, image_embeddings, learned):
        scores = reference.cosines(tag_embeddings, image_embeddings, cu_tags)
        return reference.score_weights(
            scores, cu_tags, temperature=temperature, coupling=coupling, threshold=threshold
        )
    tags = tag_embeddings if tag_embeddings.stride(-1) == 1 else tag_embeddings.contiguous()
    images = image_embeddings if image_embeddings.stride(-1) == 1 else image_embeddings.contiguous()
    return _launch(tags, images, None, cu_tags, temperature, coupling, threshold)


def score_weights(
    scores: Tensor,
    cu_tags: Tensor,
    *,
    temperature: float | Tensor,
    coupling: str = "multiply",
    threshold: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Return `tag_weights` of scores `[T]` instead of cosines, such as the similarity of a retrieved tag.

    Arguments, result and errors are those of `tag_weights`. Differentiable in the scores and the temperature.
    """
    if scores.ndim != 1:
        raise ValueError(f"score_weights: expected scores [T], got {list(scores.shape)}")
    _check("score_weights", scores, cu_tags, temperature, coupling, threshold)
    if not choose(impl, "score_weights", scores, temperature if isinstance(temperature, Tensor) else None):
        return reference.score_weights(
            scores, cu_tags, temperature=temperature, coupling=coupling, threshold=threshold
        )
    return _launch(None, None, scores.contiguous(), cu_tags, temperature, coupling, threshold)


def _launch(
    tags: Tensor | None, images: Tensor | None, scores: Tensor | None, cu_tags: Tensor,
    temperature: float | Tensor, coupling: str, threshold: float,
) -> Tensor:  # fmt: skip
    learned = temperature if isinstance(temperature, Tensor) else None
    tau = 0.0 if isinstance(temperature, Tensor) else float(temperature)
    result = torch.ops.tuna_kernels.tag_weights_forward(
        tags, images, scores, learned, cu_tags.contiguous(), tau, threshold, coupling
    )
    return result[0]  # type: ignore[no-any-return]


def _check(
    op: str, given: Tensor, cu_tags: Tensor, temperature: float | Tensor, coupling: str, threshold: float
) -> None:
    if coupling not in COUPLINGS:
        raise ValueError(f"{op}: coupling must be one of {', '.join(COUPLINGS)}, got {coupling!r}")
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(
            f"{op}: threshold must be in [0, 1] (a share of the best tag's weight), got {threshold}"
        )
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or temperature.device != given.device:
            raise ValueError(
                f"{op}: a temperature tensor must have one element on {given.device}, "
                f"got {list(temperature.shape)} on {temperature.device}"
            )
    elif not temperature > 0:
        raise ValueError(f"{op}: temperature must be positive, got {temperature}")
    check_cu_tags(op, cu_tags, given.shape[0])
    if cu_tags.device != given.device:
        raise ValueError(
            f"{op}: the tags are on {given.device} and cu_tags on {cu_tags.device}: move them to one device"
        )


@torch.library.custom_op("tuna_kernels::tag_weights_forward", mutates_args=())
def _forward(
    tags: Tensor | None, images: Tensor | None, scores: Tensor | None, temperature: Tensor | None,
    cu_tags: Tensor, tau: float, threshold: float, coupling: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from .kernels import forward

    with torch.cuda.device_of(cu_tags):
        return forward(tags, images, scores, temperature, cu_tags, tau, threshold, coupling)


@_forward.register_fake
def _(
    tags: Tensor | None, images: Tensor | None, scores: Tensor | None, temperature: Tensor | None,
    cu_tags: Tensor, tau: float, threshold: float, coupling: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = tags if scores is None else scores
    assert given is not None, "either embeddings or scores"
    weights, cosine, tag_norm = (given.new_empty(given.shape[0], dtype=torch.float32) for _ in range(3))
    return weights, cosine, tag_norm, given.new_empty(cu_tags.shape[0] - 1, dtype=torch.float32)


@torch.library.custom_op("tuna_kernels::tag_weights_backward", mutates_args=())
def _backward(
    grad: Tensor, tags: Tensor | None, images: Tensor | None, scores: Tensor | None,
    temperature: Tensor | None, cu_tags: Tensor, cosine: Tensor, tag_norm: Tensor, image_norm: Tensor,
    tau: float, threshold: float, coupling: str, need_tags: bool, need_images: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from .kernels import backward

    with torch.cuda.device_of(cu_tags):
        gradients = backward(
            grad,
            tags,
            images,
            scores,
            temperature,
            cu_tags,
            cosine,
            tag_norm,
            image_norm,
            tau,
            threshold,
            coupling,
            need_tags,
            need_images,
        )
        # an operator returns tensors: an empty one stands for none
        dtags, dimages, dscores, dtau = (grad.new_empty(0) if x is None else x for x in gradients)
        return dtags, dimages, dscores, dtau


@_backward.register_fake
def _(
    grad: Tensor, tags: Tensor | None, images: Tensor | None, scores: Tensor | None,
    temperature: Tensor | None, cu_tags: Tensor, cosine: Tensor, tag_norm: Tensor, image_norm: Tensor,
    tau: float, threshold: float, coupling: str, need_tags: bool, need_images: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (tags if need_tags else None, images if need_images else None, scores, temperature)
    dtags, dimages, dscores, dtau = (grad.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)
    return dtags, dimages, dscores, dtau


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tags, images, scores, temperature, cu_tags, *ctx.settings = inputs
    ctx.save_for_backward(tags, images, scores, temperature, cu_tags, *output[1:])


def _gradients(ctx: Any, grad: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:4]
    gradients = torch.ops.tuna_kernels.tag_weights_backward(
        grad.contiguous(), *ctx.saved_tensors, *ctx.settings, needs[0], needs[1]
    )
    return *(x if need else None for need, x in zip(needs, gradients, strict=True)), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
