"""The description of a training run: one frozen dataclass, read from a TOML file; unknown keys are refused.

recipe = Recipe.read("smol-caption")          # a name in tuna_model/training/configs, or a path
recipe = recipe.with_values(["steps=300", "tags.store=null://"])
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from tagstore.errors import InvalidInput, NotFound

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """The training data."""

    path: str = ""
    """LLaVA JSON, JSON lines, a WebDataset shard or a directory of them (see `tagstore.readers.samples`)."""
    images: str = ""
    """Directory that image paths of a JSON file are relative to; the file's own if empty."""
    allow_outside: bool = False
    """Read images whose path, or a link on it, leads out of `images`."""
    split: str = ""
    """Use only samples of this split; empty for all."""
    limit: int = 0
    """Number of samples to use, the first ones; 0 for all."""
    prompt: str = "Describe the image in one sentence."
    """The user's words about a picture that has captions and no conversation."""
    first_caption: bool = False
    """Always take a picture's first caption; else one is drawn in each epoch."""
    template: Literal["chat", "plain"] = "chat"
    """`chat`: the model's chat template. `plain`: only the image and then the answer, as in LLaVA's first
    stage."""
    max_length: int = 2048
    """Tokens of a sequence, with images and tags; longer ones lose their end."""
    group: int = 50
    """Shuffled batches within which samples are sorted, so that a batch has like lengths; 0 for no
    sorting."""
    features: str = ""
    """Directory for the features of the frozen image tower, computed once; empty: computed at every step."""


@dataclass(frozen=True, slots=True)
class NoiseRecipe:
    """Noise on tags, so that the model learns to doubt them. All rates are probabilities in [0, 1]."""

    drop: float = 0.0
    """Rate of tags that are left out."""
    wrong: float = 0.0
    """Rate of tags that are replaced by one of the whole vocabulary, with its relevance to this image."""
    none: float = 0.0
    """Rate of images that get no tags at all, so that the model stays good without."""
    shuffle: float = 0.0
    """Rate of images whose tags swap their signals (similarity, vote share, relevance), so that weights say
    nothing."""
    pool: int = 4096
    """Number of tags of the vocabulary from which wrong ones are drawn."""


@dataclass(frozen=True, slots=True)
class TagRecipe:
    """Where tags come from."""

    store: str = "null://"
    """URL of a tag source: grpc://, file://, replay://, random+grpc:// ...; null:// for no tags at all. It
    may hold `{store}`, for which each sample's field `store` stands: then stores are mixed."""
    content: Literal["tags", "captions"] = "tags"
    """`captions`: the neighbours' captions stand in the prompt as text instead of tags (the paper's
    ablation)."""
    captions: str = ""
    """Data set with the neighbours' captions by key; the training data if empty."""
    leak_guard: bool = True
    """Keep an image's own entry and copies of it out of its neighbours: by key, sha256 and perceptual
    hash."""
    leak_bits: int = 4
    """Bits, of 64, in which the perceptual hashes of copies may differ."""
    any_store: bool = False
    """Resume from a checkpoint with another store or version than it was trained with."""
    noise: NoiseRecipe = NoiseRecipe()


