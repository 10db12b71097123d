"""What stands in a prompt for a picture and its tags: token ids, and the embeddings that take their places.

Any engine that takes embeddings in the place of tokens can serve TUNA with these two functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tagstore.errors import InvalidInput
from tuna_model.modeling.config import TunaConfig
from tuna_model.modeling.embedding import PromptEmbedder
from tuna_model.processing.processor import TunaProcessor
from tuna_model.processing.tags import ImageTags

ARRAYS = ("similarity", "vote_share", "relevance", "tag_ids")
"""Fields of `ImageTags` with one number a tag."""
BIASED = ("log_bias", "drop")
"""Couplings that add to attention logits, which an engine's attention cannot."""
BY_TOKEN, BY_TAG, BY_WORD = ("block_ids", "tag_index"), ("tag_embeddings", "tag_signals"), ("tag_word_ids",)
"""Fields of a picture with a row for each token of its block, each tag, and each token of its tags' words."""


@dataclass(frozen=True, slots=True)
class PictureBlock:
    """One picture's place in a prompt, L tokens long."""

    input_ids: list[int]
    """Without tags those of a stock Llava: the image token, `TunaConfig.image_tokens` times."""
    tag_inputs: dict[str, Tensor]
    """Those of the table in `tuna_model`, of a batch of this one picture; empty without tags."""


def tags_from(value: Mapping[str, Any] | ImageTags | None) -> ImageTags | None:
    """Tags of a picture from a request: `texts`, `embeddings` `[T, D]`, `similarity`, `vote_share`,
    `relevance`, and if wanted `tag_ids`.

    Raises:
        InvalidInput: a field is missing or unknown, or is not as long as `texts`.
    """
    if value is None or isinstance(value, ImageTags):
        return value
    fields = dict(value)
    texts = tuple(fields.pop("texts", ()))
    fields.setdefault("tag_ids", list(range(len(texts))))
    wrong = sorted(fields.keys() ^ {"embeddings", *ARRAYS})
    if wrong:
        raise InvalidInput(f"tags of a picture lack or do not have {', '.join(wrong)}: see PictureBlock")
    if not texts:
        return None
    embeddings = np.asarray(fields["embeddings"], np.float32)
    similarity, votes, relevance = (np.asarray(fields[name], np.float32) for name in ARRAYS[:-1])
    lengths = {len(embeddings), *map(np.size, (similarity, votes, relevance)), len(fields["tag_ids"])}
    if embeddings.ndim != 2 or lengths != {len(texts)}:
        raise InvalidInput(f"{len(texts)} tags need embeddings [{len(texts)}, D] and as many numbers each")
    ids = tuple(int(number) for number in fields["tag_ids"])
    return ImageTags(texts, embeddings, similarity, votes, relevance, ids)


def picture_block(processor: TunaProcessor, tags: ImageTags | None = None) -> PictureBlock:
    """The place of a picture with the tags that the processor's layout chooses."""
    encoded = processor.insert([processor.image_token_id], [tags])
    batch = processor.pad([encoded])
    return PictureBlock(encoded.input_ids, {k: v for k, v in batch.items() if k.startswith(("tag_", "cu_"))})


def embed_block(model: PromptEmbedder, block: PictureBlock, **picture: Tensor) -> Tensor:
    """`[L, hidden]`: H_v, the weighed H_vt and H_t, and the words between them, in their places.

    Args:
        picture: `pixel_values` `[1, 3, H, W]`; or `grid` and `image_vectors`.

    Raises:
        InvalidInput: the model's coupling needs attention biases.
    """
    if model.config.tag_coupling in BIASED and block.tag_inputs:
        raise InvalidInput(
            f"tag_coupling '{model.config.tag_coupling}' adds to attention logits, which embeddings cannot: "
            "train with 'multiply' or 'multiply_max', or serve with `tuna serve`"
        )
    inputs: dict[str, Any] = dict.fromkeys(
        ("inputs_embeds", "pixel_values", "grid", "image_vectors", "image_index", "tag_index",
         "tag_embeddings", "tag_signals", "cu_tags", "tag_word_ids", "tag_lengths")
    )  # fmt: skip
    ids = torch.tensor([block.input_ids], device=model.device)
    tag_inputs = {name: tensor.to(model.device) for name, tensor in block.tag_inputs.items()}
    return model.embed(ids, **inputs | tag_inputs | picture).embeddings[0]


def pack(blocks: Sequence[PictureBlock], config: TunaConfig) -> dict[str, Tensor]:
    """The blocks' tensors one behind the other, with `tokens`, `tags` and `words` `[N]`: rows of each."""
    packed: dict[str, list[Tensor]] = {}
    empty = {
        "tag_embeddings": torch.zeros(0, config.tag_dimension), "tag_signals": torch.zeros(0, 2),
        "tag_word_ids": torch.zeros(0, dtype=torch.int64), "tag_lengths": torch.zeros(0, dtype=torch.int64),
    }  # fmt: skip
    for block in blocks:
        ids, given = torch.tensor(block.input_ids), empty | block.tag_inputs
        index = given.get("tag_index", torch.full((1, len(ids)), -1))[0]
        count = len(given["tag_embeddings"])
        if len(given["tag_lengths"]) != count:  # every tag has one query: words of tags are not asked
            given["tag_lengths"] = torch.ones(count, dtype=torch.int64)
        sizes = {"tokens": len(ids), "tags": count, "words": len(given["tag_word_ids"])}
        tensors = {name: given[name] for name in empty} | {"block_ids": ids, "tag_index": index}
        for name, tensor in (tensors | {k: torch.tensor([v]) for k, v in sizes.items()}).items():
            packed.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in packed.items()}


def unpack(packed: Mapping[str, Tensor], config: TunaConfig) -> list[PictureBlock]:
    """The blocks that `pack` packed."""
    blocks = []
    rows = {name: packed[name].flatten().tolist() for name in ("tokens", "tags", "words")}
    offsets = dict.fromkeys(rows, 0)
    for tokens, tags, words in zip(*rows.values(), strict=True):
        size = {"tokens": tokens, "tags": tags, "words": words}
        part = {name: slice(offsets[name], offsets[name] + size[name]) for name in size}
        offsets = {name: offsets[name] + size[name] for name in size}
        inputs: dict[str, Tensor] = {}
        if tags:
            inputs = {name: packed[name][part["tags"]] for name in BY_TAG}
            inputs["tag_index"] = packed["tag_index"][part["tokens"]][None]
            inputs["cu_tags"] = torch.tensor([0, tags], dtype=torch.int32)
            if config.tag_queries == "token":
                inputs["tag_word_ids"] = packed["tag_word_ids"][part["words"]]
                inputs["tag_lengths"] = packed["tag_lengths"][part["tags"]]
        blocks.append(PictureBlock(packed["block_ids"][part["tokens"]].tolist(), inputs))
    return blocks
