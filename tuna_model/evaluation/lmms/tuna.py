"""TUNA as a model of lmms-eval, by its interface `lmms_eval.api.model.lmms` (tested with 0.7.3)."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from PIL.Image import Image

from tagstore.encoding.images import perceptual_hash
from tagstore.errors import InvalidInput
from tagstore.types import Identity
from tuna_model.inference.answers import Answer
from tuna_model.inference.conversations import Message, user_message
from tuna_model.inference.pipeline import Pipeline
from tuna_model.processing.foreign_text import neutral, special_tokens

log = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_p", "top_k")
"""Settings of a task that mean nothing to greedy decoding."""
_DEFAULT_NEW_TOKENS = 1024
"""Tokens of an answer where a task does not say, as lmms-eval's own models have it; at most half the
context."""


class Tuna(lmms):  # type: ignore[misc]
    """A preset, a directory or a training run, with a store."""

    def __init__(
        self,
        pretrained: str = "smol",
        store: str = "null://",
        any_store: bool = False,
        timeout: float = 5.0,
        batch_size: int | str = 1,
        device: str = "cpu",
        dtype: str = "float32",
        **other: Any,
    ) -> None:
        """Take `--model_args` and lmms-eval's own options.

        Args:
            pretrained, store, any_store, timeout, device, dtype: as for `Pipeline.load`. Where lmms-eval runs
                as several processes, "cuda" is the GPU of each process's local rank.

        Raises:
            InvalidInput: an unknown argument, or a value that is none.
        """
        super().__init__()
        if other:
            raise InvalidInput(
                f"--model_args of tuna has no {', '.join(sorted(other))}: "
                "there are pretrained, store, any_store, timeout, device, dtype"
            )
        kind = getattr(torch, str(dtype), None)
        if not isinstance(kind, torch.dtype):
            raise InvalidInput(
                f"dtype={dtype}: torch has no such type; float32, bfloat16 and float16 are usual"
            )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InvalidInput(f"--batch_size {batch_size}: a number from 1 is expected, not 'auto'")
        self._device = torch.device(_device_of_rank(device))
        self.batch_size_per_gpu = int(batch_size)
        self.pipeline = Pipeline.load(
            str(pretrained), store=store, any_store=any_store, timeout=timeout, device=str(self._device),
            dtype=kind,
        )  # fmt: skip
        self._store, self._timeout = store, timeout

    @property
    def device(self) -> torch.device:
        """Where the model is; lmms-eval gathers the counts of all ranks there."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Requests that are answered at once."""
        return self.batch_size_per_gpu

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer each request, in order; requests with equal settings share batches."""
        answers: dict[int, GenerationResult] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        degraded = 0
        for numbers in groups.values():
            for start in range(0, len(numbers), self.batch_size_per_gpu):
                batch = numbers[start : start + self.batch_size_per_gpu]
                settings = dict(requests[batch[0]].args[1])
                batch_answers = self._answers([requests[i] for i in batch], settings)
                degraded += sum(answer.degraded for answer in batch_answers)
                stops = _stop_texts(settings)
                answers |= {
                    number: _result(answer, stops)
                    for number, answer in zip(batch, batch_answers, strict=True)
                }
        if degraded:
            log.warning(
                "%d of %d answers had no tags, because %s did not answer within %g s: give --model_args a "
                "longer timeout=",
                degraded, len(requests), self._store, self._timeout,
            )  # fmt: skip
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Return the loss of each continuation, and whether greedy decoding would give it, as `text`.

        The loss is the mean negative log-probability of its tokens, as lmms-eval's own models return it: its
        multiple choice takes the smallest.
        """
        # lmms-eval 0.7.3 makes a text of a bare pair, with which multiple choice cannot be scored
        return [GenerationResult(self._loss(*request.args)) for request in requests]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise `InvalidInput`: tasks with rounds are not supported."""
        raise InvalidInput("tuna answers single questions: choose tasks without rounds")

    def clean(self) -> None:
        """Let go of the model and the store; lmms-eval calls it after the last request."""
        self.pipeline.source.close()
        del self.pipeline
        super().clean()

    def _answers(self, requests: Sequence[Any], settings: dict[str, Any]) -> list[Answer]:
        options = _generation(settings)
        context = self.pipeline.reader.context
        options.setdefault("max_new_tokens", min(_DEFAULT_NEW_TOKENS, context // 2 or _DEFAULT_NEW_TOKENS))
        images = [self._pictures(*request.args[2:]) for request in requests]
        prompts = [
            self.pipeline.reader.read(
                pictures, _conversation(request.args[0], pictures), new_tokens=options["max_new_tokens"]
            )
            for request, pictures in zip(requests, images, strict=True)
        ]
        # beams go without stop texts: their answers are only cut afterwards
        stops = [] if options.get("num_beams", 1) > 1 else _stop_texts(settings)
        return self.pipeline.answer_prompts(
            prompts, identities=_identities(images), stop_texts=stops, **options
        )

    def _loss(self, context: str, target: Any, *place: Any) -> tuple[float, bool]:
        """The loss of a target after a context. Without a place there is no picture: lmms-eval asks so for
        the loss of a choice by itself."""
        pictures = self._pictures(*place)
        text = target if isinstance(target, str) else target(self._document(*place[1:]))
        prepared = self.pipeline.prepare(
            [pictures], [_conversation(context, pictures)], identities=_identities([pictures])
        )
        tokenizer = self.pipeline.processor.tokenizer
        text = neutral(text, special_tokens(tokenizer))
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(self.device)
        inputs = dict(prepared.inputs)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
        with torch.inference_mode():
            logits = self.pipeline.model(**inputs, logits_to_keep=ids.shape[1] + 1).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0])
        return float(loss), bool((logits.argmax(-1) == ids[0]).all())

    def _pictures(self, *place: Any) -> list[Image]:
        """The pictures of a request. Raises `InvalidInput` for a video or a sound."""
        if not place:
            return []
        pictures_of, number, task, split = place
        pictures = _flat(pictures_of(self._document(number, task, split)))
        for picture in pictures:
            if not isinstance(picture, Image):
                raise InvalidInput(
                    f"document {number} of task {task} has a {type(picture).__name__} where a picture is "
                    "expected: tuna takes pictures and text, no video and no sound"
                )
        return [picture.convert("RGB") for picture in pictures]

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]


def _device_of_rank(device: str) -> str:
    """The device of this process: "cuda" is the GPU of its local rank."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device


