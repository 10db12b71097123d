"""Low-rank updates of the decoder (Hu et al., "LoRA", ICLR 2022), by peft.

They are put inside the model, not around it, so that names, saving and generation stay those of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tagstore.errors import InvalidInput, MissingExtra


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


def merge_lora(model: Any) -> None:
    """Add the updates to their layers and remove them: the model is then an ordinary one."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
