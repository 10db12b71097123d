"""Learning rates: parameter groups for each part of the model, linear warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tagstore.errors import InvalidInput


def learning_rate(step: int, *, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Factor on the base rate at `step` (from 0) of `steps`: linear from 1/warmup to 1, then a half cosine to
    `floor`.

    Loshchilov and Hutter, SGDR, ICLR 2017, eq. 5 without restarts.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def parameter_groups(
    parts: Mapping[str, nn.Module], rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Make two optimizer groups for each part, with and without weight decay.

    Vectors (norms, biases) are not decayed: pulling a gain to zero is no regularisation. A parameter that two
    parts share belongs to the first of them.

    Args:
        parts: the model's parts by name.
        rates: base learning rate of each part; parts that are not named are frozen (`requires_grad_(False)`).

    Raises:
        InvalidInput: a rate is of no part of the model, or nothing is left to train.
    """
    if unknown := set(rates) - set(parts):
        raise InvalidInput(
            f"no part of the model is called {', '.join(sorted(unknown))}: it has {', '.join(parts)}"
        )
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()
    for name, module in parts.items():
        rate = rates.get(name, 0.0)
        parameters = [p for p in module.parameters() if id(p) not in seen]
        seen.update(map(id, parameters))
        if rate <= 0:
            for parameter in parameters:
                parameter.requires_grad_(False)
            continue
        trained = [p for p in parameters if p.requires_grad]  # what LoRA has frozen inside a part stays so
        for decay, params in (
            (weight_decay, [p for p in trained if p.ndim >= 2]),
            (0.0, [p for p in trained if p.ndim < 2]),
        ):
            if params:
                groups.append({"params": params, "lr": rate, "base_lr": rate, "weight_decay": decay})
    if not groups:
        raise InvalidInput("nothing to train: every part has learning rate 0")
    return groups


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
