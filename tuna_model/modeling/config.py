"""What a TUNA model is made of, as a transformers configuration. Whatever the paper leaves open is a named field here.

The paper is Qi, Zhao, Wei, Li: "Tag-grounded Visual Instruction Tuning with Retrieval Augmentation" (EMNLP 2024, arXiv 2406.10839).
`docs/model.md` says why each default is what it is.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Literal, get_args

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from tagstore.errors import InvalidInput

Connector = Literal["mlp2x_gelu", "linear", "pooled"]
Queries = Literal["tag", "token"]
Signal = Literal["relevance", "similarity", "votes", "uniform"]
Coupling = Literal["multiply", "multiply_max", "log_bias", "drop", "none"]
Place = Literal["before", "after"]
Order = Literal["weight", "retrieval", "none"]
Merge = Literal["none", "text", "contained"]

# what transformers itself passes to a configuration or writes into config.json
_OF_TRANSFORMERS = {
    "attn_implementation", "bos_token_id", "eos_token_id", "experts_implementation", "model_type", "name_or_path", "num_labels",
    "output_attentions", "pad_token_id", "per_layer_config", "quantization_config", "torch_dtype", "use_cache",
}  # fmt: skip


class TunaConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of `TunaForConditionalGeneration`.

    A directory of transformers' own Llava is read too: its configuration becomes one of a model that carries its tower.

    Raises:
        InvalidInput: an unknown field, or a value that means nothing; the message says what would.
    """

    model_type = "tuna"
    sub_configs_defaults = {  # noqa: RUF012  as transformers declares it
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="clip_vision_model", optional=True
        ),
    }

    text_config: Any = None
    """Of the decoder: any causal language model of transformers, as its configuration or a dict with `model_type`."""

    # the image tower

    encoder: str = "mini"
    """Which encoder makes grid and image vector (`tagstore.encoding.load_encoder`); the same as the store's. It is frozen and no part of
    the saved weights. Empty where the checkpoint carries its tower (`vision_config`) and that has not been joined to an encoder."""
    encoder_digest: str = ""
    """Digest of the encoder's fingerprint. When set, loading an encoder of another one is refused."""
    vision_config: Any = None
    """Of a tower that the checkpoint carries (transformers' CLIPVisionModel, as in LLaVA). None: the named encoder is the tower."""
    feature_layer: int = -1
    """Which block's output the grid Z_v is, from the end: -1 what the tower pools into its vector, -2 the block before it (LLaVA)."""
    grid_side: int = 7
    """The grid has grid_side^2 points (P)."""
    grid_channels: int = 1280
    """C, the channels of a point."""
    tag_dimension: int = 512
    """D, the length of image vectors and tag embeddings."""

    # the connector

    connector: Connector = "mlp2x_gelu"
    """Grid to image tokens: `mlp2x_gelu` (two layers, LLaVA-1.5's), `linear`, or `pooled` (the mean over a pool_side x pool_side raster,
    then the MLP: fewer image tokens). The tags' H_vt goes through the same layers."""
    connector_act: str = "gelu"
    """Between the layers of the MLP."""
    connector_bias: bool = True
    """Whether its layers have biases."""
    pool_side: int = 0
    """Of `pooled`: the side of the raster that is left; must divide grid_side."""
    image_token_id: int = 0
    """The token that stands for every image token and every H_vt in `input_ids`."""

    # the tag path

    tags: bool = True
    """Whether there is a tag path at all. Without tags in the input it changes nothing either way."""
    tag_encoder_layers: int = 1
    """0: parameter-free, one attention of the tag's text embedding over the grid, both in the encoder's space. n: learned layers."""
    tag_encoder_width: int = 256
    """Width of the learned layers."""
    tag_encoder_heads: int = 4
    """Heads of the learned layers."""
    tag_queries: Queries = "tag"
    """One H_vt a tag, or one for each of its text tokens (needs a learned layer: word embeddings live in the decoder's space)."""
    tag_signal: Signal = "relevance"
    """What the weights come from: `relevance` (the paper: cosine of tag embedding and image vector), `similarity` (of the best neighbour
    that carries the tag), `votes` (share of the neighbours that carry it), `uniform`."""
    tag_temperature: float = 0.1
    """Of the softmax over an image's tags. At 1 weights are nearly equal, at CLIP's 0.01 one tag takes nearly all."""
    learn_temperature: bool = False
    """Whether the temperature is trained (its logarithm is the parameter)."""
    tag_coupling: Coupling = "multiply_max"
    """What weights do: `multiply` H_vt and H_t (the paper; they sum to 1), `multiply_max` (the best tag keeps 1), `log_bias` (log w added
    to the decoder's attention logits of the tag's tokens), `drop` (as multiply_max, and tags below the threshold are not seen), `none`."""
    tag_threshold: float = 0.3
    """Of `drop`: the share of the best tag's weight below which a tag is not seen."""

    # the prompt layout of tags

    tag_place: Place = "before"
    """The tags of an image stand before or after its tokens."""
    tag_prefix: str = ""
    """Text before the tags of an image."""
    tag_separator: str = ","
    """Text between two tags."""
    tag_suffix: str = "\n"
    """Text after the tags of an image. Without tags nothing of this is written."""
    tag_order: Order = "weight"
    """By the signal, best first; as retrieved (votes, similarity, relevance); or `none`, by id: a place says nothing of rank."""
    max_tags: int = 10
    """At most so many tags an image, the best by `tag_signal`."""
    tag_merge: Merge = "text"
    """Beyond the store's own merging by id: `none`; `text` (equal but for case: kinds and forms of one word); `contained` (also drops a
    tag whose words another tag of the image holds: "sky" beside "blue sky")."""
    neighbours: int = 5
    """k, how many similar images are asked for."""

    # where tags came from in training

    store: str = ""
    """Name of the store that the model was trained with; empty: not pinned."""
    store_version: int = 0
    """Its version; 0: not pinned."""

    kernels: str = "auto"
    """Implementation of the tag path: `auto`, `triton`, `reference` (see `tuna_kernels.backend`)."""

    tie_word_embeddings: bool = False
    """The decoder's; set from it."""

    def __post_init__(self, **kwargs: Any) -> None:
        known = {*type(self).__dataclass_fields__}
        for key in kwargs:
            if not key.startswith("_") and key not in _OF_TRANSFORMERS:
                near = get_close_matches(key, known, n=1)
                raise InvalidInput(
                    f"TunaConfig has no field '{key}'" + (f": did you mean {near[0]}?" if near else "")
                )
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self._check()

    def _check(self) -> None:
        for name, choices in (
            ("connector", Connector), ("tag_queries", Queries), ("tag_signal", Signal), ("tag_coupling", Coupling),
            ("tag_place", Place), ("tag_order", Order), ("tag_merge", Merge), ("kernels", Literal["auto", "triton", "reference"]),
        ):  # fmt: skip
            if getattr(self, name) not in get_args(choices):
                raise InvalidInput(
                    f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(get_args(choices))}"
                )
        for name in (
            "grid_side",
            "grid_channels",
            "tag_dimension",
            "tag_encoder_width",
            "tag_encoder_heads",
            "max_tags",
            "neighbours",
        ):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.feature_layer >= 0:
            raise InvalidInput(
                f"feature_layer is counted from the end and must be negative, not {self.feature_layer}"
            )
        if self.tag_encoder_layers < 0:
            raise InvalidInput(
                f"tag_encoder_layers is {self.tag_encoder_layers}: it must be 0 (parameter-free) or more"
            )
        if self.tag_encoder_width % self.tag_encoder_heads:
            raise InvalidInput(
                f"tag_encoder_width {self.tag_encoder_width} does not divide among {self.tag_encoder_heads} heads"
            )
        if self.connector == "pooled" and not (
            0 < self.pool_side <= self.grid_side and self.grid_side % self.pool_side == 0
        ):
            raise InvalidInput(f"pool_side is {self.pool_side}: it must divide grid_side {self.grid_side}")
        if self.tag_queries == "token" and self.tag_encoder_layers == 0:
            raise InvalidInput(
                "tag_queries 'token' needs tag_encoder_layers of at least 1: word embeddings are not in the encoder's space"
            )
        if not self.tag_temperature > 0:
            raise InvalidInput(f"tag_temperature is {self.tag_temperature}: it must be positive")
        if not 0 <= self.tag_threshold <= 1:
            raise InvalidInput(f"tag_threshold is {self.tag_threshold}: it must lie between 0 and 1")

    @property
    def image_tokens(self) -> int:
        """How many tokens of the decoder an image takes (without tags)."""
        return (self.pool_side if self.connector == "pooled" else self.grid_side) ** 2

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As transformers'; that of its Llava is translated."""
        found, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return (_from_llava(found) if found.get("model_type") == "llava" else found), kwargs


