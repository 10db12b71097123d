"""Where pictures and texts stand in a request of each API that carries pictures.

Requests are taken as they come: what is not understood is left alone, and the upstream says what is wrong.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tagstore.errors import InvalidInput

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture in a request."""

    turn: int
    """Position of its turn."""
    data: bytes
    """Encoded, as it was sent."""


@dataclass(frozen=True, slots=True)
class Api:
    """The shape of one API's requests."""

    path: str
    """Behind the upstream's /v1."""
    turns: str
    """Name of the field with the turns."""
    picture: str
    """Type of a part that is a picture."""
    text: str
    """Type of a part that is text."""
    system: str
    """Name of the field with the system's words; empty where they are a turn."""

    def pictures(self, fields: Fields) -> list[Picture]:
        """The pictures of a request. Raises `InvalidInput` for one that is an address, or no base64."""
        return [Picture(turn, _data(part)) for turn, parts in self._parts(fields) for part in parts
                if isinstance(part, dict) and part.get("type") == self.picture]  # fmt: skip

    def add_to_turn(self, fields: Fields, turn: int, text: str) -> None:
        """Put a text before the words of a turn, behind the pictures that stand before them."""
        content = fields[self.turns][turn]["content"]
        first = next(
            (i for i, part in enumerate(content) if isinstance(part, dict) and part.get("type") == self.text),
            len(content),
        )
        content.insert(first, {"type": self.text, "text": text})

    def add_to_system(self, fields: Fields, text: str) -> None:
        """Put a text behind the system's words, which begin with it if there are none."""
        if not self.system:
            turns = fields[self.turns]
            first = turns[0] if turns and isinstance(turns[0], dict) else {}
            if first.get("role") not in ("system", "developer"):
                turns.insert(0, {"role": "system", "content": text})
            else:
                first["content"] = self._behind(first.get("content"), text)
        else:
            fields[self.system] = self._behind(fields.get(self.system), text)

    def leave_pictures_out(self, fields: Fields) -> None:
        """Take the pictures out; content that is text alone becomes one string, which every server reads."""
        for turn in fields[self.turns]:
            content = turn.get("content") if isinstance(turn, dict) else None
            if not isinstance(content, list):
                continue
            left = [p for p in content if not (isinstance(p, dict) and p.get("type") == self.picture)]
            texts = [p.get("text") for p in left if isinstance(p, dict) and p.get("type") == self.text]
            whole = len(texts) == len(left) and all(isinstance(text, str) for text in texts)
            turn["content"] = "\n".join(map(str, texts)) if whole else left

    def _behind(self, content: Any, text: str) -> Any:
        if isinstance(content, list):
            return [*content, {"type": "text", "text": text}]
        return f"{content}\n\n{text}" if isinstance(content, str) and content else text

    def _parts(self, fields: Fields) -> Iterator[tuple[int, list[Any]]]:
        turns = fields.get(self.turns)
        for number, turn in enumerate(turns if isinstance(turns, list) else ()):
            content = turn.get("content") if isinstance(turn, dict) else None
            if isinstance(content, list) and turn.get("role") == "user":
                yield number, content


CHAT = Api("/chat/completions", "messages", "image_url", "text", "")
RESPONSES = Api("/responses", "input", "input_image", "input_text", "instructions")
MESSAGES = Api("/messages", "messages", "image", "text", "system")
APIS = {api.path: api for api in (CHAT, RESPONSES, MESSAGES)}


def _data(part: Fields) -> bytes:
    """The bytes of a picture part."""
    source = part.get("source")
    if isinstance(source, dict):  # Anthropic's
        encoded = source.get("data") if source.get("type") == "base64" else None
    else:
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        head, _, encoded = url.partition(",") if isinstance(url, str) else ("", "", None)
        encoded = encoded if head.startswith("data:") and head.endswith(";base64") else None
    if not isinstance(encoded, str):
        raise InvalidInput("a picture is no data: URL with base64, and addresses are not fetched")
    try:
        return base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput("a picture is no base64") from error
