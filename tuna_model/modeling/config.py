"""What a TUNA model consists of, as a transformers configuration. Whatever the paper leaves open is a named
field.

The paper is Qi, Zhao, Wei, Li: "Tag-grounded Visual Instruction Tuning with Retrieval Augmentation" (EMNLP
2024, arXiv 2406.10839). `docs/model.md` says why each default is what it is.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Literal, get_args

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from tagstore.errors import InvalidInput
from tuna_model.modeling.llava_layout import check_config

ConnectorKind = Literal["mlp2x_gelu", "linear", "pooled"]
TagQueries = Literal["tag", "token"]
TagSignal = Literal["relevance", "similarity", "vote_share", "mixed", "uniform"]
TagCoupling = Literal["multiply", "multiply_max", "log_bias", "drop", "none"]
TagPlace = Literal["before", "after"]
TagOrder = Literal["weight", "retrieval", "none"]
TagMerge = Literal["none", "text", "contained"]

_TRANSFORMERS_FIELDS = {
    "attn_implementation", "bos_token_id", "eos_token_id", "experts_implementation", "model_type",
    "name_or_path", "num_labels", "output_attentions", "pad_token_id", "per_layer_config",
    "quantization_config", "torch_dtype", "use_cache",
}  # fmt: skip
"""Keys that transformers itself passes to a configuration or writes into config.json."""
_CHOICES: dict[str, Any] = {
    "connector": ConnectorKind, "tag_queries": TagQueries, "tag_signal": TagSignal,
    "tag_coupling": TagCoupling, "tag_place": TagPlace, "tag_order": TagOrder, "tag_merge": TagMerge,
    "kernels": Literal["auto", "triton", "reference"],
}  # fmt: skip
_POSITIVE = (
    "grid_side", "grid_channels", "tag_dimension", "tag_encoder_width", "tag_encoder_heads", "max_tags",
    "neighbours",
)  # fmt: skip


class TunaConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of `TunaForConditionalGeneration`.

    `from_pretrained` also reads a directory of transformers' own Llava: as the configuration of a model that
    carries its image tower.

    Raises:
        InvalidInput: an unknown field, or an invalid value; the message names the valid ones.
    """

    model_type = "tuna"
    sub_configs_defaults = {  # noqa: RUF012  as transformers declares it
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "vision_config": SubConfigSpec(
            config_class=AutoConfig, model_type="clip_vision_model", optional=True
        ),
    }

    text_config: Any = None
    """The decoder's: any causal language model of transformers, as its configuration or a dict with
    `model_type`."""

    # the image tower

    encoder: str = "mini"
    """Name of the encoder that computes grid and image vector (`tagstore.encoding.load_encoder`), the store's
    own. It is frozen and not saved with the weights. Empty: the checkpoint carries its tower
    (`vision_config`) and `join_encoder` was not called yet."""
    encoder_digest: str = ""
    """Digest of the encoder's fingerprint. If set, an encoder with another fingerprint is refused."""
    vision_config: Any = None
    """Of a tower that the checkpoint carries (transformers' CLIPVisionModel, as in LLaVA). None: `encoder` is
    the tower."""
    feature_layer: int = -1
    """The block whose output is the grid Z_v, from the end: -1 is the one that the tower pools into its
    vector, -2 the block before it (LLaVA)."""
    grid_side: int = 7
    """The grid has grid_side^2 points (P)."""
    grid_channels: int = 1280
    """C, the channels of a point."""
    tag_dimension: int = 512
    """D, the length of image vectors and tag embeddings."""

    # the connector

    connector: ConnectorKind = "mlp2x_gelu"
    """Grid to image tokens: `mlp2x_gelu` (two layers, LLaVA-1.5's), `linear`, or `pooled` (means over a
    raster of pool_side x pool_side, then the MLP: fewer image tokens). The tags' H_vt goes through the same
    layers."""
    connector_act: str = "gelu"
    """Activation between the layers of the MLP."""
    connector_bias: bool = True
    """Whether its layers have biases."""
    pool_side: int = 0
    """Side of the raster of `pooled`, at most grid_side."""
    image_token_id: int = 0
    """The token that stands for every image token and every H_vt in `input_ids`."""

    # the tag path

    tags: bool = True
    """Whether there is a tag path. Without tags in the input it changes nothing either way."""
    tag_encoder_layers: int = 1
    """0: parameter-free, one attention of the tag's text embedding over the grid, in the encoder's space. n:
    n learned layers."""
    tag_encoder_width: int = 256
    """Width of the learned layers."""
    tag_encoder_heads: int = 4
    """Heads of the learned layers."""
    tag_gate: bool = False
    """Whether H_vt has a learned factor that is 0 at first: an untrained tag path then says nothing, and the
    tags' words are read as any words are."""
    tag_queries: TagQueries = "tag"
    """One H_vt per tag, or one per text token of a tag (needs a learned layer: word embeddings live in the
    decoder's space)."""
    tag_signal: TagSignal = "relevance"
    """What the weights come from: `relevance` (the paper: cosine of tag embedding and image vector),
    `similarity` (of the best neighbour that carries the tag), `vote_share` (of the neighbours that carry it;
    formerly `votes`), `mixed` (their sum with the factors `tag_mix`), `uniform`."""
    tag_mix: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of `mixed`: factors of relevance, similarity and vote share."""
    tag_mix_grounded: tuple[float, float, float] = (240.0, 54.0, 0.0)
    """Instead of `tag_mix` where the store's tag embeddings are learnt from its pictures (`tagstore ground`):
    their relevance is smaller, and tells more than the other two. `docs/experiments.md` has the figures."""
    tag_temperature: float = 0.1
    """Of the softmax over an image's tags. At 1 weights are nearly equal, at CLIP's 0.01 one tag takes nearly
    all."""
    learn_temperature: bool = False
    """Whether the temperature is trained (its logarithm is the parameter)."""
    tag_coupling: TagCoupling = "multiply_max"
    """What weights do: `multiply` H_vt and H_t (the paper; they sum to 1), `multiply_max` (the best tag keeps
    1), `log_bias` (log w is added to the decoder's attention logits of the tag's tokens), `drop` (as
    multiply_max, and tags below the threshold are hidden), `none`."""
    tag_threshold: float = 0.3
    """Of `drop`: tags with less than this share of the best tag's weight are hidden."""

    # the prompt layout of tags

    tag_place: TagPlace = "before"
    """The tags of an image stand before or after its tokens."""
    tag_prefix: str = ""
    """Text before the tags of an image."""
    tag_separator: str = ","
    """Text between two tags."""
    tag_suffix: str = "\n"
    """Text after the tags of an image. Prefix and suffix are left out where an image has no tags."""
    tag_order: TagOrder = "weight"
    """`weight`: by the signal, best first; `retrieval`: as retrieved (votes, similarity, relevance); `none`:
    by id, so that a tag's place says nothing of its rank."""
    max_tags: int = 10
    """Tags per image, at most: the best by `tag_signal`."""
    tag_merge: TagMerge = "text"
    """Merging beyond the store's own by id: `none`; `text` (texts that are equal but for case: kinds and
    forms of one word); `contained` (also drops a tag whose words another tag of the image holds: "sky" beside
    "blue sky")."""
    neighbours: int = 5
    """k, the number of similar images that tags are retrieved from."""

    # the store of the training run

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
            if not key.startswith("_") and key not in _TRANSFORMERS_FIELDS:
                matches = get_close_matches(key, known, n=1)
                hint = f": did you mean {matches[0]}?" if matches else ""
                raise InvalidInput(f"TunaConfig has no field '{key}'{hint}")
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if str(self.tag_signal) == "votes":  # its name until it was told apart from the wire's count
            self.tag_signal = "vote_share"
        self._check()

    def _check(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in get_args(choices):
                raise InvalidInput(f"{name} is {value!r}: it must be one of {', '.join(get_args(choices))}")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.feature_layer >= 0:
            raise InvalidInput(
                f"feature_layer is {self.feature_layer}: it counts from the end, so it must be negative"
            )
        if self.tag_encoder_layers < 0:
            raise InvalidInput(
                f"tag_encoder_layers is {self.tag_encoder_layers}: it must be 0 (parameter-free) or more"
            )
        if self.tag_encoder_width % self.tag_encoder_heads:
            raise InvalidInput(
                f"tag_encoder_width {self.tag_encoder_width} does not divide among "
                f"{self.tag_encoder_heads} heads"
            )
        if self.connector == "pooled" and not (0 < self.pool_side <= self.grid_side):
            raise InvalidInput(f"pool_side is {self.pool_side}: it must lie between 1 and {self.grid_side}")
        if self.tag_queries == "token" and self.tag_encoder_layers == 0:
            raise InvalidInput(
                "tag_queries 'token' needs tag_encoder_layers of at least 1: "
                "word embeddings are not in the encoder's space"
            )
        if not self.tag_temperature > 0:
            raise InvalidInput(f"tag_temperature is {self.tag_temperature}: it must be positive")
        if not 0 <= self.tag_threshold <= 1:
            raise InvalidInput(f"tag_threshold is {self.tag_threshold}: it must lie between 0 and 1")

    @property
    def image_tokens(self) -> int:
        """Tokens of the decoder per image, without its tags."""
        return (self.pool_side if self.connector == "pooled" else self.grid_side) ** 2

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As transformers'; translates the configuration of its Llava.

        Raises `InvalidInput` for one in LLaVA's original layout.
        """
        fields, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        check_config(fields, pretrained_model_name_or_path)
        return (_from_llava(fields) if fields.get("model_type") == "llava" else fields), kwargs


def _from_llava(llava: dict[str, Any]) -> dict[str, Any]:
    """The fields of the same model as a `TunaConfig`.

    Refuses several layers, and the CLS token as a patch: no LLaVA-1.5 has them.
    """
    from transformers import LlavaConfig

    config = LlavaConfig.from_dict(llava)
    vision, layer = config.vision_config, config.vision_feature_layer
    if config.vision_feature_select_strategy != "default" or not isinstance(layer, int):
        raise InvalidInput(
            f"this Llava takes layer {layer} with strategy '{config.vision_feature_select_strategy}': "
            "only one layer with 'default' (patches without CLS) can be read"
        )
    dtype = llava.get("dtype") or llava.get("torch_dtype")
    return {
        "model_type": TunaConfig.model_type,
        "text_config": config.text_config.to_dict(),
        "vision_config": vision.to_dict(),
        "encoder": "",
        # hidden_states holds the embeddings too: index i is the output of block i
        "feature_layer": layer if layer < 0 else layer - vision.num_hidden_layers - 1,
        "grid_side": vision.image_size // vision.patch_size,
        "grid_channels": vision.hidden_size,
        "tag_dimension": getattr(vision, "projection_dim", 512),
        "connector_act": config.projector_hidden_act,
        "connector_bias": config.multimodal_projector_bias,
        "image_token_id": config.image_token_id,
        **({"dtype": dtype} if dtype else {}),
    }


AutoConfig.register("tuna", TunaConfig)
