"""TUNA as a transformers model: image tower, connector, decoder, and between them the tag path.

    pixels ─▶ tower ─▶ Z_v ─▶ connector ─▶ H_v ───────────────┐
                └▶ image vector ─▶ weight tuner ─▶ w ──┐      ├─▶ decoder ─▶ logits
    tags' embeddings Q_t, Z_v ─▶ tag encoder ─▶ Z_vt ─▶ connector ─▶ H_vt·w
    tags' words ─▶ word embeddings ─▶ H_t·w ────────────────────┘

The names of its weights are those of llava-hf checkpoints (`vision_tower`, `multi_modal_projector`,
`language_model`). Without tags it computes what transformers' Llava computes, bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput

from tagstore.encoding.encoder import Encoder
from tagstore.errors import FingerprintMismatch
from tuna_model.modeling.config import TunaConfig
from tuna_model.modeling.connector import Connector
from tuna_model.modeling.embedding import PromptEmbedder, to_length
from tuna_model.modeling.llava_layout import KEY_MAPPING, check_weights
from tuna_model.modeling.tag_encoder import TagEncoder
from tuna_model.modeling.weight_tuner import WeightTuner

TAG_INPUTS = ("tag_index", "tag_embeddings", "tag_signals", "cu_tags", "tag_word_ids", "tag_lengths")
_PACKED_INPUTS = ("pixel_values", "grid", "image_vectors", *TAG_INPUTS[1:])
"""Inputs whose first dimension is not the batch's: beams share them."""


