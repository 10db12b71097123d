"""Small TUNA models and their inputs: a decoder 32 wide, a grid of 4 x 4, features instead of pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tuna_model import ImageTags, TunaForConditionalGeneration, TunaProcessor, presets

C, D, SIDE = 24, 16, 4
RESIZING = {"size": [32, 32], "interpolation": "bicubic", "resize_mode": "shortest"}
PREPROCESS = {**RESIZING, "mean": [0.5] * 3, "std": [0.5] * 3}
WORDS = ("red circle", "blue sky", "dog", "narrow street", "wine glass")
WORDS += ("Paris", "green grass", "old man", "boat", "snow")


def small(**fields: Any) -> tuple[TunaForConditionalGeneration, TunaProcessor]:
    """A random model in evaluation mode, of the same weights every time, and its processor."""
    sizes = {"grid_side": SIDE, "grid_channels": C, "tag_dimension": D}
    config = presets.tiny_config(**sizes | {"kernels": "reference"} | fields)
    torch.manual_seed(0)
    model = TunaForConditionalGeneration(config).eval()
    # fresh weights are so small that an output hardly depends on them: a test would not see a mistake
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "lm_head" not in name:
                parameter.mul_(5)
        if config.tags and config.tag_encoder_layers == 0:
            model.tag_encoder.projection.normal_()
    return model, presets.processor_for(config, presets.tiny_tokenizer(), PREPROCESS, presets.PLAIN)


def features(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Grid and image vectors of `count` pictures."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(count, D, generator=generator), dim=-1)
    return {"grid": torch.randn(count, SIDE * SIDE, C, generator=generator), "image_vectors": vectors}


def tags(count: int, seed: int = 0) -> ImageTags:
    """Tags with random embeddings and signals."""
    random = np.random.default_rng(seed)
    embeddings = random.standard_normal((count, D)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    signals = random.random((3, count)).astype(np.float32)
    texts = tuple(WORDS[(seed + i) % len(WORDS)] for i in range(count))
    return ImageTags(texts, embeddings, *signals, tuple(range(count)))


def rows(inputs: dict[str, torch.Tensor], images: slice) -> dict[str, torch.Tensor]:
    """The features of some pictures."""
    return {name: tensor[images] for name, tensor in inputs.items()}
