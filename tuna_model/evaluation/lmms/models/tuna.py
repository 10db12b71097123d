"""TUNA as a model of lmms-eval, by its documented interface (`lmms_eval.api.model.lmms`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model

from tagstore.errors import InvalidInput
from tuna_model.inference.conversations import user_message
from tuna_model.inference.pipeline import Pipeline
from tuna_model.processing.foreign_text import neutral, special_tokens

_GENERATION = ("max_new_tokens", "do_sample", "num_beams", "temperature", "top_p", "top_k")


@register_model("tuna")
class Tuna(lmms):  # type: ignore[misc]
    """A preset or a directory, with a store."""

    def __init__(
        self,
        pretrained: str = "smol",
        store: str = "null://",
        batch_size: int = 1,
        device: str = "cpu",
        dtype: str = "float32",
        **other: Any,
    ) -> None:
        """Take `--model_args` and lmms-eval's own options. Raises `InvalidInput` for an unknown argument."""
        super().__init__()
        if other:
            raise InvalidInput(
                f"--model_args of tuna has no {', '.join(sorted(other))}: "
                "there are pretrained, store, device, dtype"
            )
        self.pipeline = Pipeline.load(pretrained, store=store, device=device, dtype=getattr(torch, dtype))
        self.batch_size_per_gpu = int(batch_size)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer each request, in order; requests with equal settings share batches."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in groups.values():
            for start in range(0, len(numbers), self.batch_size_per_gpu):
                batch = numbers[start : start + self.batch_size_per_gpu]
                settings = dict(requests[batch[0]].args[1])
                texts = self._generate([requests[i] for i in batch], settings)
                answers |= dict(zip(batch, texts, strict=True))
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would give it."""
        results = []
        for request in requests:
            context, target, *rest = request.args
            continuation = target if isinstance(target, str) else target(self._document(*rest[1:]))
            images = self._visuals(rest)
            prepared = self.pipeline.prepare([images], [[user_message(_clean(context), len(images))]])
            tokenizer = self.pipeline.processor.tokenizer
            continuation = neutral(continuation, special_tokens(tokenizer))
            ids = tokenizer(continuation, add_special_tokens=False, return_tensors="pt")["input_ids"].to(
                self.pipeline.model.device
            )
            inputs = dict(prepared.inputs)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], dim=1)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
            with torch.inference_mode():
                logits = self.pipeline.model(**inputs, logits_to_keep=ids.shape[1] + 1).logits[0, :-1].float()
            likelihood = logits.log_softmax(-1).gather(1, ids[0][:, None]).sum()
            results.append((float(likelihood), bool((logits.argmax(-1) == ids[0]).all())))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Raise `InvalidInput`: tasks with rounds are not supported."""
        raise InvalidInput("tuna answers single questions: choose tasks without rounds")

    def _generate(self, requests: Sequence[Any], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until", [])
        images = [self._visuals(request.args[2:]) for request in requests]
        conversations = [
            [user_message(_clean(request.args[0]), len(pictures))]
            for request, pictures in zip(requests, images, strict=True)
        ]
        options = {name: settings[name] for name in _GENERATION if settings.get(name) is not None}
        if not options.get("temperature"):
            options = {name: options[name] for name in options if name in ("max_new_tokens", "num_beams")}
        texts = [answer.text for answer in self.pipeline.answers(images, conversations, **options)]
        for stop in [until] if isinstance(until, str) else until:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return [text.strip() for text in texts]

    def _visuals(self, rest: Sequence[Any]) -> list[Any]:
        pictures_of, *position = rest
        return [picture.convert("RGB") for picture in pictures_of(self._document(*position))]

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]


def _clean(context: str) -> str:
    """Remove lmms-eval's image placeholders: the chat template writes the model's own."""
    return context.replace("<image>", "").strip()
