"""CLIP models of transformers (`hf:NAME-or-directory`), with the interface of an open_clip model.

LLaVA's weights were trained on the tower of such a checkpoint: store and model take it from the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tagstore.errors import InvalidInput, NotFound, Unavailable

if TYPE_CHECKING:
    from torch import Tensor

_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""Numbers in PIL of the filters that open_clip has names for."""


class ClipModel(nn.Module):
    """transformers' CLIPModel under the names that `Encoder` calls."""

    def __init__(self, clip: Any, preprocess: Mapping[str, Any]) -> None:
        super().__init__()
        self.clip = clip
        self.visual = ClipVisual(clip, preprocess)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Raw vectors `[N, D]`."""
        return self.visual.grid_and_vectors(pixels, -1)[1]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Raw vectors `[N, D]` of token ids `[N, L]`."""
        return self.clip.get_text_features(input_ids=tokens).pooler_output  # type: ignore[no-any-return]


class ClipVisual(nn.Module):
    """The image tower of a CLIPModel."""

    def __init__(self, clip: Any, preprocess: Mapping[str, Any]) -> None:
        super().__init__()
        self.tower, self.projection = clip.vision_model, clip.visual_projection
        self.preprocess_cfg = dict(preprocess)

    def grid_and_vectors(self, pixels: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Grid `[N, P, C]` of a block and raw vectors `[N, D]`, in one forward."""
        grid, pooled = clip_grid(self.tower, pixels, layer)
        return grid, self.projection(pooled)


def clip_grid(tower: Any, pixels: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Run a CLIPVisionModel: patches `[N, P, C]` of a block, without the class token, and pooled `[N, C]`.

    Args:
        tower: transformers' CLIPVisionModel.
        pixels: `[N, 3, H, W]`, normalised.
        layer: from the end; -1 is the last block behind the tower's last norm, -2 the one before it as it is
            (LLaVA's).

    Raises:
        InvalidInput: no such layer.
    """
    if not 1 <= -layer <= tower.config.num_hidden_layers + 1:
        raise InvalidInput(f"the image tower has no layer {layer}")
    out = tower(pixels, output_hidden_states=True)
    grid = out.hidden_states[layer][:, 1:]
    return tower.post_layernorm(grid) if layer == -1 else grid, out.pooler_output


def load_clip(place: str) -> tuple[ClipModel, Callable[[list[str]], Tensor], bool]:
    """Model (fp32, on the CPU), tokenizer (texts to ids `[N, L]`) and whether it uses QuickGELU.

    Args:
        place: a name on the hub, or a directory in the hub's layout. Weights are read as safetensors only.

    Raises:
        NotFound: a directory that is not there or lacks a file.
        InvalidInput: it holds something else than CLIP, or images prepared in a way that open_clip does not
            know.
        Unavailable: the hub cannot be reached.
    """
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    from transformers.image_processing_utils import BaseImageProcessor

    directory = Path(place)
    local = directory.is_dir()
    if not local and (place.startswith((".", "/", "~")) or place.count("/") > 1 or not place):
        raise NotFound(
            f"no directory {directory.absolute()}: 'hf:PLACE' takes a directory in the hub's layout, "
            "or a name such as openai/clip-vit-large-patch14"
        )
    try:
        config = CLIPConfig.from_pretrained(place)
        stored, _ = BaseImageProcessor.get_image_processor_dict(place)
        clip, notes = CLIPModel.from_pretrained(
            place, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        first = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        if local:
            raise InvalidInput(f"{directory} is no CLIPModel that transformers can load: {first}") from error
        raise Unavailable(
            f"'hf:{place}' could not be fetched: {first}. Check the name and the network, or fetch it "
            "elsewhere, copy the directory here and pass 'hf:DIRECTORY'"
        ) from error
    if notes["missing_keys"]:
        raise InvalidInput(f"hf:{place} lacks weights: {', '.join(sorted(notes['missing_keys'])[:3])}")
    preprocess = clip_preprocess(stored)
    length = config.text_config.max_position_embeddings

    def tokenize(texts: list[str]) -> Tensor:
        tokens = tokenizer(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        return tokens["input_ids"]  # type: ignore[no-any-return]

    quick = "quick_gelu" in (config.vision_config.hidden_act, config.text_config.hidden_act)
    return ClipModel(clip, preprocess), tokenize, quick


def clip_preprocess(stored: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json of a CLIP as fields of open_clip's PreprocessCfg.

    Raises:
        InvalidInput: it prepares images in a way that open_clip has no name for.
    """
    size, crop = stored.get("size"), stored.get("crop_size", stored.get("size"))
    # old files have one number, new ones names of sides
    size = {"shortest_edge": size} if isinstance(size, int) else dict(size or {})
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else dict(crop or {})
    cropped = stored.get("do_center_crop", True)
    sides = crop if cropped else size
    target: list[Any] = [
        sides.get(name, sides.get("shortest_edge") if cropped else None) for name in ("height", "width")
    ]
    known = None not in target and stored.get("resample", 3) in _FILTERS
    if not known or (cropped and size.get("shortest_edge") != min(target)):
        raise InvalidInput(
            f"images are prepared with size {stored.get('size')}, crop {stored.get('crop_size')}, filter "
            f"{stored.get('resample')}: only the shorter side to the size of a centre crop, or a fixed size "
            "without crop, can be done here"
        )
    return {
        "size": tuple(int(value) for value in target),
        "mode": "RGB",
        "mean": tuple(stored["image_mean"]),
        "std": tuple(stored["image_std"]),
        "interpolation": _FILTERS[stored.get("resample", 3)],
        "resize_mode": "shortest" if cropped else "squash",
        "fill_color": 0,
    }
