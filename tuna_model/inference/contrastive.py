"""Contrastive decoding: prefer what the tags (or the picture) make more likely to what the decoder says
anyway.

    logits = (1 + alpha) logits(with) - alpha logits(against)      where p(with) >= beta max p(with)
             minus infinity                                        elsewhere

Visual contrastive decoding of Leng et al. (arXiv 2311.16922, equations 3 and 4), against any other prompt:
without the picture, without tags, or with wrong tags.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tagstore.errors import InvalidInput

_OF_TOKENS = frozenset({"token_type_ids", "mm_token_type_ids"})
"""Inputs that have a number for each token of a prompt."""


@contextmanager
def _states_kept(modules: Sequence[Any]) -> Iterator[None]:
    """Give modules back what they remember of the prompt that is being answered."""
    before = [module.rope_deltas for module in modules]
    try:
        yield
    finally:
        for module, state in zip(modules, before, strict=True):
            module.rope_deltas = state


class ContrastiveLogits(LogitsProcessor):  # type: ignore[misc]
    """A logits processor for `generate`, for greedy search, sampling and beams.

    Works with any decoder of transformers. Of a model that remembers positions of its prompt (Qwen-VL) each
    token costs a forward of the whole prompt; others keep a cache of their own.

    against = processor(text=prompt_without_image, ...)
    model.generate(**batch, logits_processor=[ContrastiveLogits(model, against, alpha=1.0)])
    """

    def __init__(self, model: Any, against: dict[str, Any], *, alpha: float = 1.0, beta: float = 0.1) -> None:
        """
        Args:
            model: the model that generates.
            against: inputs of its forward for as many prompts as the batch has, padded on the left, of any
                length.
            alpha: strength of the contrast; with 0 only `beta` has an effect.
            beta: leave out tokens less likely than this share of the likeliest; 0 for none.

        Raises:
            InvalidInput: a negative alpha, or beta outside [0, 1].
        """
        if alpha < 0 or not 0 <= beta <= 1:
            raise InvalidInput(
                f"alpha is {alpha} and beta {beta}: alpha must not be negative, beta lies between 0 and 1"
            )
        self._model, self._against, self._alpha, self._beta = model, dict(against), alpha, beta
        modules = model.modules() if hasattr(model, "modules") else ()
        self._stateful = [module for module in modules if hasattr(module, "rope_deltas")]
        """Parts that remember where the tokens of the last prompt stand (Qwen-VL)."""
        self._prompt_length: int | None = None
        self._cached: Tensor | None = None
        """Generated tokens that the cache holds."""
        self._cache_inputs: dict[str, Any] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Contrast the scores `[rows, vocabulary]` of the next token."""
        if self._prompt_length is None or input_ids.shape[1] < self._prompt_length:
            self._prompt_length = input_ids.shape[1]
        against = self._logits(input_ids[:, self._prompt_length :]).to(scores.device, torch.float32)
        plain = scores.log_softmax(-1)
        mixed = (1 + self._alpha) * scores.float() - self._alpha * against
        if self._beta:
            threshold = plain.max(-1, keepdim=True).values + math.log(self._beta)
            mixed = mixed.masked_fill(plain < threshold, -torch.inf)
        return mixed.to(scores.dtype)

    @torch.no_grad()
    def _logits(self, generated: Tensor) -> Tensor:
        """Logits of the next token after the other prompt and these tokens."""
        with _states_kept(self._stateful):
            if self._stateful:
                # where a token stands is known to the model alone, and only of the prompt it saw last
                out = self._model(**self._whole_inputs(generated), use_cache=False)
                logits: Tensor = out.logits[:, -1]
                return logits
            return self._cached_logits(generated)

    def _cached_logits(self, generated: Tensor) -> Tensor:
        step = generated.shape[1]
        if step and self._cached is not None and torch.equal(generated[:, :-1], self._cached):
            last = generated[:, -1:]
            mask = torch.cat([self._cache_inputs["attention_mask"], torch.ones_like(last)], dim=1)
            inputs = {"input_ids": last, **self._cache_inputs, "attention_mask": mask}
        else:
            # the first step, or beams that changed places: the cache is of no use
            inputs = self._whole_inputs(generated)
            mask = inputs["attention_mask"]
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -inputs["input_ids"].shape[1] :]
        out = self._model(**inputs, use_cache=True, logits_to_keep=1)
        self._cache_inputs = {"attention_mask": mask, "past_key_values": out.past_key_values}
        if getattr(out, "tag_bias", None) is not None:  # of our own model
            self._cache_inputs["tag_bias"] = out.tag_bias
        self._cached = generated
        logits: Tensor = out.logits[:, -1]
        return logits

    def _whole_inputs(self, generated: Tensor) -> dict[str, Any]:
        """Inputs of a forward without a cache; the other prompt is repeated for each beam."""
        against = {name: value.to(generated.device) for name, value in self._against.items()}
        beams = len(generated) // len(against["input_ids"])
        input_ids, others = self._model._expand_inputs_for_generation(beams, False, **against)
        mask = others.pop("attention_mask", torch.ones_like(input_ids))
        for name in _OF_TOKENS & others.keys():  # a generated token is no picture
            others[name] = torch.cat([others[name], torch.zeros_like(generated)], dim=1)
        return {
            **others,
            "input_ids": torch.cat([input_ids, generated], dim=1),
            "attention_mask": torch.cat([mask, torch.ones_like(generated)], dim=1),
        }