@dataclass
class TunaOutput(ModelOutput):  # type: ignore[misc]
    """Result of a forward."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    """`[B, L or logits_to_keep, vocabulary]`."""
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    """H_v `[N, tokens, hidden]`."""
    tag_hidden_states: Tensor | None = None
    """H_vt before weighting, `[T or M, hidden]`."""
    tag_weights: Tensor | None = None
    """`[T]` float32."""
    tag_attention: Tensor | None = None
    """`[T or M, P]` float32, of each query over the patches."""
    tag_bias: Tensor | None = None
    """`[B, L]` float32, added to the attention logits of every key; only with the couplings `log_bias` and
    `drop`."""


class TunaForConditionalGeneration(PromptEmbedder, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """TUNA with its decoder's head. The table in `tuna_model` lists its input tensors."""

    config: TunaConfig
    config_class = TunaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012  transformers reads lists
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: TunaConfig) -> None:
        super().__init__(config)
        self._encoder: Encoder | None = None
        if config.vision_config is not None:
            self.vision_tower = AutoModel.from_config(config.vision_config)
            self.vision_tower.requires_grad_(False)
            # into the space of the store; zero until `join_encoder` fills it
            self.register_buffer("vision_projection", torch.zeros(config.tag_dimension, config.grid_channels))
        self.multi_modal_projector = Connector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        if config.tags:
            self.tag_encoder = TagEncoder(config)
            self.weight_tuner = WeightTuner(config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers'; also reads a directory of its Llava as it is.

        Raises:
            Damaged: weights are missing beside those of the tag path, which may be untrained.
            InvalidInput: the checkpoint has LLaVA's original layout.
        """
        options = {"key_mapping": KEY_MAPPING, **kwargs, "output_loading_info": True}
        model, notes = super().from_pretrained(*args, **options)
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        known = model.state_dict().keys()
        check_weights(notes["missing_keys"], notes["unexpected_keys"], name or "the state dict", known)
        model._weight_conversions = None  # save under our names, whatever names were read
        if model.config.vision_config is not None:
            model.vision_tower.requires_grad_(False)
        return (model, notes) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as transformers does, and the few tensors that it does not know."""
        super()._init_weights(module)
        if module is self and self.config.vision_config is not None:
            init.zeros_(self.vision_projection)
        elif isinstance(module, TagEncoder):
            if module.layers is None:
                init.zeros_(module.projection)
            if module.gate is not None:
                init.zeros_(module.gate)
        elif isinstance(module, WeightTuner) and self.config.learn_temperature:
            init.constant_(module.log_temperature, math.log(self.config.tag_temperature))

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's word embeddings."""
        return cast(nn.Module, self.language_model.get_input_embeddings())

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace them."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's head."""
        return cast(nn.Module, self.language_model.get_output_embeddings())

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.language_model.set_output_embeddings(value)

    # the image tower

    def join_encoder(self, encoder: Encoder) -> None:
        """Tie the tags to an encoder's space: keep its fingerprint and its projection from the grid into that
        space.

        A checkpoint that carries its tower must carry this encoder's: then one forward gives the store's
        image vectors.

        Raises:
            FingerprintMismatch: the tower or the dimension of the tags differs.
        """
        config = self.config
        if encoder.dimension != config.tag_dimension:
            raise FingerprintMismatch(
                f"the model takes tags of {config.tag_dimension} dimensions, "
                f"and encoder {encoder.fingerprint} has {encoder.dimension}"
            )
        if config.vision_config is not None:
            if not encoder.same_tower(self.vision_tower):
                raise FingerprintMismatch(
                    f"this checkpoint's tower is not that of encoder {encoder.fingerprint}: vectors differ"
                )
            cast(Tensor, self.vision_projection).copy_(encoder.grid_projection().T)
        else:
            self._encoder = encoder
        # learned layers need no projection, and a tower that pools by attention has none
        if config.tags and config.tag_encoder_layers == 0:
            cast(Tensor, self.tag_encoder.projection).copy_(encoder.grid_projection())
        config.encoder, config.encoder_digest = encoder.fingerprint.model, encoder.fingerprint.digest

    # forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        grid: Tensor | None = None,
        image_vectors: Tensor | None = None,
        image_index: Tensor | None = None,
        tag_index: Tensor | None = None,
        tag_embeddings: Tensor | None = None,
        tag_signals: Tensor | None = None,
        cu_tags: Tensor | None = None,
        tag_word_ids: Tensor | None = None,
        tag_lengths: Tensor | None = None,
        tag_bias: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_tag_attention: bool = False,
        **kwargs: Any,
    ) -> TunaOutput:
        """Compute logits, and the loss if there are labels. The table in `tuna_model` explains the other
        tensors.

        Args:
            image_index: `[B, L]`, the row of all image tokens that a position takes, -1 for none; found from
                `input_ids` if None.
            tag_bias: `[B, keys so far]`, as a forward with a cache returned it.
            logits_to_keep: keep logits (and labels) of this many last positions; 0 for all.
            num_items_in_batch: divisor of the summed loss, where a step has several forwards; None: the
                labels of this one.
            output_tag_attention: also return `tag_attention`.

        Raises:
            ValueError: the image tokens in `input_ids` are not as many as the images need, or shapes do not
                fit.
        """
        prompt = self.embed(
            input_ids, inputs_embeds, pixel_values, grid, image_vectors, image_index, tag_index,
            tag_embeddings, tag_signals, cu_tags, tag_word_ids, tag_lengths, output_tag_attention,
        )  # fmt: skip
        inputs_embeds, image_tokens, tags = prompt.embeddings, prompt.image_tokens, prompt.tags
        tag_bias = tags["tag_bias"] if tags else tag_bias
        if tag_bias is not None:
            attention_mask = self._biased_mask(inputs_embeds, attention_mask, tag_bias, past_key_values)
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        loss = None
        if labels is not None:
            last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            loss = self.loss_function(
                logits=out.logits,
                labels=labels[:, last],
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            if self.training:
                loss = loss + self._zero_of_unused(image_tokens is None, tags is None)
        return TunaOutput(
            loss=loss,
            logits=out.logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            image_hidden_states=image_tokens,
            tag_bias=tag_bias,
            tag_hidden_states=tags["tag_hidden_states"] if tags else None,
            tag_weights=tags["tag_weights"] if tags else None,
            tag_attention=tags["tag_attention"] if tags else None,
        )

    def _biased_mask(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, bias: Tensor, cache: Any
    ) -> Tensor:
        """The causal mask `[B, 1, L, keys]` with the tags' biases added to their keys."""
        coupling = f"tag_coupling '{self.config.tag_coupling}'"
        attention = self.language_model.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"{coupling} adds to attention logits, which '{attention}' cannot: "
                "load the model with attn_implementation='sdpa' or 'eager'"
            )
        if cache is not None and getattr(cache, "is_compileable", False):
            raise ValueError(f"{coupling} needs a dynamic cache: leave cache_implementation out")
        text = self.config.text_config
        layers = getattr(text, "layer_types", None)
        if any("sliding" in kind for kind in layers) if layers else getattr(text, "sliding_window", None):
            raise ValueError(
                f"{coupling} needs a decoder without sliding windows: take 'multiply' or 'multiply_max'"
            )
        batch, length = inputs_embeds.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        keys = past + length
        position = torch.arange(keys, device=inputs_embeds.device)
        visible = (position[None] <= position[past:, None])[None, None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None, :keys].bool()
        lowest = torch.finfo(inputs_embeds.dtype).min
        biases = to_length(bias, keys, 0.0).clamp_min(lowest).to(inputs_embeds.dtype)
        return torch.where(visible, biases[:, None, None], lowest).expand(batch, 1, length, keys)

    def _zero_of_unused(self, no_images: bool, no_tags: bool) -> Tensor | float:
        """Zero, computed from the parameters that this batch did not use.

        So that they get a gradient all the same: processes that wait for each other's gradients must all have
        them.
        """
        unused: list[nn.Module] = [self.multi_modal_projector] if no_images else []
        if no_tags and self.config.tags:
            unused += [self.tag_encoder, self.weight_tuner]
        parameters = [p for module in unused for p in module.parameters() if p.requires_grad]
        return sum((p.flatten()[:1].sum() * 0 for p in parameters), 0.0)

    # generation

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """As transformers'; with `prefill_chunk_size` images and tags are embedded once, for all chunks."""
        packed = any(model_kwargs.get(name) is not None for name in _PACKED_INPUTS)
        size = generation_config.prefill_chunk_size
        cache = model_kwargs.get("past_key_values")
        if size is None or cache is None or not (packed and is_first_iteration):
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        names = ("image_index", "tag_index", *_PACKED_INPUTS)
        given: dict[str, Any] = {name: model_kwargs.get(name) for name in names}
        prompt = self.embed(input_ids, None, **given)
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        bias = prompt.tags["tag_bias"] if prompt.tags else None
        out = None
        for start in range(0, input_ids.shape[1], size):
            end = start + size
            out = self(
                inputs_embeds=prompt.embeddings[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                tag_bias=None if bias is None else bias[:, :end],
                use_cache=True,
                logits_to_keep=1,
            )
        return out

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers'; leaves images and tags out once the prompt is in the cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in (*_PACKED_INPUTS, "tag_index", "image_index"):
                inputs.pop(name, None)
        elif (index := inputs.get("image_index")) is not None:
            inputs["image_index"] = to_length(index, input_ids.shape[1], -1)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat for each beam only what has a row for each prompt: beams share images and tags."""
        packed = {name: kwargs.pop(name) for name in _PACKED_INPUTS if name in kwargs}
        if input_ids is not None and any(packed.get(name) is not None for name in ("pixel_values", "grid")):
            kwargs["image_index"] = self.image_positions(input_ids, kwargs.get("tag_index"))
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **kwargs
        )
        return input_ids, kwargs | packed

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Carry the biases of the prompt's tags on: they hold for every later token too."""
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        if outputs.get("tag_bias") is not None:
            updated["tag_bias"] = outputs["tag_bias"]
        return updated


AutoModelForCausalLM.register(TunaConfig, TunaForConditionalGeneration)
AutoModelForImageTextToText.register(TunaConfig, TunaForConditionalGeneration)
