"""Prompts with pictures and tags as embeddings: all that TUNA computes before its decoder.

Apart from the model, so that an engine with a decoder of its own computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.utils import torch_compilable_check

from tagstore.encoding.encoder import Encoder, load_encoder
from tagstore.encoding.hf_models import clip_grid
from tagstore.errors import FingerprintMismatch, InvalidInput
from tuna_model.modeling.config import TunaConfig
from tuna_model.modeling.connector import Connector, pool_grid
from tuna_model.modeling.tag_encoder import TagEncoder
from tuna_model.modeling.weight_tuner import WeightTuner


@dataclass(frozen=True, slots=True)
class PromptEmbeddings:
    """Embedded prompts."""

    embeddings: Tensor
    """`[B, L, hidden]`."""
    image_tokens: Tensor | None
    """H_v `[N, tokens, hidden]`."""
    tags: dict[str, Any] | None
    """What came of the tags; None without any."""


class PromptEmbedder:
    """The part of a model before its decoder, for a class that has these attributes and word embeddings."""

    config: TunaConfig
    device: torch.device
    dtype: torch.dtype
    multi_modal_projector: Connector
    tag_encoder: TagEncoder
    weight_tuner: WeightTuner
    vision_tower: Any
    vision_projection: Any
    _encoder: Encoder | None

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's word embeddings."""
        raise NotImplementedError

    @property
    def encoder(self) -> Encoder:
        """The frozen encoder that the configuration names, loaded at first use.

        Raises:
            FingerprintMismatch: the checkpoint was trained on another one.
            InvalidInput: the checkpoint names none.
        """
        if self._encoder is None:
            if not self.config.encoder:
                raise InvalidInput(
                    "this checkpoint carries its own tower and names no encoder: call join_encoder('hf:...')"
                )
            half = {torch.float16: "fp16", torch.bfloat16: "bf16"} if self.device.type == "cuda" else {}
            precision = half.get(self.dtype, "fp32")
            self.use_encoder(load_encoder(self.config.encoder, device=str(self.device), precision=precision))
        return cast(Encoder, self._encoder)

    def use_encoder(self, encoder: Encoder) -> None:
        """Use an encoder that is already loaded. Raises `FingerprintMismatch` as `encoder` does."""
        digest = encoder.fingerprint.digest
        if self.config.encoder_digest and digest != self.config.encoder_digest:
            raise FingerprintMismatch(
                f"this checkpoint was trained on encoder {self.config.encoder} with fingerprint "
                f"{self.config.encoder_digest}, and {encoder.fingerprint} was loaded: its features mean "
                "something else. Install the encoder that it was trained on"
            )
        self._encoder = encoder

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def encode_images(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the image tower once.

        Args:
            pixel_values: `[N, 3, H, W]`, normalised (`TunaImageProcessor`).

        Returns:
            The grid Z_v `[N, P, C]` and unit image vectors `[N, D]` (float32), on the model's device. The
            vectors are None where a checkpoint's own tower has no projection yet.
        """
        if self.config.vision_config is None:
            grid, vectors = self.encoder.forward_grid(pixel_values, layer=self.config.feature_layer)
            return grid.to(self.device), vectors.to(self.device)
        grid, pooled = clip_grid(self.vision_tower, pixel_values, self.config.feature_layer)
        if not self.config.encoder:
            return grid, None
        vectors = pooled @ cast(Tensor, self.vision_projection).to(pooled.dtype).T
        return grid, nn.functional.normalize(vectors.float(), dim=-1)

    def embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, pixel_values: Tensor | None,
        grid: Tensor | None, image_vectors: Tensor | None, image_index: Tensor | None,
        tag_index: Tensor | None, tag_embeddings: Tensor | None, tag_signals: Tensor | None,
        cu_tags: Tensor | None, tag_word_ids: Tensor | None, tag_lengths: Tensor | None,
        output_attention: bool = False,
    ) -> PromptEmbeddings:  # fmt: skip
        """Embed prompts, with images and tags in their places. Arguments and errors: see `forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and grid is None:
            grid, encoded = self.encode_images(pixel_values)
            image_vectors = encoded if image_vectors is None else image_vectors
        image_tokens = tags = None
        if grid is not None:
            if input_ids is None:
                raise ValueError("images need input_ids: the positions of their tokens are read from it")
            grid = grid.to(inputs_embeds.device, inputs_embeds.dtype)
            pooled = pool_grid(grid, self.config.pool_side) if self.config.connector == "pooled" else grid
            image_tokens = self.multi_modal_projector(pooled).to(inputs_embeds.dtype)
            if image_index is None:
                image_index = self.image_positions(input_ids, tag_index)
                count = image_tokens.shape[0] * image_tokens.shape[1]
                if not (torch.compiler.is_compiling() or isinstance(image_index, FakeTensor)):
                    torch_compilable_check(
                        (image_index >= 0).sum() == count,
                        f"the prompts do not hold the {count} image tokens of {len(grid)} images: "
                        "make input_ids with TunaProcessor",
                    )
            inputs_embeds = _put_rows(inputs_embeds, image_tokens.flatten(0, 1), image_index)
        if tag_embeddings is not None and len(tag_embeddings):
            if (
                grid is None
                or input_ids is None
                or tag_index is None
                or cu_tags is None
                or tag_signals is None
            ):
                raise ValueError(
                    "tags need input_ids, an image (pixel_values or grid), tag_index, tag_signals and "
                    "cu_tags: see TunaProcessor"
                )
            if not self.config.tags:
                raise ValueError("this model has no tag path (TunaConfig.tags is False): leave tags out")
            tags = self._insert_tags(
                input_ids, inputs_embeds, grid, image_vectors, tag_index, tag_embeddings, tag_signals,
                cu_tags, tag_word_ids, tag_lengths, output_attention,
            )  # fmt: skip
            inputs_embeds = tags["inputs_embeds"]
        return PromptEmbeddings(inputs_embeds, image_tokens, tags)

    def image_positions(self, input_ids: Tensor, tag_index: Tensor | None = None) -> Tensor:
        """`[B, L]`: the row of all image tokens, in the order of the prompts, that each position takes; -1
        for none."""
        is_image = input_ids == self.config.image_token_id
        if tag_index is not None:
            is_image = is_image & (to_length(tag_index, input_ids.shape[1], -1) < 0)
        rows = is_image.flatten().cumsum(0).view_as(input_ids) - 1
        return torch.where(is_image, rows, -1)

    def _insert_tags(
        self, input_ids: Tensor, inputs_embeds: Tensor, grid: Tensor, image_vectors: Tensor | None,
        tag_index: Tensor, embeddings: Tensor, signals: Tensor, cu_tags: Tensor, word_ids: Tensor | None,
        lengths: Tensor | None, output_attention: bool,
    ) -> dict[str, Any]:  # fmt: skip
        """Put the weighed H_vt and H_t at the positions in `tag_index`."""
        weights, factors, biases = self.weight_tuner(embeddings, image_vectors, signals, cu_tags)
        # the tag of each query: with word queries a tag has several
        tag_of_query, words, cu_queries = (
            torch.arange(len(embeddings), device=embeddings.device),
            None,
            cu_tags,
        )
        if self.config.tag_queries == "token":
            if word_ids is None or lengths is None:
                raise ValueError(
                    "tag_queries 'token' needs tag_word_ids and tag_lengths: make them with TunaProcessor"
                )
            tag_of_query = torch.repeat_interleave(tag_of_query, lengths, output_size=len(word_ids))
            words = self.get_input_embeddings()(word_ids)
            ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            cu_queries = ends[cu_tags.long()].to(torch.int32)
        z_vt, attention = self.tag_encoder(
            embeddings.to(grid.dtype)[tag_of_query],
            words,
            grid,
            cu_queries,
            return_attention=output_attention,
        )
        h_vt = self.multi_modal_projector(z_vt)
        if self.tag_encoder.gate is not None:
            h_vt = h_vt * self.tag_encoder.gate
        h_vt = h_vt.to(inputs_embeds.dtype)

        index = to_length(tag_index, input_ids.shape[1], -1)
        is_query = (index >= 0) & (input_ids == self.config.image_token_id)
        inputs_embeds = _put_rows(inputs_embeds, h_vt, torch.where(is_query, index, -1))
        tag = torch.where(is_query, tag_of_query[index.clamp(0, len(tag_of_query) - 1)], index)  # -1: none
        factor = torch.where(tag >= 0, factors[tag.clamp_min(0)], 1).to(inputs_embeds.dtype)
        bias = None if biases is None else torch.where(tag >= 0, biases[tag.clamp_min(0)], 0)
        return {
            "inputs_embeds": inputs_embeds * factor[..., None],
            "tag_bias": bias,
            "tag_hidden_states": h_vt,
            "tag_weights": weights,
            "tag_attention": attention,
        }


def _put_rows(embeddings: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Replace `embeddings` `[B, L, h]` by rows of `rows` `[R, h]` wherever `index` `[B, L]` is not
    negative."""
    index = to_length(index, embeddings.shape[1], -1)
    return torch.where(index[..., None] >= 0, rows[index.clamp_min(0)], embeddings)


def to_length(values: Tensor, length: int, fill: float) -> Tensor:
    """Pad `[B, L]` on the right: without a cache a prompt grows with its answer."""
    missing = length - values.shape[1]
    return values if missing <= 0 else nn.functional.pad(values, (0, missing), value=fill)
