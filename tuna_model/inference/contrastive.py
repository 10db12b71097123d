"""Contrastive decoding: say what the tags (or the picture) make more likely, not what the decoder would say anyway.

    logits = (1 + alpha) logits(with) - alpha logits(against)      where p(with) >= beta max p(with), else minus infinity

Visual contrastive decoding of Leng et al. (arXiv 2311.16922, equations 3 and 4); here what is contrasted against is any other prompt:
without the picture, without tags, or with wrong tags.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tagstore.errors import InvalidInput


class ContrastiveLogits(LogitsProcessor):  # type: ignore[misc]
    """A logits processor for `generate`, for greedy search, sampling and beams.

    against = processor(text=prompt_without_image, ...)
    model.generate(**batch, logits_processor=[ContrastiveLogits(model, against, alpha=1.0)])
    """

    def __init__(self, model: Any, against: dict[str, Any], *, alpha: float = 1.0, beta: float = 0.1) -> None:
        """
        Args:
            model: the model that generates.
            against: inputs of its forward for as many prompts as the batch has, padded on the left; its length may be another.
            alpha: how strongly; 0 changes nothing but what `beta` leaves out.
            beta: tokens less likely than this share of the likeliest are never said; 0 for no such limit.

        Raises:
            InvalidInput: a negative alpha, or beta outside [0, 1].
        """
        if alpha < 0 or not 0 <= beta <= 1:
            raise InvalidInput(
                f"alpha is {alpha} and beta {beta}: alpha must not be negative, beta lies between 0 and 1"
            )
        self._model, self._against, self._alpha, self._beta = model, dict(against), alpha, beta
        self._prompt: int | None = None
        self._said: Tensor | None = None
        """Tokens that the cache holds, beyond the prompt."""
        self._kwargs: dict[str, Any] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` `[rows, vocabulary]` of the next token, contrasted."""
        if self._prompt is None or input_ids.shape[1] < self._prompt:
            self._prompt = input_ids.shape[1]
        said = input_ids[:, self._prompt :]
        against = self._logits(said).to(scores.device, torch.float32)
        plain = scores.log_softmax(-1)
        mixed = (1 + self._alpha) * scores.float() - self._alpha * against
        if self._beta:
            mixed = mixed.masked_fill(
                plain < plain.max(-1, keepdim=True).values + math.log(self._beta), -torch.inf
            )
        return mixed.to(scores.dtype)

    @torch.no_grad()
    def _logits(self, said: Tensor) -> Tensor:
        rows = self._against["input_ids"].shape[0]
        if (
            self._said is not None
            and said.shape[1] == self._said.shape[1] + 1
            and torch.equal(said[:, :-1], self._said)
        ):
            new = said[:, -1:]
            mask = torch.cat([self._kwargs["attention_mask"], torch.ones_like(new)], dim=1)
            inputs = {"input_ids": new, **self._kwargs, "attention_mask": mask}
        else:
            # the first step, or beams that changed places: the whole of it again
            inputs = self._whole(said, said.shape[0] // rows)
            mask = inputs["attention_mask"]
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -inputs["input_ids"].shape[1] :]
        out = self._model(**inputs, use_cache=True, logits_to_keep=1)
        self._kwargs = {"attention_mask": mask, "past_key_values": out.past_key_values}
        if out.tag_bias is not None:
            self._kwargs["tag_bias"] = out.tag_bias
        self._said = said
        logits: Tensor = out.logits[:, -1]
        return logits

    def _whole(self, said: Tensor, beams: int) -> dict[str, Any]:
        against = {name: value.to(said.device) for name, value in self._against.items()}
        input_ids, others = self._model._expand_inputs_for_generation(beams, False, **against)
        mask = others.pop("attention_mask", torch.ones_like(input_ids))
        return {
            **others,
            "input_ids": torch.cat([input_ids, said], dim=1),
            "attention_mask": torch.cat([mask, torch.ones_like(said)], dim=1),
        }
