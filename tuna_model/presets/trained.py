"""The trained parts of a model whose decoder and encoder come from elsewhere, in a small file: connector, tag
path, and low-rank updates of the decoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file

from tagstore.errors import Damaged

if TYPE_CHECKING:
    from torch import Tensor

    from tuna_model.modeling.model import TunaForConditionalGeneration

PARTS = ("multi_modal_projector.", "tag_encoder.", "weight_tuner.")
_UPDATES = (".lora_A", ".lora_B")
_FIELDS = (
    "connector", "pool_side", "feature_layer", "neighbours", "max_tags", "store", "store_version",
    "encoder_digest", "tags",
)  # fmt: skip
"""Fields of the configuration that are saved, beside those that begin with tag_ or learn_."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What `save_trained` wrote."""

    weights: Mapping[str, Tensor]
    """Of connector and tag path, by their names in the model."""
    updates: Mapping[str, Tensor]
    """Low-rank updates of the decoder, as `tuna_model.modeling.lora.add_updates` takes them."""
    scale: float
    """Of the updates."""
    fields: Mapping[str, Any]
    """Of the configuration."""


def save_trained(
    model: TunaForConditionalGeneration,
    path: str | Path,
    *,
    updates: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
) -> None:
    """Write what was learnt in float16, with the fields of its configuration.

    Args:
        updates, scale: as `Trained` has them.
    """
    parts = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(PARTS)}
    weights = {
        name: tensor.detach().half().cpu().contiguous()
        for name, tensor in (parts | dict(updates or {})).items()
    }
    config = model.config.to_dict()
    fields = {n: v for n, v in config.items() if n in _FIELDS or n.startswith(("tag_", "learn_"))}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "config": json.dumps(fields, sort_keys=True), "lora_scale": str(scale)}
    save_file(weights, path, metadata=metadata)


def read_trained(path: str | Path) -> Trained:
    """Read what `save_trained` wrote. Raises `Damaged`."""
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        metadata = file.metadata() or {}
    updates = {name: weights.pop(name) for name in list(weights) if name.endswith(_UPDATES)}
    if "config" not in metadata or not all(name.startswith(PARTS) for name in weights):
        raise Damaged(f"{path} was not written by save_trained: export the checkpoint again")
    return Trained(weights, updates, float(metadata.get("lora_scale", 1)), json.loads(metadata["config"]))
