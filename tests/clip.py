"""A small random CLIP of transformers, in a directory as the hub has it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel

from tuna_model import presets


def write_clip(
    directory: Path, *, seed: int = 0, activation: str = "quick_gelu", **preprocess: object
) -> Path:
    """Write a model of 3 layers of width 32 with vectors of 16 dimensions and 4 patches an image."""
    directory.mkdir(parents=True, exist_ok=True)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape["hidden_act"] = activation
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    config = CLIPConfig(
        vision_config={**shape, "image_size": 28, "patch_size": 14, "projection_dim": 16},
        text_config={**shape, **ids, "vocab_size": 260, "max_position_embeddings": 24, "projection_dim": 16},
        projection_dim=16,
    )
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(directory)
    tokenizer = presets.tiny_tokenizer()
    # CLIP reads a text's vector at its end token
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    tokenizer.save_pretrained(directory)
    cropping = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    cropping |= {"do_center_crop": True, "resample": 3}
    colours = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    stored = {"image_processor_type": "CLIPImageProcessor", **cropping, **colours, **preprocess}
    (directory / "preprocessor_config.json").write_text(json.dumps(stored))
    return directory
