"""Prepared conversations to the tokens of answers: `generate` of the model, with or without beams."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from tagstore.errors import InvalidInput
from tuna_model.inference.answers import PreparedBatch
from tuna_model.inference.contrastive import ContrastiveLogits
from tuna_model.inference.decoding import Ending, GrowingAnswers
from tuna_model.modeling.model import TunaForConditionalGeneration
from tuna_model.processing.processor import TunaProcessor


class Generation:
    """Generates answers with one model. Safe for one thread at a time."""

    def __init__(
        self, model: TunaForConditionalGeneration, processor: TunaProcessor, contrast: float = 0.0
    ) -> None:
        """
        Args:
            contrast: strength of the contrast with `PreparedBatch.against`.
        """
        self._model, self._processor, self._contrast = model, processor, contrast

    def generate(
        self,
        prepared: PreparedBatch,
        options: dict[str, Any],
        choices: int,
        stop_texts: Sequence[str],
        seed: int | None,
        gone: Sequence[threading.Event],
        listener: Callable[[int, str], object] | None = None,
    ) -> list[Ending]:
        """Generate without beams; of each prompt `choices` answers, one after the other.

        Args:
            options: of the model's `generate`.
            gone: none, or one for each prompt: its answers end once it is set.
            listener: as for `GrowingAnswers`.
        """
        if "num_return_sequences" in options:
            raise InvalidInput("give choices=N instead of num_return_sequences")
        growing = GrowingAnswers(
            self._processor.tokenizer,
            prepared.inputs["input_ids"].shape[1],
            self._end_tokens().tolist(),
            stop_texts=stop_texts,
            gone=gone,
            listener=listener,
        )
        if choices > 1:
            options = options | {"num_return_sequences": choices}
        processors = [_Finite(), *options.get("logits_processor", []), *self._contrasted(prepared)]
        options = options | {"logits_processor": processors}
        with torch.inference_mode(), self._seeded(seed):
            self._model.generate(**prepared.inputs, **options, stopping_criteria=[growing])
        return growing.endings()

    def search_beams(
        self,
        prepared: PreparedBatch,
        options: dict[str, Any],
        choices: int,
        stop_texts: Sequence[str],
        gone: Sequence[threading.Event],
    ) -> list[Ending]:
        """Generate with beams; the best answer of each prompt. Arguments as for `generate`."""
        if stop_texts or choices > 1:
            raise InvalidInput("num_beams goes with neither stop texts nor several choices: set it to 1")
        stopping = StoppingCriteriaList([_StopWhenSet(gone)]) if gone else None
        processors = [*options.get("logits_processor", []), *self._contrasted(prepared)]
        options = options | ({"logits_processor": processors} if processors else {})
        with torch.inference_mode():
            out = self._model.generate(**prepared.inputs, **options, stopping_criteria=stopping)
        prompt_length, prompts = prepared.inputs["input_ids"].shape[1], len(prepared.tags)
        rows = out[:: len(out) // prompts, prompt_length:]
        ends = np.isin(rows.cpu().numpy(), self._end_tokens())
        texts = self._processor.batch_decode(
            rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [
            Ending(text.strip(), int(end.argmax()) + 1 if end.any() else len(end), bool(end.any()))
            for text, end in zip(texts, ends, strict=True)
        ]

    def _contrasted(self, prepared: PreparedBatch) -> list[LogitsProcessor]:
        if prepared.against is None:
            return []
        return [ContrastiveLogits(self._model, prepared.against, alpha=self._contrast)]

    @contextlib.contextmanager
    def _seeded(self, seed: int | None) -> Iterator[None]:
        """Random numbers of a seed; those of others go on afterwards as if nothing had been."""
        if seed is None:
            yield
            return
        device = self._model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def _end_tokens(self) -> Any:
        end = self._model.generation_config.eos_token_id
        return np.atleast_1d(self._processor.tokenizer.eos_token_id if end is None else end)


class _Finite(LogitsProcessor):  # type: ignore[misc]
    """Refuses logits that are not numbers.

    The likeliest of them is token 0, which many decoders don't show: the answer would be empty, without a
    word.
    """

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if bool(scores.isnan().any()):
            raise ArithmeticError(
                "the decoder's logits are not numbers (NaN): its weights are damaged, or it needs more range "
                "than float16 has, so load it with dtype bf16 or fp32"
            )
        return scores


class _StopWhenSet(StoppingCriteria):  # type: ignore[misc]
    """Ends each answer of a batch when its event is set."""

    def __init__(self, stops: Sequence[threading.Event]) -> None:
        self._stops = stops

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        ended = torch.tensor([stop.is_set() for stop in self._stops], device=input_ids.device)
        return ended.repeat_interleave(len(input_ids) // len(self._stops))
