"""Foreign text for prompts: tags, captions, questions and answers can say anything, but command nothing.

Every text that somebody else wrote passes through here before it stands in a prompt, of this model or of
another one. What any decoder could read as a special token is taken apart by a space and so is plain text;
control characters, and those that hide or reorder others, are gone (`tagstore.plain_text`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from tagstore.plain_text import one_line, plain_text

# how special tokens look in the decoders there are: <|im_end|> </s> <image> <<SYS>> <｜end▁of▁sentence｜>,
# [INST] [/INST] [TOOL_CALLS] [gMASK]; the space goes behind the first bracket
_MARKER = re.compile(r"([<＜])(?=[^\s<>＜＞]{1,64}[>＞])|(\[)(?=/?[a-z]?[A-Z][A-Z0-9_]+\])")


def neutral(text: str, special_tokens: Sequence[str] = ()) -> str:
    """Make a foreign text harmless in a prompt.

    Args:
        special_tokens: of the decoder that the prompt is for, if it is known; taken apart however they look.
    """
    text = _MARKER.sub(r"\1\2 ", plain_text(text))
    if special_tokens:
        pattern = _pattern(tuple(special_tokens))
        # taking one apart may leave another
        while (apart := pattern.sub(_apart, text)) != text:
            text = apart
    return text


def neutral_tag(text: str) -> str:
    """Make a tag harmless in a prompt: as `neutral`, on one line."""
    return neutral(one_line(text))


def neutral_messages(
    messages: Iterable[dict[str, Any]], special_tokens: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Make the texts of a conversation harmless in a chat template.

    Args:
        messages: {"role": ..., "content": "text", or a list of {"type": "image"} and {"type": "text", ...}}.
    """

    def part(value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            return value
        return {**value, "text": neutral(value["text"], special_tokens)}

    def content(value: Any) -> Any:
        return neutral(value, special_tokens) if isinstance(value, str) else [part(item) for item in value]

    return [{**message, "content": content(message["content"])} for message in messages]


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """List the tokens that a tokenizer reads out of a text before it splits it."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    tokens = [*tokenizer.all_special_tokens, *(token.content for token in added if token.special)]
    return tuple(sorted({token.strip() for token in tokens} - {""}))


@lru_cache(maxsize=64)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _apart(match: re.Match[str]) -> str:
    token = match.group()
    return f"{token[0]} {token[1:]}" if len(token) > 1 else ""
