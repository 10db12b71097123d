"""TUNA as a model of vLLM: tower, connector and tag path are ours, the decoder is vLLM's.

Tags of a request's pictures come with it, one mapping (or None) a picture (`picture_blocks.tags_from`):

    {"prompt": ..., "multi_modal_data": {"image": [...]}, "mm_processor_kwargs": {"tags": [{...}, None]}}

vLLM never ran this file where it was written: docs/engines.md says what was checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from tagstore.errors import InvalidInput
from tuna_model.engines.picture_blocks import (
    BY_TAG,
    BY_TOKEN,
    BY_WORD,
    embed_block,
    pack,
    picture_block,
    tags_from,
    unpack,
)
from tuna_model.modeling.config import TunaConfig
from tuna_model.modeling.connector import Connector
from tuna_model.modeling.embedding import PromptEmbedder
from tuna_model.modeling.tag_encoder import TagEncoder
from tuna_model.modeling.weight_tuner import WeightTuner
from tuna_model.processing.processor import TunaProcessor

DUMMY_SIDE = 336
"""Pixels of a side of the pictures that vLLM measures memory with; the processor resizes them."""


class TunaProcessingInfo(BaseProcessingInfo):  # type: ignore[misc]
    """What vLLM asks about TUNA before there is a model."""

    def get_hf_config(self) -> TunaConfig:
        config: TunaConfig = self.ctx.get_hf_config(TunaConfig)
        return config

    def get_hf_processor(self, **kwargs: object) -> TunaProcessor:
        # tags are no arguments of its constructor
        processor: TunaProcessor = self.ctx.get_hf_processor(TunaProcessor)
        return processor

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}


class TunaDummyInputs(BaseDummyInputsBuilder[TunaProcessingInfo]):  # type: ignore[misc]
    """Pictures to measure memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return str(self.info.get_hf_processor().image_token) * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        count, options = mm_counts.get("image", 0), mm_options.get("image")
        images = self._get_dummy_images(
            width=DUMMY_SIDE, height=DUMMY_SIDE, num_images=count, overrides=options
        )
        return {"image": images}


class TunaMultiModalProcessor(BaseMultiModalProcessor[TunaProcessingInfo]):  # type: ignore[misc]
    """Pictures and their tags to tensors, and the tokens that hold their places."""

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> Any:
        processor, images = self.info.get_hf_processor(), list(hf_data["images"])  # type: ignore[call-overload]
        tags: Any = hf_kwargs.get("tags") or [None] * len(images)
        if len(tags) != len(images):
            raise InvalidInput(f"{len(images)} pictures came with tags of {len(tags)}: give None for no tags")
        blocks = [picture_block(processor, tags_from(each)) for each in tags]
        pixels = processor.image_processor(images)["pixel_values"]
        return BatchFeature(dict(pack(blocks, self.info.get_hf_config())) | {"pixel_values": pixels})

    def _get_cache_missing_processor_kwargs(
        self, inputs: Any, mm_is_cached: Mapping[str, Sequence[bool]]
    ) -> Mapping[str, object]:
        kwargs = dict(inputs.hf_processor_mm_kwargs)
        tags: Any = kwargs.get("tags")
        cached = mm_is_cached.get("image", [])
        if tags and len(tags) == len(cached):  # else _call_hf_processor says what is wrong
            kwargs["tags"] = [each for each, known in zip(tags, cached, strict=True) if not known]
        return kwargs

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, Any]:
        fields = {"pixel_values": MultiModalFieldConfig.batched("image")}
        for names, sizes in ((BY_TOKEN, "tokens"), (BY_TAG, "tags"), (BY_WORD, "words")):
            fields[sizes] = MultiModalFieldConfig.batched("image")
            fields |= {n: MultiModalFieldConfig.flat_from_sizes("image", hf_inputs[sizes]) for n in names}
        fields["tag_lengths"] = MultiModalFieldConfig.flat_from_sizes("image", hf_inputs["tags"])
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        def block(item_idx: int) -> list[int]:
            ids: list[int] = out_mm_kwargs["image"][item_idx]["block_ids"].data.tolist()
            return ids

        target = [self.info.get_hf_config().image_token_id]
        return [PromptReplacement(modality="image", target=target, replacement=block)]


@MULTIMODAL_REGISTRY.register_processor(
    TunaMultiModalProcessor, info=TunaProcessingInfo, dummy_inputs=TunaDummyInputs
)
class TunaForConditionalGeneration(PromptEmbedder, nn.Module, SupportsMultiModal, SupportsPP):  # type: ignore[misc]
    """TUNA with vLLM's decoder; its checkpoints are tuna_model's own."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality.startswith("image"):
            return "<image>"
        raise ValueError(f"TUNA reads pictures, and no {modality}")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        self._encoder = None
        self.configure_mm_token_handling(config.text_config.vocab_size, [config.image_token_id])  # type: ignore[operator]
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            if config.vision_config is not None:
                self.vision_tower = AutoModel.from_config(config.vision_config)
                projection = torch.zeros(config.tag_dimension, config.grid_channels)
                self.vision_projection = nn.Parameter(projection, requires_grad=False)
            self.multi_modal_projector = Connector(config)
            if config.tags:
                self.tag_encoder, self.weight_tuner = TagEncoder(config), WeightTuner(config)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return next(self.multi_modal_projector.parameters()).device

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return next(self.multi_modal_projector.parameters()).dtype

    def get_input_embeddings(self) -> Any:
        """Word embeddings of vLLM's decoder, as a function of token ids."""
        return self.language_model.embed_input_ids

    def embed_multimodal(self, **kwargs: object) -> Any:
        """Embeddings `[L, hidden]` of each picture's block."""
        pixels: Any = kwargs.pop("pixel_values", None)
        if pixels is None:
            return []
        packed: dict[str, Tensor] = {
            name: value for name, value in kwargs.items() if isinstance(value, Tensor)
        }
        blocks = unpack(packed, self.config)
        pixels = pixels.to(self.device, self.dtype)
        return [embed_block(self, block, pixel_values=pixels[i : i + 1]) for i, block in enumerate(blocks)]

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None, **kwargs: object,
    ) -> Any:  # fmt: skip
        """Hidden states of vLLM's decoder."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits: Tensor | None = self.language_model.compute_logits(hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights)
        return loaded
