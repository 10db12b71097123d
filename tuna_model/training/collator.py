"""Samples to tensors: conversations through the chat template, labels on what the assistant says, tags where their image stands.

    <|im_start|>user\\n <tags> <image> Describe ...<|im_end|>\\n<|im_start|>assistant\\n | A dog runs.<|im_end|>\\n
    ------------------------------- not learnt ---------------------------------------  ------- learnt -------

Sequences are padded on the left: what is learnt stands at the end, so the decoder's head, on a small model a third of all work, is computed
for the last positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tagstore.errors import InvalidInput
from tagstore.readers.samples import Turn
from tuna_model.processing.processor import Encoded, TunaProcessor
from tuna_model.processing.tags import ImageTags

IGNORED = -100


class Collator:
    """Conversations and tags to a batch of the model."""

    def __init__(self, processor: TunaProcessor, *, template: str = "chat", max_length: int = 2048) -> None:
        """
        Args:
            template: `chat` or `plain` (`DataRecipe.template`).
            max_length: tokens after which a sequence is cut.
        """
        self.processor, self.template, self.max_length = processor, template, max_length

    def __call__(
        self,
        keys: Sequence[str],
        conversations: Sequence[Sequence[Turn]],
        tags: Sequence[Sequence[ImageTags]],
        contexts: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The model's text tensors with `labels` and `logits_to_keep`.

        Args:
            keys: of the samples, for messages.
            conversations: of each sample.
            tags: of each sample's images; as many as it has images, empty ones where there are no tags.
            contexts: text that stands before each sample's first question (captions of neighbours), or nothing.

        Raises:
            InvalidInput: a sample whose answer lies wholly beyond `max_length`.
        """
        encoded: list[Encoded] = []
        learnt: list[list[int]] = []
        for i, (key, turns, some) in enumerate(zip(keys, conversations, tags, strict=True)):
            one, learn = self.encode(turns, some, contexts[i] if contexts else "")
            if all(label == IGNORED for label in learn):
                raise InvalidInput(
                    f"sample {key}: nothing is left to learn of it within {self.max_length} tokens: raise data.max_length"
                )
            encoded.append(one)
            learnt.append(learn)
        batch = self.processor.pad(encoded, padding_side="left")
        length = batch["input_ids"].shape[1]
        labels = torch.full((len(encoded), length), IGNORED, dtype=torch.int64)
        for row, learn in enumerate(learnt):
            labels[row, length - len(learn) :] = torch.tensor(learn, dtype=torch.int64)
        first = int((labels != IGNORED).any(dim=0).nonzero()[0])
        return {**batch, "labels": labels, "logits_to_keep": length - max(0, first - 1)}

    def encode(
        self, turns: Sequence[Turn], tags: Sequence[ImageTags], context: str = ""
    ) -> tuple[Encoded, list[int]]:
        """One sample as token ids, and the label of each."""
        parts = []
        labels: list[int] = []
        for i, (text, learn) in enumerate(self.parts(turns, len(tags), context)):
            # every image stands in the first part
            part = self.processor.encode(text, list(tags) if i == 0 else (), add_special_tokens=i == 0)
            parts.append(part)
            labels += part.input_ids if learn else [IGNORED] * len(part.input_ids)
        whole = self.processor.join(parts)
        if len(whole.input_ids) > self.max_length:
            whole = Encoded(
                whole.input_ids[: self.max_length],
                whole.tag_index[: self.max_length],
                whole.tags,
                whole.words,
            )
        return whole, labels[: self.max_length]

    def parts(self, turns: Sequence[Turn], images: int, context: str = "") -> list[tuple[str, bool]]:
        """A conversation as texts and whether each is learnt. Tokenised one by one: at generation, too, the answer is apart."""
        if self.template == "plain":
            answer = " ".join(turn.text for turn in turns if turn.role == "assistant")
            end = self.processor.tokenizer.eos_token or ""
            return [
                (self.processor.image_token * images + (f"{context}\n" if context else ""), False),
                (answer + end, True),
            ]
        messages = to_messages(turns, images, context)
        parts: list[tuple[str, bool]] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:i], prompt=True)
            whole = self._render(messages[: i + 1], prompt=False)
            if not whole.startswith(prompt) or not prompt.startswith(done):
                raise InvalidInput(
                    "the model's chat template rewrites earlier turns when later ones come: it cannot be learnt turn by turn"
                )
            parts += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
            done = whole
        return parts

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool) -> str:
        text: str = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return text


def to_messages(turns: Sequence[Turn], images: int, context: str = "") -> list[dict[str, Any]]:
    """Turns as messages of a chat template, with the images (and then `context`) before the first text of the user."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        content: list[dict[str, Any]] = [{"type": "text", "text": turn.text}]
        if turn.role == "user" and images:
            before = f"{context}\n" if context else ""
            content = [{"type": "image"}] * images + [{"type": "text", "text": before + turn.text}]
            images = 0
        messages.append({"role": turn.role, "content": content})
    return messages


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