@dataclass(frozen=True, slots=True)
class LoraRecipe:
    """Low-rank updates of the decoder (Hu et al., 2021), through peft."""

    rank: int = 0
    """0: no LoRA."""
    alpha: int = 16
    """The updates are scaled by alpha / rank."""
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the layers that get updates."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A training run."""

    model: str = "tiny"
    """A preset or a directory."""
    stage: Literal["align", "finetune"] = "align"
    """A label: `align` trains the new parts, `finetune` the decoder too. `rates` decides which parts are
    trained."""
    out: str = "runs/tuna"
    """Directory of the run."""
    seed: int = 0
    steps: int = 100
    """Optimizer steps."""
    batch_size: int = 8
    """Samples per step, over all processes."""
    micro_batch: int = 0
    """Samples per forward in each process; 0 for all of its share at once."""
    rates: Mapping[str, float] = field(
        default_factory=lambda: {"connector": 1e-3, "tag_encoder": 1e-3, "weight_tuner": 1e-3}
    )
    """Learning rate of each part: connector, tag_encoder, weight_tuner, language_model. Other parts are
    frozen."""
    warmup: int = 10
    """Steps until the full rate is reached."""
    floor: float = 0.0
    """The last step's rate, as a share of the full rate."""
    weight_decay: float = 0.0
    """AdamW's; not applied to vectors (norms, biases)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the first and second moment."""
    clip: float = 1.0
    """Norm to which larger gradients are scaled down; 0 for no clipping."""
    ema: float = 0.0
    """Decay of an exponential moving average of the trained weights, saved beside them; 0 for none."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast; weights stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute the decoder's activations in the backward pass: less memory, more time."""
    model_config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TunaConfig` that differ from the preset's: {tag_coupling = "log_bias"}."""
    data: DataRecipe = DataRecipe()
    tags: TagRecipe = TagRecipe()
    lora: LoraRecipe = LoraRecipe()
    log_every: int = 1
    """Steps between log lines; the last step is always logged."""
    save_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints that stay on disk."""
    ahead: int = 2
    """Batches that are made while the model learns from one."""
    tensorboard: bool = False
    """Write curves for TensorBoard to `out`/tensorboard; needs tensorboardX."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "keep", "log_every", "ahead"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("drop", "wrong", "none", "shuffle"):
            if not 0 <= getattr(self.tags.noise, name) <= 1:
                raise InvalidInput(
                    f"tags.noise.{name} is {getattr(self.tags.noise, name)}: it is a probability"
                )
        if not 0 <= self.ema < 1:
            raise InvalidInput(f"ema is {self.ema}: it is a decay below 1, 0 for none")

    @classmethod
    def read(cls, name: str | Path) -> Self:
        """Read a TOML file, or by name one of the package's. Raises `NotFound`, `InvalidInput`."""
        path = Path(name)
        if path.suffix != ".toml":
            path = CONFIGS / f"{name}.toml"
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.toml")))
            raise NotFound(f"there is no recipe '{name}': give a .toml file, or one of {names}") from error
        except tomllib.TOMLDecodeError as error:
            raise InvalidInput(f"{path}: {error}") from error
        return cls.of(values, str(path))

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "recipe") -> Self:
        """Build from nested mappings. Raises `InvalidInput` for an unknown key or a value of a wrong type, by
        name."""
        recipe: Self = _build(cls, values, where, "")
        return recipe

    def with_values(self, settings: Sequence[str]) -> Self:
        """Change values by `key=value`: `steps=10`, `tags.noise.drop=0.1`, `rates.connector=1e-3`. Values are
        JSON or text."""
        values = self.to_dict()
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals:
                raise InvalidInput(f"'{setting}' sets nothing: write key=value, as in tags.noise.drop=0.1")
            try:
                value = json.loads(text)
            except json.JSONDecodeError:
                value = text
            *path, last = key.split(".")
            table: Any = values
            for part in path:
                table = table.get(part) if isinstance(table, dict) else None
            if not isinstance(table, dict):
                raise InvalidInput(f"a recipe has no '{key}'")
            table[last] = value
        return type(self).of(values, "command line")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `of` reads it back."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def _build(cls: Any, values: Mapping[str, Any], where: str, prefix: str) -> Any:
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls)]
    for key in values:
        if key not in known:
            matches = get_close_matches(key, known, n=1)
            hint = f", did you mean '{prefix}{matches[0]}'?" if matches else ""
            raise InvalidInput(f"{where}: there is no '{prefix}{key}'{hint}")
    return cls(**{key: _value(hints[key], value, where, f"{prefix}{key}") for key, value in values.items()})


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)

    def wrong(reason: str) -> InvalidInput:
        return InvalidInput(f"{where}: '{key}' is {value!r}: {reason}")

    if is_dataclass(hint) or origin is Mapping:
        if not isinstance(value, Mapping):
            raise wrong(f"it is a table, write [{key}]")
        if origin is None:
            return _build(hint, value, where, f"{key}.")
        return {name: _value(arguments[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if origin is Literal:
        if value not in arguments:
            raise wrong(f"it is one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        length = None if arguments[-1] is Ellipsis else len(arguments)
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            raise wrong("it is a list" if length is None else f"it is a list of {length}")
        return tuple(_value(arguments[0], item, where, f"{key}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if hint is not Any and type(value) is not hint:
        raise wrong(f"it is of type {hint.__name__}")
    return value
