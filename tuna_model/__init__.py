"""TUNA: a multimodal model that grounds its answers in the tags of similar images.

    from tuna_model import Pipeline

    tuna = Pipeline.load("smol", store="grpc://localhost:50051/flickr8k")     # preset or directory
    answer = tuna.answer("picture.jpg", "What is on the table?")              # .text, .tags, .degraded

or by its parts, which are those of transformers:

    model, processor = presets.load("smol")              # preset or directory
    pixels = processor.image_processor(images)["pixel_values"]           # [N, 3, H, W] float32
    grid, vectors = model.encode_images(pixels)          # [N, P, C], [N, D] from the frozen encoder
    lookup = TagLookup.of(connect(URL), model.config)
    tags = lookup(vectors, model.config.encoder_digest)  # N ImageTags; empty ones if the store is down
    batch = processor(text=prompts, tags=tags)           # "<image>" takes the next image and its tags
    model(**batch, grid=grid, image_vectors=vectors, labels=labels).loss

Tensors of `TunaForConditionalGeneration.forward`: B prompts of L tokens; N images and T tags in all, in the
order of the prompts.

| name | shape | meaning |
| --- | --- | --- |
| input_ids, attention_mask | `[B, L]` int64 | `image_token_id` stands for every image token and every H_vt |
| pixel_values | `[N, 3, H, W]` float | normalised for the encoder |
| grid, image_vectors | `[N, P, C]`, `[N, D]` float | instead of pixels: features that were computed before |
| tag_index | `[B, L]` int64 | number of a word's tag in T; at H_vt of its query; -1 elsewhere |
| tag_embeddings | `[T, D]` float32 | text embeddings, from the store |
| tag_signals | `[T, 2]` float32 | similarity, vote share |
| cu_tags | `[N + 1]` int32 | image n owns the tags cu_tags[n]:cu_tags[n + 1] |
| tag_word_ids, tag_lengths | `[M]`, `[T]` int64 | for `tag_queries="token"`: words of tags, count of each |
| labels | `[B, L]` int64 | -100 is not learned |

Without tags the tag tensors are absent (or T = 0). The output has loss, logits, past_key_values,
image_hidden_states `[N, tokens, hidden]`, tag_hidden_states `[T or M, hidden]` (H_vt before weighting),
tag_weights `[T]`, and with `output_tag_attention=True` tag_attention `[T or M, P]`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tagstore.encoding.torchvision_shim import prepare_when_imported

# transformers, which most modules here import, imports torchvision
prepare_when_imported()

_HOMES = {
    "ContrastiveLogits": "inference.contrastive",
    "Answer": "inference.answers",
    "Pipeline": "inference.pipeline",
    "ImageTags": "processing.tags",
    "TagLookup": "processing.tags",
    "TunaConfig": "modeling.config",
    "TunaForConditionalGeneration": "modeling.model",
    "TunaImageProcessor": "processing.image_processor",
    "TunaProcessor": "processing.processor",
    "tag_prompt": "inference.prompt",
    "with_tags": "inference.with_tags",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # lazily: `tuna --help` and the prompt builder need neither torch nor transformers
    if name in _HOMES:
        return getattr(import_module(f"tuna_model.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tuna_model' has no attribute '{name}'")
