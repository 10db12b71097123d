"""How fast each part learns, and when: parameter groups by part, linear warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tagstore.errors import InvalidInput


def learning_rate(step: int, *, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor on the base rate at `step` (from 0) of `steps`: linear from 1/warmup to 1, then a half cosine down to `floor`.

    Loshchilov and Hutter, SGDR, ICLR 2017, eq. 5 without restarts.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def parameter_groups(
    parts: Mapping[str, nn.Module], rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups, two a part (with and without decay); a part whose rate is 0 is frozen (`requires_grad_(False)`).

    Vectors (norms, biases) are not decayed: pulling a gain to zero is no regularisation. A parameter that two parts share belongs to the
    first that names it.

    Args:
        parts: the model's parts by name.
        rates: base learning rate of each part; a part that is not named is frozen.

    Raises:
        InvalidInput: a rate for a part that the model does not have, or nothing to train.
    """
    if unknown := set(rates) - set(parts):
        raise InvalidInput(
            f"no part of the model is called {', '.join(sorted(unknown))}: it has {', '.join(parts)}"
        )
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()
    for name, module in parts.items():
        rate = rates.get(name, 0.0)
        mine = [p for p in module.parameters() if id(p) not in seen]
        seen.update(map(id, mine))
        if rate <= 0:
            for parameter in mine:
                parameter.requires_grad_(False)
            continue
        mine = [p for p in mine if p.requires_grad]  # what LoRA has frozen inside a part stays so
        for decay in (True, False):
            chosen = [p for p in mine if (p.ndim >= 2) is decay]
            if chosen:
                groups.append(
                    {
                        "params": chosen,
                        "lr": rate,
                        "base_lr": rate,
                        "weight_decay": weight_decay if decay else 0.0,
                        "part": name,
                    }
                )
    if not groups:
        raise InvalidInput("nothing to train: every part has learning rate 0")
    return groups


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