def _generation(settings: dict[str, Any]) -> dict[str, Any]:
    """Options of `generate` from those of a task, which samples at a temperature above 0."""
    names = ["max_new_tokens", "num_beams", "repetition_penalty"]
    sampled = bool(settings.get("temperature")) and settings.get("do_sample") is not False
    options = {name: settings[name] for name in [*names, *_SAMPLING] if settings.get(name) is not None}
    if sampled:
        return options | {"do_sample": True}
    return {name: value for name, value in options.items() if name not in _SAMPLING}


def _stop_texts(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else [text for text in until if text]


def _result(answer: Answer, stop_texts: Sequence[str]) -> GenerationResult:
    """An answer up to the first of its stop texts, with its tokens."""
    text = answer.text
    for stop in stop_texts:
        text = text.partition(stop)[0]
    return GenerationResult(text.strip(), TokenCounts(answer.prompt_tokens, answer.tokens))


def _conversation(context: str, pictures: Sequence[Image]) -> list[Message]:
    """A question. lmms-eval's placeholders are removed: the chat template writes the model's own."""
    return [user_message(context.replace("<image>", "").strip(), len(pictures))]


def _identities(images: Sequence[Sequence[Image]]) -> list[Identity]:
    """What is known of pictures that lmms-eval has decoded: their perceptual hash, for `exclude=self`."""
    return [Identity(perceptual_hash=perceptual_hash(image)) for pictures in images for image in pictures]


def _flat(visuals: Any) -> list[Any]:
    if not isinstance(visuals, list | tuple):
        return [] if visuals is None else [visuals]
    return [picture for visual in visuals for picture in _flat(visual)]
