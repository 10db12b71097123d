"""The messages of a chat completion request: roles, texts and pictures, checked."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote_to_bytes

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from tagstore.encoding.images import decode
from tagstore.errors import BadImage
from tuna_model.inference.conversations import Message

STRICT = ConfigDict(extra="forbid")
"""A field that is not known is refused, never ignored."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a conversation may hold; checked before any picture is decoded or any text is tokenised."""

    pictures: int = 64
    characters: int = 1_000_000
    prepare: Callable[[Any], Any] = lambda picture: picture
    """Makes what is kept of a decoded picture (a PIL image), so that only one of them is in memory."""
    model: str = ""
    """Name that a request may give as its model; empty for any."""


def limits_of(info: ValidationInfo) -> RequestLimits:
    """The limits that validation was given."""
    limits: RequestLimits = (info.context or {}).get("limits") or RequestLimits()
    return limits


class ImageUrl(BaseModel):
    """A picture in a data: URL, which is decoded."""

    model_config = STRICT

    url: Any
    """What `RequestLimits.prepare` made of the picture."""
    detail: Literal["auto", "low", "high", "original"] = "auto"
    """Of no effect: the tower sees every picture in one size."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any, info: ValidationInfo) -> Any:
        value = {"url": value} if isinstance(value, str) else value
        if not isinstance(value, dict):
            raise ValueError('give {"url": "data:image/jpeg;base64,..."}')
        return {**without_null(value), "url": limits_of(info).prepare(_decoded(value.get("url")))}


def _decoded(url: Any) -> Any:
    """Decode the picture of a data: URL.

    Others are refused: a server that fetches what strangers name reaches places that they cannot.
    """
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ValueError("give the picture as data:image/jpeg;base64,...; addresses are not fetched")
    head, _, payload = url.partition(",")
    try:
        if "%" in payload:
            payload = unquote_to_bytes(payload).decode("ascii")
        # encoders break base64 into lines
        picture = base64.b64decode("".join(payload.split()), validate=True)
    except ValueError as error:
        raise ValueError("what follows the comma is no base64") from error
    if not head.endswith(";base64"):
        raise ValueError("a data: URL must say ;base64 before its comma")
    try:
        return decode(picture)
    except BadImage as error:
        raise ValueError(str(error)) from error


class Part(BaseModel):
    """A part of a message: text, or a picture."""

    model_config = STRICT

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        other = "image_url" if self.type == "text" else "text"
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            raise ValueError(f"a part of type {self.type} has a field '{self.type}', and no '{other}'")
        return self

    def for_pipeline(self) -> Message:
        """The part as a pipeline takes it; pictures are passed beside the messages."""
        return {"type": "text", "text": self.text} if self.type == "text" else {"type": "image"}


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_parts), Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, value: Any) -> Any:
        """Leave out fields that say nothing; clients send back messages as they got them."""
        if not isinstance(value, dict):
            return value
        kept = {name: field for name, field in value.items() if name == "content" or field not in (None, [])}
        if kept.get("role") == "assistant" and kept.get("content") is None:
            kept["content"] = ""
        return kept

    @model_validator(mode="after")
    def _pictures_are_the_users(self) -> Self:
        if self.role != "user" and self.pictures:
            raise ValueError("only messages of the role user may hold pictures")
        return self

    @property
    def pictures(self) -> list[Any]:
        """What was made of its pictures."""
        return [part.image_url.url for part in self.content if part.image_url is not None]

    def for_pipeline(self) -> Message:
        """The message as a pipeline takes it. `developer` is the newer name of `system`."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": [part.for_pipeline() for part in self.content]}


def without_null(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields that are given: null says that one is not."""
    return {name: value for name, value in fields.items() if value is not None}
