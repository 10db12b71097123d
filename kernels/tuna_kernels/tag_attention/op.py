"""`tag_attention`: its checks, the choice of its implementation, and its registration with torch."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..backend import choose, values_known
from . import reference


@overload
def tag_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_tags: Tensor, *, scale: float | None = ...,
    weights: Tensor | None = ..., bias: Tensor | None = ..., patch_mask: Tensor | None = ...,
    impl: str = ..., max_tags: int | None = ..., return_attention: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def tag_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_tags: Tensor, *, scale: float | None = ...,
    weights: Tensor | None = ..., bias: Tensor | None = ..., patch_mask: Tensor | None = ...,
    impl: str = ..., max_tags: int | None = ..., return_attention: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def tag_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_tags: Tensor,
    *,
    scale: float | None = None,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    patch_mask: Tensor | None = None,
    impl: str = "auto",
    max_tags: int | None = None,
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Let every tag attend over the patches of its own image.

    `out[t] = weights[t] * softmax(scale * q[t] k[b]^T + bias[t]) v[b]`: the cross-attention of TUNA's
    image-aware tag encoder (arXiv 2406.10839, section 3). Differentiable in q, k, v, weights and bias.

    Args:
        q: `[T, H, D]`, the tags of all images one after the other; D from 16 to 256.
        k, v: `[B, P, Hkv, D]` patches, in the dtype of q; H is a multiple of Hkv (grouped-query attention).
        cu_tags: int32 `[B + 1]` from 0 to T: image b owns the tags `cu_tags[b]:cu_tags[b + 1]`, which may be
            none. The values are checked on the CPU only: on a GPU that would wait for the device.
        scale: factor of the logits; `D ** -0.5` if None.
        weights: `[T]`, multiplied into the output (the `multiply` couplings of `tag_weights`).
        bias: `[T, P]`, `[T, 1, P]` or `[T, H, P]`, added to the logits, such as a prior over patches. Softmax
            cancels a bias that all patches of a tag share: log-weights belong where tags are *keys*.
        patch_mask: bool `[B, P]`, True where a patch may be seen. A tag that sees no patch gets zeros, and
            zero gradients.
        impl: "auto", "triton" or "reference"; see `tuna_kernels.backend`.
        max_tags: an upper bound of the tags of one image, if known. It saves the reference a host sync and
            lets torch.compile trace it in one graph; the kernels do not need it.
        return_attention: also return the attention `[T, H, P]` (before `weights`), without gradient.

    Returns:
        `[T, H, D]` in the dtype of q, contiguous; with `return_attention` a pair.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        RuntimeError: `impl="triton"` cannot run, or has no forward-mode derivatives; the message says why.
    """
    _check(q, k, v, cu_tags, weights, bias, patch_mask)
    if max_tags is not None and values_known(cu_tags):
        largest = reference.most_tags(cu_tags)
        if largest > max_tags:
            raise ValueError(f"tag_attention: an image has {largest} tags, more than max_tags={max_tags}")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not choose(impl, "tag_attention", q, k, v, weights, bias):
        out, attention = reference.tag_attention(
            q,
            k,
            v,
            cu_tags,
            scale=scale,
            weights=weights,
            bias=bias,
            patch_mask=patch_mask,
            max_tags=max_tags,
        )
        return (out, attention.detach()) if return_attention else out
    if not 16 <= q.shape[-1] <= 256:
        raise ValueError(
            f"tag_attention: the kernels take a head dimension D from 16 to 256, got {q.shape[-1]}; "
            "impl='reference' takes any"
        )
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    weights = None if weights is None else weights.contiguous()
    cu_tags = cu_tags.contiguous()
    out, stats = torch.ops.tuna_kernels.tag_attention_forward(
        q, k, v, cu_tags, scale, weights, bias, patch_mask
    )
    if not return_attention:
        return out  # type: ignore[no-any-return]
    with torch.no_grad():
        return out, torch.ops.tuna_kernels.tag_attention_maps(q, k, cu_tags, stats, scale, bias, patch_mask)