def _from_llava(llava: dict[str, Any]) -> dict[str, Any]:
    """The same model in our words. Several layers, and the CLS token as a patch, are refused: no LLaVA-1.5 has them."""
    from transformers import LlavaConfig

    config = LlavaConfig.from_dict(llava)
    vision = config.vision_config
    if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
        raise InvalidInput(
            f"this Llava takes layer {config.vision_feature_layer} with strategy '{config.vision_feature_select_strategy}': "
            "one layer with 'default' (patches without CLS) is what can be read here"
        )
    layer = config.vision_feature_layer
    # hidden_states holds the embeddings too: index i is the output of block i
    layer = layer if layer < 0 else layer - vision.num_hidden_layers - 1
    return {
        "model_type": TunaConfig.model_type,
        "text_config": config.text_config.to_dict(),
        "vision_config": vision.to_dict(),
        "encoder": "",
        "feature_layer": layer,
        "grid_side": vision.image_size // vision.patch_size,
        "grid_channels": vision.hidden_size,
        "tag_dimension": getattr(vision, "projection_dim", 512),
        "connector_act": config.projector_hidden_act,
        "connector_bias": config.multimodal_projector_bias,
        "image_token_id": config.image_token_id,
        **(
            {"dtype": llava.get("dtype") or llava.get("torch_dtype")}
            if llava.get("dtype") or llava.get("torch_dtype")
            else {}
        ),
    }


AutoConfig.register("tuna", TunaConfig)
