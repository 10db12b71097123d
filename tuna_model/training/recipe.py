"""What a training run is: one frozen dataclass, read from a TOML file in which every key is known.

recipe = Recipe.read("smol-caption")          # a named one of tuna_model/training/configs, or a path
recipe = recipe.with_values(["steps=300", "tags.store=null://"])
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from tagstore.errors import InvalidInput, NotFound

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True, slots=True)
class DataRecipe:
    """What is learnt from."""

    path: str = ""
    """LLaVA JSON, JSON lines, a WebDataset shard or a directory of them (see `data`)."""
    images: str = ""
    """Directory that image paths of a JSON file are relative to; the file's own if empty."""
    split: str = ""
    limit: int = 0
    """Only the first so many samples; 0 for all."""
    prompt: str = "Describe the image in one sentence."
    """What the user says about a picture that has captions and no conversation."""
    first_caption: bool = False
    """Always the first caption of a picture, where it has several; else one is drawn in each epoch."""
    template: Literal["chat", "plain"] = "chat"
    """`chat`: the model's chat template. `plain`: the image and then the answer, nothing else, as LLaVA's
    first stage does."""
    max_length: int = 2048
    """Tokens of a sequence, images and tags counted; what is longer loses its end."""
    group: int = 50
    """Samples of like length are put in one batch, out of `group` batches of shuffled samples; 0 for no
    grouping."""
    features: str = ""
    """Directory for features of the frozen image tower, computed once for each image; empty: computed at
    every step."""


@dataclass(frozen=True, slots=True)
class NoiseRecipe:
    """How tags are spoilt in training, so that the model learns to doubt them. All rates are probabilities in
    [0, 1]."""

    drop: float = 0.0
    """Of each tag: it is left out."""
    wrong: float = 0.0
    """Of each tag: one drawn from the whole vocabulary takes its place (its relevance is computed for this
    image)."""
    none: float = 0.0
    """Of each image: it gets no tags at all, so that the model stays good without."""
    shuffle: float = 0.0
    """Of each image: its tags' signals (similarity, votes, relevance) are dealt out anew, so that order and
    weights say nothing."""
    pool: int = 4096
    """How many tags of the vocabulary wrong ones are drawn from."""


@dataclass(frozen=True, slots=True)
class TagRecipe:
    """Where tags come from."""

    store: str = "null://"
    """URL of a tag source: grpc://, file://, replay://, random+grpc:// ...; null:// for no tags at all."""
    content: Literal["tags", "captions"] = "tags"
    """`captions`: the neighbours' captions stand in the prompt as text in the tags' stead (the paper's
    ablation)."""
    captions: str = ""
    """Data set that knows the neighbours' captions by key; the training data if empty."""
    leak_guard: bool = True
    """Keep an image's own entry and its copies out of its neighbours: by key, sha256 and perceptual hash."""
    leak_bits: int = 4
    """Bits of 64 by which perceptual hashes of copies may differ."""
    any_store: bool = False
    """Go on from a checkpoint with another store or version than it was trained with."""
    noise: NoiseRecipe = NoiseRecipe()


@dataclass(frozen=True, slots=True)
class LoraRecipe:
    """Low-rank updates of the decoder (Hu et al., 2021), through peft."""

    rank: int = 0
    """0: none."""
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A training run."""

    model: str = "tiny"
    """A preset or a directory."""
    stage: Literal["align", "finetune"] = "align"
    """`align` trains what is new, `finetune` the decoder too. It is written into the checkpoint; what learns
    is decided by `rates`."""
    out: str = "runs/tuna"
    seed: int = 0
    steps: int = 100
    """Optimizer steps."""
    batch_size: int = 8
    """Samples a step, over all processes."""
    micro_batch: int = 0
    """Samples a forward in each process; 0 for all of its share at once."""
    rates: Mapping[str, float] = field(
        default_factory=lambda: {"connector": 1e-3, "tag_encoder": 1e-3, "weight_tuner": 1e-3}
    )
    """Learning rate of each part: connector, tag_encoder, weight_tuner, language_model. Parts that are not
    named are frozen."""
    warmup: int = 10
    """Steps until the full rate is reached."""
    floor: float = 0.0
    """What is left of the rate at the end, as a share."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    """Gradients are scaled down to this norm; 0 for no clipping."""
    ema: float = 0.0
    """Decay of an exponential moving average of the trained weights, saved beside them; 0 for none."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast; weights stay in float32."""
    gradient_checkpointing: bool = False
    model_config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TunaConfig` that differ from the preset's: {tag_coupling = "log_bias"}."""
    data: DataRecipe = DataRecipe()
    tags: TagRecipe = TagRecipe()
    lora: LoraRecipe = LoraRecipe()
    log_every: int = 1
    save_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints that stay on disk."""
    ahead: int = 2
    """Batches that are read, embedded and looked up while one is learnt from."""
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
        """From a TOML file, or by name from those that come with the package. Raises `NotFound`,
        `InvalidInput`."""
        path = Path(name)
        if path.suffix != ".toml":
            path = CONFIGS / f"{name}.toml"
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            names = ", ".join(sorted(one.stem for one in CONFIGS.glob("*.toml")))
            raise NotFound(f"there is no recipe '{name}': give a .toml file, or one of {names}") from error
        except tomllib.TOMLDecodeError as error:
            raise InvalidInput(f"{path}: {error}") from error
        return cls.of(values, str(path))

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "recipe") -> Self:
        """From nested mappings. Raises `InvalidInput` for an unknown key or a value of another type, by
        name."""
        made: Self = _build(cls, values, where, "")
        return made

    def with_values(self, settings: Sequence[str]) -> Self:
        """With values changed as `key=value`: `steps=10`, `tags.noise.drop=0.1`, `rates.connector=1e-3`.
        Values are JSON, or plain text."""
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
            at: Any = values
            for part in path:
                at = at.get(part) if isinstance(at, dict) else None
            if not isinstance(at, dict):
                raise InvalidInput(f"a recipe has no '{key}'")
            at[last] = value
        return type(self).of(values, "command line")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `of` reads it back."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    def replace(self, **changes: Any) -> Self:
        """With other values at the top level."""
        return replace(self, **changes)


def _build(cls: Any, values: Mapping[str, Any], where: str, prefix: str) -> Any:
    hints = get_type_hints(cls)
    known = [one.name for one in fields(cls)]
    for key in values:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            raise InvalidInput(
                f"{where}: there is no '{prefix}{key}'"
                + (f", did you mean '{prefix}{near[0]}'?" if near else "")
            )
    return cls(**{key: _value(hints[key], value, where, f"{prefix}{key}") for key, value in values.items()})


def _value(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, wrong = get_origin(hint), f"{where}: '{key}' is {value!r}"
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InvalidInput(f"{wrong}: it is a table, write [{key}]")
        return _build(hint, value, where, f"{key}.")
    if origin is Literal:
        if value not in get_args(hint):
            raise InvalidInput(f"{wrong}: it is one of {', '.join(repr(one) for one in get_args(hint))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InvalidInput(f"{wrong}: it is a list")
        return tuple(value)
    if origin is not None:  # a mapping
        if not isinstance(value, Mapping):
            raise InvalidInput(f"{wrong}: it is a table, write [{key}]")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InvalidInput(f"{wrong}: it is of type {hint.__name__}")
    return value
