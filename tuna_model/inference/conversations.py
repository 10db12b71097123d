"""Conversations read and checked, each alone, before a model computes anything for them.

    messages and pictures ──▶ checks of number and length ──▶ chat template ──▶ token ids, pixels

What is wrong with a conversation is found here, so that it fails alone and costs little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tagstore.errors import InvalidInput
from tuna_model.processing.chat_template import render
from tuna_model.processing.processor import TunaProcessor

Message = dict[str, Any]
"""{"role": "user", "content": "text", or [{"type": "image"}, {"type": "text", "text": "..."}]}"""
_CHARACTERS_OF_TOKEN = 64
"""Characters of a text for each token of the context beyond which it is refused without counting tokens."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that is ready for the image tower, the store and the decoder."""

    token_ids: list[int]
    """One image token stands for each picture."""
    pixels: torch.Tensor
    """`[n, 3, H, W]`, of the n pictures in their order."""
    new_tokens: int
    """Tokens that the answer may have; 0 if unknown."""


class Reader:
    """Reads conversations for one model. Safe for one thread at a time; `copy.deepcopy` makes one for another
    thread."""

    def __init__(self, processor: TunaProcessor, context: int) -> None:
        """
        Args:
            context: tokens that the decoder can read; 0 if it does not say.
        """
        self.processor, self.context = processor, context

    @property
    def most_pictures(self) -> int:
        """Pictures that the context can hold; 0 if it is not known."""
        return self.context // self.processor.image_tokens

    @property
    def most_characters(self) -> int:
        """Characters that can be within the context at all; 0 if it is not known."""
        return self.context * _CHARACTERS_OF_TOKEN

    def read(self, images: Sequence[Any], messages: Sequence[Message], *, new_tokens: int = 0) -> Prompt:
        """Check a conversation, tokenise it and decode its pictures.

        Args:
            images: of its {"type": "image"} parts: paths, encoded bytes, PIL images, or results of `pixels`.
            messages: the answer is the assistant's next one.
            new_tokens: that the answer may have.

        Raises:
            InvalidInput: more or fewer images than parts, or more tokens than the model's context holds.
        """
        self._check(images, messages)
        text = render(self.processor, self.processor.neutral(messages), add_generation_prompt=True)
        bos = self.processor.tokenizer.bos_token
        # a template that writes the first token itself must not get a second
        ids = self.processor.token_ids(text, add_special_tokens=not (bos and text.startswith(bos)))
        if ids.count(self.processor.image_token_id) != len(images):
            raise InvalidInput(
                f"the model's chat template writes {ids.count(self.processor.image_token_id)} image tokens "
                f"for {len(images)} pictures: it takes no pictures, set another processor.chat_template"
            )
        tokens = len(ids) + len(images) * (self.processor.image_tokens - 1)
        if self.context and tokens + new_tokens > self.context:
            answer = f" and the answer may have {new_tokens}" if new_tokens else ""
            raise InvalidInput(
                f"the messages with their pictures have {tokens} tokens{answer}, but the model's context "
                f"holds {self.context}: shorten the messages, or ask for fewer tokens"
            )
        pixels = torch.stack([self.pixels(image) for image in images]) if images else torch.zeros(0)
        return Prompt(ids, pixels, new_tokens)

    def pixels(self, image: Any) -> torch.Tensor:
        """Decode and resize a picture: `[3, H, W]`, as the image tower takes it."""
        if isinstance(image, torch.Tensor):
            return image
        pixels: torch.Tensor = self.processor.image_processor([image])["pixel_values"][0]
        return pixels

    def _check(self, images: Sequence[Any], messages: Sequence[Message]) -> None:
        contents = [message["content"] for message in messages]
        if not all(isinstance(content, str | list | tuple) for content in contents):
            raise InvalidInput("the content of a message is text or a list of parts, and never None")
        parts = [part for content in contents if not isinstance(content, str) for part in content]
        pictures = sum(part.get("type") == "image" for part in parts)
        if pictures != len(images):
            raise InvalidInput(
                f'the messages hold {pictures} parts {{"type": "image"}}, and {len(images)} images are given'
            )
        if self.context and pictures > self.most_pictures:
            raise InvalidInput(
                f"{pictures} pictures are more than the {self.most_pictures} that the model's context of "
                f"{self.context} tokens holds: send fewer"
            )
        characters = sum(len(content) for content in contents if isinstance(content, str))
        characters += sum(len(part.get("text") or "") for part in parts)
        if self.context and characters > self.most_characters:
            raise InvalidInput(
                f"the messages have {characters} characters, far more than the model's context of "
                f"{self.context} tokens holds: shorten them"
            )


def user_message(text: str, images: int = 0) -> Message:
    """Make a message of the user: pictures first, then text."""
    return {
        "role": "user",
        "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}],
    }