def _unit_stride(x: Tensor) -> Tensor:
    """Return `x`, copied unless its last stride is 1, which the kernels need; they take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_cu_tags(op: str, cu_tags: Tensor, total: int) -> None:
    """Refuse offsets that are not int32 `[B + 1]` rising from 0 to `total`; check values on the CPU only."""
    if cu_tags.ndim != 1 or cu_tags.numel() < 1 or cu_tags.dtype != torch.int32:
        raise ValueError(f"{op}: cu_tags must be int32 [B + 1], got {_shape(cu_tags)}")
    if values_known(cu_tags):
        if int(cu_tags[0]) != 0 or int(cu_tags[-1]) != total:
            raise ValueError(
                f"{op}: cu_tags must run from 0 to {total}, the number of tags, "
                f"got {int(cu_tags[0])} to {int(cu_tags[-1])}"
            )
        if bool((cu_tags[1:] < cu_tags[:-1]).any()):
            raise ValueError(f"{op}: cu_tags must not fall, got {cu_tags.tolist()}")


def _shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_tags: Tensor,
    weights: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
) -> None:
    if q.ndim != 3 or k.ndim != 4 or k.shape != v.shape or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            "tag_attention: expected q [T, H, D] and k, v [B, P, Hkv, D], "
            f"got q {_shape(q)}, k {_shape(k)}, v {_shape(v)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"tag_attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    (total, heads, _), (batch, patches, kv_heads, _) = q.shape, k.shape
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"tag_attention: the {heads} heads of q must be a multiple of the {kv_heads} heads of k and v"
        )
    check_cu_tags("tag_attention", cu_tags, total)
    if cu_tags.numel() != batch + 1:
        raise ValueError(
            f"tag_attention: cu_tags must have {batch + 1} values for the {batch} images of k, "
            f"got {cu_tags.numel()}"
        )
    if weights is not None and weights.shape != (total,):
        raise ValueError(f"tag_attention: weights must be [{total}], one for each tag, got {_shape(weights)}")
    if bias is not None:
        if bias.ndim == 1:
            raise ValueError(
                f"tag_attention: a bias {_shape(bias)} is the same for all patches, so it "
                "changes nothing under softmax; give [T, P] or [T, H, P], "
                "or use the log-weights where tags are keys"
            )
        if bias.shape not in ((total, patches), (total, 1, patches), (total, heads, patches)):
            raise ValueError(
                f"tag_attention: bias must be {[total, patches]} or [{total}, 1 or {heads}, {patches}], "
                f"got {_shape(bias)}"
            )
    if mask is not None and (mask.shape != (batch, patches) or mask.dtype != torch.bool):
        raise ValueError(f"tag_attention: patch_mask must be bool {[batch, patches]}, got {_shape(mask)}")
    for name, other in (
        ("k", k),
        ("v", v),
        ("cu_tags", cu_tags),
        ("weights", weights),
        ("bias", bias),
        ("patch_mask", mask),
    ):
        if other is not None and other.device != q.device:
            raise ValueError(
                f"tag_attention: q is on {q.device} and {name} on {other.device}: move them to one device"
            )


# device_of: Triton launches on the current device, which need not be the tensors'


@torch.library.custom_op("tuna_kernels::tag_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_tags: Tensor,
    scale: float,
    weights: Tensor | None,
    bias: Tensor | None,
    patch_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from .forward import forward

    with torch.cuda.device_of(q):
        return forward(q, k, v, cu_tags, scale, weights, bias, patch_mask)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_tags: Tensor,
    scale: float,
    weights: Tensor | None,
    bias: Tensor | None,
    patch_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((2, *q.shape[:2]), dtype=torch.float32)


@torch.library.custom_op("tuna_kernels::tag_attention_maps", mutates_args=())
def _maps(
    q: Tensor,
    k: Tensor,
    cu_tags: Tensor,
    stats: Tensor,
    scale: float,
    bias: Tensor | None,
    patch_mask: Tensor | None,
) -> Tensor:
    from .forward import attention_maps

    with torch.cuda.device_of(q):
        return attention_maps(q, k, cu_tags, stats, scale, bias, patch_mask)


@_maps.register_fake
def _(
    q: Tensor,
    k: Tensor,
    cu_tags: Tensor,
    stats: Tensor,
    scale: float,
    bias: Tensor | None,
    patch_mask: Tensor | None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], k.shape[1]))


@torch.library.custom_op("tuna_kernels::tag_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_tags: Tensor, out: Tensor, stats: Tensor, scale: float,
    weights: Tensor | None, bias: Tensor | None, patch_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from .backward import backward

    with torch.cuda.device_of(q):
        dq, dk, dv, dweights = backward(dout, q, k, v, cu_tags, out, stats, scale, weights, bias, patch_mask)
        return dq, dk, dv, q.new_empty(0) if dweights is None else dweights


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_tags: Tensor, out: Tensor, stats: Tensor, scale: float,
    weights: Tensor | None, bias: Tensor | None, patch_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dweights = q.new_empty(0) if weights is None else weights.new_empty(weights.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dweights


@torch.library.custom_op("tuna_kernels::tag_attention_bias_gradient", mutates_args=())
def _bias_gradient(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_tags: Tensor, out: Tensor, stats: Tensor, scale: float,
    weights: Tensor | None, bias: Tensor, patch_mask: Tensor | None,
) -> Tensor:  # fmt: skip
    from .backward import bias_gradient

    with torch.cuda.device_of(q):
        return bias_gradient(dout, q, k, v, cu_tags, out, stats, scale, weights, bias, patch_mask)


@_bias_gradient.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_tags: Tensor, out: Tensor, stats: Tensor, scale: float,
    weights: Tensor | None, bias: Tensor, patch_mask: Tensor | None,
) -> Tensor:  # fmt: skip
    return bias.new_empty(bias.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_tags, scale, weights, bias, patch_mask = inputs
    out, stats = output
    ctx.save_for_backward(q, k, v, cu_tags, out, stats, weights, bias, patch_mask)
    ctx.scale = scale


def _gradients(ctx: Any, dout: Tensor, _dstats: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_tags, out, stats, weights, bias, patch_mask = ctx.saved_tensors
    dout = _unit_stride(dout)
    need_weights, need_bias = ctx.needs_input_grad[5:7]
    dq = dk = dv = dweights = dbias = None
    if any(ctx.needs_input_grad[:3]) or need_weights:
        dq, dk, dv, dweights = torch.ops.tuna_kernels.tag_attention_backward(
            dout, q, k, v, cu_tags, out, stats, ctx.scale, weights, bias, patch_mask
        )
    if need_bias:
        dbias = torch.ops.tuna_kernels.tag_attention_bias_gradient(
            dout, q, k, v, cu_tags, out, stats, ctx.scale, weights, bias, patch_mask
        )
    return dq, dk, dv, None, None, dweights if need_weights else None, dbias, None


_forward.register_autograd(_gradients, setup_context=_setup)
