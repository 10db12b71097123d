"""Conversations through any decoder's chat template.

Templates differ in what they take. Some read a message's content as a list of parts. Others read it only as
text, and write a list as Python shows it, or fail on it. Some have no system turn. Each template is tried
once on a short conversation, and messages are given to it in the form that it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from tagstore.errors import InvalidInput

Message = dict[str, Any]
_PROBE = "a probe of the template"


@dataclass(frozen=True, slots=True)
class TemplateForm:
    """What a chat template takes."""

    parts: bool
    """Whether content is a list of parts; else text, with the image token in it."""
    system: bool
    """Whether there is a system turn; else its text comes before the first of the user."""


def render(processor: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """Write a conversation as the processor's chat template does.

    Args:
        processor: with `chat_template`, `apply_chat_template` and `image_token`.
        messages: content is text, or a list of {"type": "image"} and {"type": "text", "text": ...}.

    Raises:
        InvalidInput: the template refuses these messages.
    """
    form = _form(processor.chat_template, tuple(sorted(processor.tokenizer.special_tokens_map.items())))
    if not form.system:
        messages = _system_to_user(messages)
    given = [
        {**message, "content": _content(message["content"], form, processor.image_token)}
        for message in messages
    ]
    try:
        text: str = processor.apply_chat_template(
            given, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError) as error:
        raise InvalidInput(f"the model's chat template refuses these messages: {error}") from error
    return text


@lru_cache(maxsize=64)
def _form(template: str, special_tokens: tuple[tuple[str, Any], ...]) -> TemplateForm:
    def reads(*messages: Message) -> bool:
        try:
            [text], _ = render_jinja_template(
                [list(messages)], chat_template=template, **dict(special_tokens)
            )
        except (TemplateError, TypeError):
            return False
        # a list that is written as Python shows it has the names of its fields
        return text.count(_PROBE) == len(messages) and "'type'" not in text

    listed = [{"type": "text", "text": _PROBE}]
    parts = reads({"role": "user", "content": listed})
    content: Any = listed if parts else _PROBE
    system = reads({"role": "system", "content": content}, {"role": "user", "content": content})
    return TemplateForm(parts, system)


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _content(content: Any, form: TemplateForm, image_token: str) -> Any:
    parts = _parts(content)
    if form.parts:
        return parts
    return "".join(f"{image_token}\n" if part.get("type") == "image" else part["text"] for part in parts)


def _system_to_user(messages: Sequence[Message]) -> list[Message]:
    """Put the text of system turns before the next turn of the user, or the last one."""
    merged: list[Message] = []
    before: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "system":
            before += [*_parts(message["content"]), {"type": "text", "text": "\n\n"}]
        elif message["role"] == "user" and before:
            merged.append({**message, "content": [*before, *_parts(message["content"])]})
            before = []
        else:
            merged.append(message)
    if before:
        merged.append({"role": "user", "content": before[:-1]})
    return merged
