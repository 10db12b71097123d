"""Small random models of others with their real classes and processors, made without a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t

from tuna_model.presets.loading import tiny_tokenizer  # prepares torchvision for transformers

WORDS = 259
"""Tokens that are words; behind them stand those of pictures."""
TOKENS = (
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<fake_token_around_image>",
    "<global-img>", "<end_of_utterance>", "<row_1_col_1>", "<IMG_CONTEXT>", "<img>", "</img>", "<video>",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": 256, "eos_token_id": 257,
    "pad_token_id": 258,
}  # fmt: skip


def tokenizer(**names: str) -> Any:
    words = tiny_tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<image>", *TOKENS]})
    words.model_max_length = 4096
    words.padding_side = "left"
    for name, token in names.items():
        setattr(words, name, token)
        setattr(words, f"{name}_id", words.convert_tokens_to_ids(token))
    return words


def template(image: str) -> str:
    return TEMPLATE.replace("IMAGE", image)


def text_config(words: Any, kind: str = "llama") -> dict[str, Any]:
    return TEXT | {"model_type": kind, "vocab_size": len(words)}


def llava() -> tuple[Any, Any]:
    words = tokenizer()
    vision = t.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28,
        patch_size=14, projection_dim=32,
    )  # fmt: skip
    image_id = words.convert_tokens_to_ids("<image>")
    config = t.LlavaConfig(
        vision_config=vision, text_config=text_config(words), image_token_index=image_id, image_seq_length=4
    )
    pixels = t.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = t.LlavaProcessor(
        pixels, words, patch_size=14, vision_feature_select_strategy="default",
        chat_template=template("<image>"), num_additional_image_tokens=1,
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config), processor


def llava_next() -> tuple[Any, Any]:
    words = tokenizer()
    vision = t.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28,
        patch_size=14, projection_dim=32,
    )  # fmt: skip
    grid = [[28, 56], [56, 28], [56, 56]]
    image_id = words.convert_tokens_to_ids("<image>")
    config = t.LlavaNextConfig(
        vision_config=vision,
        text_config=text_config(words),
        image_token_index=image_id,
        image_grid_pinpoints=grid,
    )
    pixels = t.LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grid
    )
    processor = t.LlavaNextProcessor(
        pixels, words, patch_size=14, vision_feature_select_strategy="default",
        chat_template=template("<image>"), num_additional_image_tokens=1,
    )  # fmt: skip
    return t.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    words = tokenizer()
    vision = t.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = t.LlavaOnevisionConfig(
        vision_config=vision, text_config=text_config(words, "qwen2"),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"), image_grid_pinpoints=grid,
    )  # fmt: skip
    pixels = t.LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=grid)
    processor = t.LlavaOnevisionProcessor(
        pixels, words, t.LlavaOnevisionVideoProcessor(), num_image_tokens=4,
        vision_feature_select_strategy="full", chat_template=template("<image>"),
    )  # fmt: skip
    return t.LlavaOnevisionForConditionalGeneration(config), processor


def qwen(generation: str) -> tuple[Any, Any]:
    words = tokenizer()
    ids = {
        "image_token_id": words.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": words.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": words.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": words.convert_tokens_to_ids("<|vision_end|>"),
    }
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = TEXT | {"vocab_size": len(words), "rope_parameters": rope}
    pixels = t.Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, patch_size=14)
    if generation == "2":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
        config = t.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
        model, kind = t.Qwen2VLForConditionalGeneration(config), t.Qwen2VLProcessor
    elif generation == "2.5":
        vision = {
            "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 64,
            "fullatt_block_indexes": [1],
        }  # fmt: skip
        config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        model, kind = t.Qwen2_5_VLForConditionalGeneration(config), t.Qwen2_5_VLProcessor
    else:
        vision = {
            "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 64,
            "patch_size": 14, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
        }  # fmt: skip
        config = t.Qwen3VLConfig(text_config=text | {"head_dim": 8}, vision_config=vision, **ids)
        model, kind = t.Qwen3VLForConditionalGeneration(config), t.Qwen3VLProcessor
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    videos = t.Qwen3VLVideoProcessor() if generation == "3" else t.Qwen2VLVideoProcessor()
    return model, kind(pixels, words, videos, chat_template=template(image))


def intern_vl() -> tuple[Any, Any]:
    words = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )  # fmt: skip
    vision = t.InternVLVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=[28, 28],
        patch_size=[7, 7],
    )  # fmt: skip
    config = t.InternVLConfig(
        vision_config=vision, text_config=text_config(words, "qwen2"),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip
    pixels = t.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=False)
    processor = t.InternVLProcessor(
        pixels, words, t.InternVLVideoProcessor(), image_seq_length=4, chat_template=template("<IMG_CONTEXT>")
    )
    return t.InternVLForConditionalGeneration(config), processor


def idefics(kind: str) -> tuple[Any, Any]:
    words = tokenizer()
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 7,
    }  # fmt: skip
    image_id = words.convert_tokens_to_ids("<image>")
    common = {"scale_factor": 2, "image_token_id": image_id, "pad_token_id": 258}
    sizes = {
        "size": {"longest_edge": 28},
        "max_image_size": {"longest_edge": 28},
        "do_image_splitting": False,
    }
    if kind == "smolvlm":
        pytest.importorskip("num2words")  # its processor's; a package without a wheel below it
        config = t.SmolVLMConfig(vision_config=vision, text_config=text_config(words), **common)
        processor = t.SmolVLMProcessor(
            t.SmolVLMImageProcessor(**sizes), words, t.SmolVLMVideoProcessor(), image_seq_len=4,
            chat_template=template("<image>"),
        )  # fmt: skip
        return t.SmolVLMForConditionalGeneration(config), processor
    config = t.Idefics3Config(vision_config=vision, text_config=text_config(words), **common)
    pixels = t.Idefics3ImageProcessor(**sizes)
    processor = t.Idefics3Processor(pixels, words, image_seq_len=4, chat_template=template("<image>"))
    return t.Idefics3ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "Llava": llava,
    "LlavaNext": llava_next,
    "LlavaOnevision": llava_onevision,
    "Qwen2VL": lambda: qwen("2"),
    "Qwen2_5_VL": lambda: qwen("2.5"),
    "Qwen3VL": lambda: qwen("3"),
    "InternVL": intern_vl,
    "SmolVLM": lambda: idefics("smolvlm"),
    "Idefics3": lambda: idefics("idefics3"),
}


def small_vlm(family: str) -> tuple[Any, Any]:
    """A small random model of a family, always the same one, and its processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = FAMILIES[family]()
    # random models would say that a picture comes
    model.generation_config.suppress_tokens = list(range(WORDS, len(processor.tokenizer)))
    return model.eval(), processor
