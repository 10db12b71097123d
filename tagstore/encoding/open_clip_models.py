"""Load the model of an encoder: `mini` from packages, one from a directory, or a named one from a hub.

Each loader gives the model in fp32 on the CPU, its tokenizer, and the named tensors that its fingerprint
hashes. Nothing here chooses weights on its own: a model that would come out random is refused, unless
`NAME/random` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, NamedTuple

from tagstore.errors import InvalidInput, NotFound, Unavailable

if TYPE_CHECKING:
    import torch

LOCAL = "local-dir:"
HF = "hf:"
RANDOM = "random"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth")
_USAGE = (
    "an encoder is 'mini', an open_clip model NAME/TAG such as ViT-L-14/openai, "
    f"{LOCAL}PATH, or {HF}NAME-or-PATH"
)


class Source(NamedTuple):
    """A loaded model."""

    model: Any
    """An `open_clip` model, or `hf_models.ClipModel`; fp32, on the CPU."""
    tokenizer: Callable[[list[str]], Any]
    """Texts to token ids `[N, L]`."""
    weights: Iterable[tuple[str, Any]]
    """The named tensors that decide its vectors."""
    quick_gelu: bool | None = None
    """Whether it uses QuickGELU; None: its modules show it."""


def load(spec: str) -> Source:
    """Load the model that `spec` names, as `load_encoder` explains. torchvision must be importable by now."""
    if spec == "mini":
        return _mini()
    if spec.startswith(LOCAL):
        return _local(spec)
    if spec.startswith(HF):
        from tagstore.encoding.hf_models import load_clip

        model, tokenizer, quick_gelu = load_clip(spec.removeprefix(HF))
        return Source(model, tokenizer, model.clip.state_dict().items(), quick_gelu)
    return _named(spec)


def _mini() -> Source:
    from open_clip.tokenizer import HFTokenizer

    from tagstore.encoding import mini

    model, weights = mini.build()
    text = mini.config()["model_cfg"]["text_cfg"]
    return Source(
        model, HFTokenizer(text["hf_tokenizer_name"], context_length=text["context_length"]), weights
    )


def _local(spec: str) -> Source:
    import open_clip
    from safetensors import SafetensorError

    directory = Path(spec.removeprefix(LOCAL))
    config = directory / "open_clip_config.json"
    if not config.is_file():
        raise NotFound(
            f"no open_clip_config.json in {directory.absolute()}: "
            f"'{LOCAL}PATH' takes a directory in open_clip's layout"
        )
    # open_clip would go on with random weights here
    if not any(path for pattern in _WEIGHTS for path in directory.glob(pattern)):
        raise NotFound(
            f"no weights ({', '.join(_WEIGHTS)}) beside {config}: copy open_clip_model.safetensors there"
        )
    try:
        model = open_clip.create_model(spec, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(spec)
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        raise InvalidInput(
            f"{directory} is no model that open_clip can load: {_first_line(error)}"
        ) from error
    return Source(model, tokenizer, model.state_dict().items())


def _named(spec: str) -> Source:
    import open_clip
    import torch

    name, _, tag = spec.partition("/")
    if name not in open_clip.list_models():
        raise NotFound(
            f"no encoder '{spec}'{_suggestion(name, ['mini', *open_clip.list_models()])}: {_USAGE}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tag:
        known = (
            f"its pretrained tags are {', '.join(tags)}"
            if tags
            else "open_clip knows no pretrained weights of it"
        )
        raise InvalidInput(
            f"'{spec}' names an architecture without weights: {known}. "
            f"Pass {name}/TAG (or {name}/{RANDOM} for random weights)"
        )
    if tag == RANDOM:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.create_model(name, pretrained_text=False)
        return Source(model, open_clip.get_tokenizer(name), model.state_dict().items())
    if not open_clip.get_pretrained_cfg(name, tag):
        raise NotFound(
            f"'{name}' has no pretrained tag '{tag}'{_suggestion(tag, tags)}: "
            f"it has {', '.join(tags) or 'none'}"
        )
    # open_clip only warns when a tag was trained with QuickGELU and the plain name is asked for, and then
    # computes other vectors
    quick_gelu = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    try:
        model = open_clip.create_model(name, tag, require_pretrained=True, force_quick_gelu=quick_gelu)
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError) as error:
        raise Unavailable(
            f"the weights of '{spec}' could not be fetched: {_first_line(error)}. "
            f"Check the network, or fetch them elsewhere, copy the directory here and "
            f"pass '{LOCAL}PATH'. The encoder 'mini' needs no network"
        ) from error
    return Source(model, tokenizer, model.state_dict().items())


def grid_and_vectors(visual: Any, pixels: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward of an image tower: grid `[N, P, C]` of a block, raw vectors `[N, D]`."""
    from open_clip.timm_model import TimmModel

    if hasattr(visual, "grid_and_vectors"):
        return visual.grid_and_vectors(pixels, layer)  # type: ignore[no-any-return]
    if layer == -1 and isinstance(visual, TimmModel):
        # timm's intermediates end before the last convolution; what is pooled comes after it
        features = visual.trunk.forward_features(pixels)
        vectors = visual.head(visual.trunk.forward_head(features))
        if features.ndim == 3:
            return features[:, getattr(visual.trunk, "num_prefix_tokens", 0) :], vectors
        last = getattr(visual.trunk, "output_fmt", "NCHW") == "NHWC"
        return features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2), vectors
    try:
        output = visual.forward_intermediates(
            pixels, indices=[layer], normalize_intermediates=layer == -1, output_fmt="NCHW"
        )
    except (AssertionError, IndexError) as error:
        raise InvalidInput(f"the image tower has no layer {layer}") from error
    return output["image_intermediates"][0].flatten(2).transpose(1, 2), output["image_features"]


def pooled_and_vectors(visual: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward of a timm tower: what it pools `[N, C]`, and raw vectors `[N, D]`.

    Raises:
        InvalidInput: another tower.
    """
    from open_clip.timm_model import TimmModel

    if not isinstance(visual, TimmModel):
        raise InvalidInput("this image tower is not one of timm: what it pools cannot be had apart")
    pooled = visual.trunk(pixels)
    return pooled, visual.head(pooled)


def grid_projection(visual: Any) -> torch.Tensor:
    """The matrix `[C, D]` from a point of the tower's last grid to the space of its vectors, without biases.

    Raises:
        InvalidInput: a tower that pools by attention has no such matrix.
    """
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if hasattr(visual, "projection"):
        return visual.projection.weight.T  # type: ignore[no-any-return]
    if isinstance(visual, VisionTransformer) and visual.proj is not None and visual.attn_pool is None:
        return visual.proj  # type: ignore[no-any-return]
    if isinstance(visual, TimmModel) and hasattr(visual.head, "proj") and hasattr(visual.head.proj, "weight"):
        return visual.head.proj.weight.T  # type: ignore[no-any-return]
    raise InvalidInput(
        "this image tower has no matrix from its grid to its vectors: take a tag encoder with learned layers"
    )


def _suggestion(word: str, known: list[str]) -> str:
    by_folded = {name.lower(): name for name in known}
    matches = [by_folded[match] for match in get_close_matches(word.lower(), by_folded, n=3)]
    return f" (did you mean {' or '.join(matches)}?)" if matches else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0].strip()[:300] if lines else type(error).__name__
