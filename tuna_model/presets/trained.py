"""The trained parts of a model whose decoder and encoder come from elsewhere: connector and tag path, in a
small file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import save_file

from tagstore.errors import Damaged

if TYPE_CHECKING:
    from torch import Tensor

    from tuna_model.modeling.model import TunaForConditionalGeneration

PARTS = ("multi_modal_projector.", "tag_encoder.", "weight_tuner.")
_FIELDS = (
    "connector", "pool_side", "feature_layer", "neighbours", "max_tags", "store", "store_version",
    "encoder_digest", "tags",
)  # fmt: skip
"""Fields of the configuration that are saved, beside those that begin with tag_ or learn_."""


def save_trained(model: TunaForConditionalGeneration, path: str | Path) -> None:
    """Write connector and tag path in float16, with the fields of their configuration."""
    weights = {
        name: tensor.detach().half().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(PARTS)
    }
    config = model.config.to_dict()
    fields = {n: v for n, v in config.items() if n in _FIELDS or n.startswith(("tag_", "learn_"))}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"format": "pt", "config": json.dumps(fields, sort_keys=True)})


def read_trained(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and fields that `save_trained` wrote. Raises `Damaged`."""
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
        stored = (file.metadata() or {}).get("config")
    if stored is None or not all(name.startswith(PARTS) for name in weights):
        raise Damaged(f"{path} was not written by save_trained: export the checkpoint again")
    return weights, json.loads(stored)
