"""Samples to tensors: conversations through the chat template, labels on the assistant's words, tags beside
their image.

    <|im_start|>user\\n <tags> <image> Describe ...<|im_end|>\\n<|im_start|>assistant\\n A dog.<|im_end|>\\n
    ---------------------------------- no labels ------------------------------------ ----- labels -----

Sequences are padded on the left, so that labels stand at the end: then the decoder's head, a third of all
work on a small model, is computed for the last positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tagstore.errors import InvalidInput
from tagstore.readers.samples import Turn
from tuna_model.processing.chat_template import render
from tuna_model.processing.foreign_text import neutral, special_tokens
from tuna_model.processing.processor import EncodedPrompt, TunaProcessor
from tuna_model.processing.tags import ImageTags

IGNORED = -100
"""Label of a token that is not learnt."""


class Collator:
    """Makes batches of conversations and tags."""

    def __init__(self, processor: TunaProcessor, *, template: str = "chat", max_length: int = 2048) -> None:
        """
        Args:
            template: `chat` or `plain` (`DataRecipe.template`).
            max_length: tokens of a sequence, at most; longer ones are cut.
        """
        self.processor, self.template, self.max_length = processor, template, max_length

    def __call__(
        self,
        keys: Sequence[str],
        conversations: Sequence[Sequence[Turn]],
        tags: Sequence[Sequence[ImageTags]],
        contexts: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Make the model's text tensors, with `labels` and `logits_to_keep`.

        Args:
            keys: of the samples, for error messages.
            conversations: of each sample.
            tags: of each image of each sample; empty ones where there are no tags.
            contexts: text before each sample's first question (captions of neighbours), or nothing.

        Raises:
            InvalidInput: a sample's answer lies wholly beyond `max_length`.
        """
        encoded: list[EncodedPrompt] = []
        label_rows: list[list[int]] = []
        for i, (key, turns, sample_tags) in enumerate(zip(keys, conversations, tags, strict=True)):
            prompt, prompt_labels = self.encode(turns, sample_tags, contexts[i] if contexts else "")
            shown = self._image_tokens(prompt)
            if shown != len(sample_tags) * self.processor.image_tokens:
                raise InvalidInput(
                    f"sample {key}: a picture of it stands after its last answer, or beyond "
                    f"{self.max_length} tokens: leave it out, or raise data.max_length"
                )
            if all(label == IGNORED for label in prompt_labels):
                raise InvalidInput(
                    f"sample {key}: nothing is left to learn of it within {self.max_length} tokens: "
                    "raise data.max_length"
                )
            encoded.append(prompt)
            label_rows.append(prompt_labels)
        batch = self.processor.pad(encoded, padding_side="left")
        length = batch["input_ids"].shape[1]
        labels = torch.full((len(encoded), length), IGNORED, dtype=torch.int64)
        for row, values in enumerate(label_rows):
            labels[row, length - len(values) :] = torch.tensor(values, dtype=torch.int64)
        first = int((labels != IGNORED).any(dim=0).nonzero()[0])
        return {**batch, "labels": labels, "logits_to_keep": length - max(0, first - 1)}

    def encode(
        self, turns: Sequence[Turn], tags: Sequence[ImageTags], context: str = ""
    ) -> tuple[EncodedPrompt, list[int]]:
        """Encode one sample as token ids, with the label of each."""
        parts = []
        labels: list[int] = []
        left = list(tags)
        for i, (text, learn) in enumerate(self.parts(turns, len(tags), context)):
            pictures = text.count(self.processor.image_token)
            part = self.processor.encode(text, left[:pictures], add_special_tokens=i == 0)
            left = left[pictures:]
            parts.append(part)
            labels += part.input_ids if learn else [IGNORED] * len(part.input_ids)
        whole = self.processor.join(parts)
        if len(whole.input_ids) > self.max_length:
            whole = replace(
                whole,
                input_ids=whole.input_ids[: self.max_length],
                tag_index=whole.tag_index[: self.max_length],
            )
        return whole, labels[: self.max_length]

    def parts(self, turns: Sequence[Turn], images: int, context: str = "") -> list[tuple[str, bool]]:
        """Split a conversation into texts, each with whether it is learnt.

        They are tokenised one by one, since at generation, too, prompt and answer are tokenised apart.
        """
        if self.template == "plain":
            special = special_tokens(self.processor.tokenizer)
            answer = neutral(" ".join(turn.text for turn in turns if turn.role == "assistant"), special)
            context = neutral(context, special)
            end = self.processor.tokenizer.eos_token or ""
            return [
                (self.processor.image_token * images + (f"{context}\n" if context else ""), False),
                (answer + end, True),
            ]
        messages = self.processor.neutral(to_messages(turns, images, context))
        parts: list[tuple[str, bool]] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:i], prompt=True)
            whole = self._render(messages[: i + 1], prompt=False)
            if not whole.startswith(prompt) or not prompt.startswith(done):
                raise InvalidInput(
                    "the model's chat template changes earlier turns when later ones follow: "
                    "it cannot be learnt turn by turn"
                )
            parts += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
            done = whole
        return parts

    def _image_tokens(self, prompt: EncodedPrompt) -> int:
        """Tokens of pictures, without those of their tags."""
        image = self.processor.image_token_id
        return sum(
            token == image and tag < 0 for token, tag in zip(prompt.input_ids, prompt.tag_index, strict=True)
        )

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool) -> str:
        return render(self.processor, messages, add_generation_prompt=prompt)


def to_messages(turns: Sequence[Turn], images: int, context: str = "") -> list[dict[str, Any]]:
    """Turns to messages of a chat template, with the images where the turns have them, and `context` before
    the user's first text."""
    placed = any(turn.pictures for turn in turns)
    messages: list[dict[str, Any]] = []
    for turn in turns:
        places, text = turn.pictures, turn.text
        if turn.role == "user":
            if not placed:
                places, images = (0,) * images, 0
            if context:
                text, shift = f"{context}\n{text}", len(context) + 1
                places, context = tuple(place and place + shift for place in places), ""
        messages.append({"role": turn.role, "content": _content(text, places)})
    return messages


def _content(text: str, places: Sequence[int]) -> list[dict[str, Any]]:
    """The parts of a message whose pictures stand at these offsets of its text."""
    content: list[dict[str, Any]] = []
    start = 0
    for place in places:
        if place > start:
            content.append({"type": "text", "text": text[start:place]})
            start = place
        content.append({"type": "image"})
    if text[start:] or not content:
        content.append({"type": "text", "text": text[start:]})
    return content


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch to a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
