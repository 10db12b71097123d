"""Any vision-language model of transformers, asked with the tags of a store.

    asker = with_tags(model, processor, "grpc://localhost:50051/grocery", style="candidates")
    answer = asker.answer("photo.jpg", "What product is this?")      # .text, .tags, .store, .degraded
    inputs = asker.inputs(messages)                                  # for model.generate, a trainer, ...
    tagged = asker.tag(messages)                                     # .messages for a chat template

Messages are those of transformers' chat templates; their pictures are paths, bytes, PIL images or data: URLs.
Without pictures, or without an answer of the store, messages stay as they are: the model says what it says
without.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from tagstore.client import TagSource, connect
from tagstore.encoding.images import decode
from tagstore.errors import InvalidInput, TagstoreError, TimedOut
from tuna_model.inference.contrastive import ContrastiveLogits
from tuna_model.inference.tag_style import TagStyle
from tuna_model.processing.tags import ImageTags

log = logging.getLogger(__name__)

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TaggedMessages:
    """A conversation, and what was done to it."""

    plain: list[Message]
    """As they came."""
    messages: list[Message]
    """With tags; the same as `plain` if nothing was written."""
    tags: tuple[tuple[str, ...], ...] = ()
    """The tags that were written, of each picture."""
    store: str = ""
    """NAME@VERSION that they come from."""
    degraded: str = ""
    """Why a conversation with pictures got no tags: picture, address, deadline, unavailable."""


@dataclass(frozen=True, slots=True)
class TaggedAnswer:
    """What a model said."""

    text: str
    tags: tuple[tuple[str, ...], ...]
    store: str
    degraded: str


def with_tags(
    model: Any,
    processor: Any,
    store: str | TagSource,
    *,
    neighbours: int = 10,
    timeout: float = 5.0,
    **style: Any,
) -> TaggedModel:
    """Let a model look its pictures up.

    Args:
        model: with transformers' `generate`; it is not changed.
        processor: its own, with a chat template.
        store: URL of a store, or a source that `tagstore.connect` gave.
        neighbours: similar images to take tags from.
        timeout: seconds that the store has.
        style: fields of `TagStyle`: style="candidates", max_tags=5, place="system" ...

    Raises:
        InvalidInput: the processor has no chat template, or a field makes no sense.
    """
    if not hasattr(processor, "apply_chat_template") or not getattr(processor, "chat_template", None):
        raise InvalidInput(
            f"{type(processor).__name__} has no chat template: load the processor of a model that was "
            "trained to converse, or set processor.chat_template"
        )
    try:
        chosen = TagStyle(**style)
    except TypeError:
        known = [field.name for field in fields(TagStyle)]
        unknown = ", ".join(sorted(style.keys() - {*known}))
        raise InvalidInput(f"a style has no field {unknown}: there are {', '.join(known)}") from None
    source = connect(store, timeout=timeout) if isinstance(store, str) else store
    return TaggedModel(model, processor, source, chosen, neighbours)


class TaggedModel:
    """Made by `with_tags`. `close` it, or use it as a context manager, to close its store."""

    def __init__(
        self, model: Any, processor: Any, source: TagSource, style: TagStyle, neighbours: int
    ) -> None:
        self.model, self.processor, self.source, self.style = model, processor, source, style
        self._neighbours = neighbours
        self.degraded = 0
        """Conversations with pictures that got no tags."""

    def tag(self, messages: Sequence[Message]) -> TaggedMessages:
        """Write the tags of its pictures into a conversation, which is not changed itself."""
        messages = list(messages)
        turns = [
            (turn, part)
            for turn, message in enumerate(messages)
            for part in (message["content"] if isinstance(message.get("content"), list) else ())
            if isinstance(part, dict) and part.get("type") == "image"
        ]
        if not turns:
            return TaggedMessages(messages, messages)
        try:
            answers = self.source.retrieve([_picture(part) for _, part in turns], k=self._neighbours)
        except TimedOut as error:
            return self._without(messages, "deadline", error)
        except InvalidInput as error:
            return self._without(messages, "address" if "address" in str(error) else "picture", error)
        except TagstoreError as error:
            return self._without(messages, "unavailable", error)
        if any(answer.degraded for answer in answers):
            return self._without(messages, "unavailable", "the store did not answer in time")
        given = [self.style.choose(answer) for answer in answers]
        return TaggedMessages(
            messages,
            self._written(messages, [turn for turn, _ in turns], given),
            tuple(tags.texts for tags in given),
            f"{answers[0].store}@{answers[0].version}",
        )

    def inputs(self, messages: Sequence[Message] | TaggedMessages, **options: Any) -> Any:
        """Token ids and pixels of a conversation with its tags, on the model's device.

        Args:
            options: of the processor's `apply_chat_template`.
        """
        tagged = messages if isinstance(messages, TaggedMessages) else self.tag(messages)
        return self._encoded(tagged.messages, options)

    @torch.no_grad()
    def generate(
        self, messages: Sequence[Message] | TaggedMessages, *, contrast: float = 0.0, **options: Any
    ) -> Tensor:
        """New token ids `[rows, tokens]`, without the prompt's.

        Args:
            contrast: strength of contrastive decoding against the same conversation without tags; 0 for none.
            options: of the model's `generate`.
        """
        tagged = messages if isinstance(messages, TaggedMessages) else self.tag(messages)
        batch = self.inputs(tagged)
        if contrast and any(tagged.tags):
            logits = ContrastiveLogits(self.model, dict(self._encoded(tagged.plain, {})), alpha=contrast)
            options["logits_processor"] = [*options.get("logits_processor", ()), logits]
        ids: Tensor = self.model.generate(**batch, **options)
        return ids[:, batch["input_ids"].shape[1] :]

    def answer(self, image: Any, question: str, *, contrast: float = 0.0, **options: Any) -> TaggedAnswer:
        """Answer a question about one picture.

        Args:
            image: a path, encoded bytes, or a PIL image.
            contrast, options: as for `generate`; max_new_tokens is 64 and the search greedy unless given.
        """
        parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        tagged = self.tag([{"role": "user", "content": parts}])
        options = {"max_new_tokens": 64, "do_sample": False} | options
        ids = self.generate(tagged, contrast=contrast, **options)
        text = self.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
        return TaggedAnswer(text, tagged.tags, tagged.store, tagged.degraded)

    def close(self) -> None:
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encoded(self, messages: Sequence[Message], options: Mapping[str, Any]) -> Any:
        defaults = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        batch = self.processor.apply_chat_template(
            _loaded(messages), **{**defaults, "return_tensors": "pt", **options}
        )
        return batch.to(self.model.device)

    def _without(self, messages: list[Message], reason: str, error: object) -> TaggedMessages:
        log.warning("a conversation goes without tags (%s): %s", reason, error)
        self.degraded += 1
        return TaggedMessages(messages, messages, degraded=reason)

    def _written(
        self, messages: list[Message], turns: Sequence[int], given: Sequence[ImageTags]
    ) -> list[Message]:
        texts: dict[int, list[str]] = {}
        for turn, line in zip(turns, self.style.lines(list(given)), strict=True):
            if line:
                texts.setdefault(turn, []).append(line)
        if not texts and not self.style.text_only:
            return messages
        messages = [copy(message) for message in messages]
        if self.style.place == "system" and texts:
            lines = "\n".join(line for lines in texts.values() for line in lines)
            _add_to_system(messages, lines)
        else:
            for turn, of_turn in texts.items():
                messages[turn]["content"] = _before_words(messages[turn]["content"], "\n".join(of_turn))
        if self.style.text_only:
            for message in messages:
                if isinstance(content := message.get("content"), list):
                    message["content"] = [part for part in content if part.get("type") != "image"]
        return messages


def _before_words(content: Sequence[Message], line: str) -> list[Message]:
    """The parts with a line before the first words, behind the pictures that stand before them."""
    parts = list(content)
    first = next((i for i, part in enumerate(parts) if part.get("type") == "text"), len(parts))
    if first == len(parts):
        return [*parts, {"type": "text", "text": line}]
    # one part of words, because some templates write parts without anything between them
    return [
        *parts[:first],
        {"type": "text", "text": f"{line}\n\n{parts[first]['text']}"},
        *parts[first + 1 :],
    ]


def _add_to_system(messages: list[Message], line: str) -> None:
    """Put a line behind the system's words, or make it the system's turn."""
    if not messages or messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": line}]})
        return
    content = messages[0].get("content")
    if isinstance(content, list):
        messages[0]["content"] = [*content, {"type": "text", "text": f"\n\n{line}"}]
    else:
        messages[0]["content"] = f"{content}\n\n{line}" if content else line


def _picture(part: Mapping[str, Any]) -> Any:
    """The picture of a part as the store takes it: bytes, a path or a PIL image; no address."""
    value = next(
        (part[name] for name in ("image", "path", "url", "base64") if part.get(name) is not None), None
    )
    if "base64" in part or (isinstance(value, str) and value.startswith("data:")):
        encoded = str(value).partition(",")[2] if str(value).startswith("data:") else str(value)
        try:
            return base64.b64decode("".join(encoded.split()), validate=True)
        except binascii.Error as error:
            raise InvalidInput("a picture is no base64") from error
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise InvalidInput("a picture is an address, and addresses are not fetched: pass the picture itself")
    if value is None:
        raise InvalidInput("a picture's part has no picture: give it as image")
    return value


def _loaded(messages: Sequence[Message]) -> list[Message]:
    """The messages with decoded pictures, whatever a processor can decode; addresses are left to it."""
    return [
        {**message, "content": [_opened(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _opened(part: Message) -> Message:
    if part.get("type") != "image":
        return part
    try:
        image = _picture(part)
    except InvalidInput:
        return part
    if isinstance(image, str | os.PathLike):
        image = Path(image).read_bytes()
    return {"type": "image", "image": decode(image) if isinstance(image, bytes) else image}
