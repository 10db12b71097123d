"""Low-rank updates of the decoder (Hu et al., "LoRA", ICLR 2022), by peft.

They are put inside the model, not around it, so that names, saving and generation stay those of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tagstore.errors import Damaged, InvalidInput, MissingExtra


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: Sequence[str] = ("q_proj", "v_proj"),
) -> None:
    """Put updates of `rank` beside the decoder's layers called `targets`, and freeze the rest of the decoder.

    Raises:
        MissingExtra: peft is not installed.
        InvalidInput: no layer of the decoder has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise MissingExtra("LoRA needs peft: pip install 'tagstore[model]'") from error
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none"
    )
    try:
        inject_adapter_in_model(config, model.language_model)
    except ValueError as error:
        raise InvalidInput(
            f"LoRA finds no layer called {', '.join(targets)} in this decoder: {error}"
        ) from error


def add_updates(model: Any, updates: Mapping[str, Tensor], scale: float) -> None:
    """Add saved updates to their layers, without peft.

    Args:
        updates: `[rank, in]` and `[out, rank]` of each layer, as LAYER.lora_A and LAYER.lora_B.
        scale: alpha / rank.

    Raises:
        Damaged: one of the two is missing, or the model has no such layer or one of another shape.
    """
    with torch.no_grad():
        for layer in sorted({name.rpartition(".")[0] for name in updates}):
            try:
                down, up = (updates[f"{layer}.lora_{side}"].float() for side in "AB")
                weight = model.get_submodule(layer).weight
                weight += (scale * (up @ down)).to(weight)
            except (KeyError, AttributeError, RuntimeError) as error:
                raise Damaged(f"the updates of '{layer}' do not fit this decoder: {error}") from error


def merge_lora(model: Any) -> None:
    """Add the updates to their layers and remove them: the model is then an ordinary one."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
