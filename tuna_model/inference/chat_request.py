"""The body of a chat completion request, checked. `tuna serve` answers a wrong one with the field that is
wrong."""

from __future__ import annotations

import base64
import binascii
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tagstore.encoding.images import decode
from tagstore.errors import BadImage, InvalidInput
from tuna_model.inference.conversations import Message

MAX_TOKENS = 1024
"""Tokens of an answer, at most."""
MAX_PARTS = 4096
"""Messages and parts of messages, at most, over the whole conversation."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a conversation may hold; checked before any picture is decoded or any text is tokenised."""

    pictures: int = 64
    characters: int = 1_000_000
    prepare: Callable[[Any], Any] = lambda picture: picture
    """Makes what is kept of a decoded picture (a PIL image), so that only one of them is in memory."""


def _limits(info: ValidationInfo) -> RequestLimits:
    limits: RequestLimits = (info.context or {}).get("limits") or RequestLimits()
    return limits


def _picture(url: Any, info: ValidationInfo) -> Any:
    """Decode the picture of a data: URL.

    Others are refused: a server that fetches what strangers name reaches places that they cannot.
    """
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ValueError("give the picture as data:image/jpeg;base64,...; addresses are not fetched")
    try:
        picture = decode(base64.b64decode(url.partition(",")[2], validate=True))
    except binascii.Error as error:
        raise ValueError("what follows the comma is no base64") from error
    except BadImage as error:
        raise ValueError(str(error)) from error
    return _limits(info).prepare(picture)


class Part(BaseModel):
    """A part of a message: text, or a picture."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Annotated[Any, BeforeValidator(_picture)] = None
    """What `RequestLimits.prepare` made of the picture."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} has a field '{self.type}'")
        return self

    def for_pipeline(self) -> Message:
        """The part as a pipeline takes it; pictures are passed beside the messages."""
        return {"type": "text", "text": self.text} if self.type == "text" else {"type": "image"}


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatMessage(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_parts)]


class ChatRequest(BaseModel):
    """The body of a chat completion; fields that are not listed are ignored."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1, le=MAX_TOKENS)
    max_tokens: StrictInt | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: StrictFloat | None = Field(None, ge=0, le=2)
    top_p: StrictFloat | None = Field(None, ge=0, le=1)
    n: Literal[1] = 1
    stream: bool | None = False

    @model_validator(mode="before")
    @classmethod
    def _within_limits(cls, data: Any, info: ValidationInfo) -> Any:
        messages = data.get("messages") if isinstance(data, dict) else None
        if not isinstance(messages, list):
            return data
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        texts = [content for content in contents if isinstance(content, str)]
        texts += [
            text for part in parts if isinstance(part, dict) and isinstance(text := part.get("text"), str)
        ]
        counts = {
            "messages and parts": (len(messages) + len(parts), MAX_PARTS),
            "pictures": (
                sum(isinstance(part, dict) and part.get("type") == "image_url" for part in parts),
                _limits(info).pictures,
            ),
            "characters": (sum(map(len, texts)), _limits(info).characters),
        }
        for what, (count, most) in counts.items():
            if count > most:
                raise PydanticCustomError(
                    "too_much",
                    "messages hold {count} {what}, and this model reads {most} at most: send less",
                    {"count": count, "what": what, "most": most},
                )
        return data

    @property
    def images(self) -> list[Any]:
        """Pictures of all messages, in their order."""
        parts = [part for message in self.messages for part in message.content]
        return [part.image_url for part in parts if part.type == "image_url"]

    @property
    def conversation(self) -> list[Message]:
        """The messages as a pipeline takes them."""
        parts = [[part.for_pipeline() for part in message.content] for message in self.messages]
        return [
            {"role": message.role, "content": some}
            for message, some in zip(self.messages, parts, strict=True)
        ]

    @property
    def options(self) -> dict[str, Any]:
        """Options of `generate`; requests with equal ones may share a batch."""
        options: dict[str, Any] = {"max_new_tokens": self.max_completion_tokens or self.max_tokens or 64}
        if self.temperature:
            top_p = 1.0 if self.top_p is None else self.top_p
            options |= {"do_sample": True, "temperature": self.temperature, "top_p": top_p}
        return options


def read_request(body: bytes, limits: RequestLimits | None = None) -> ChatRequest:
    """Check a chat completion's body. Raises `InvalidInput` with the field that is wrong."""
    try:
        return ChatRequest.model_validate_json(body, context={"limits": limits})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]).lstrip(".")
    if first["type"] == "json_invalid":
        raise InvalidInput(f"the body is no JSON: {first['msg']}")
    if first["type"] == "too_much":
        raise InvalidInput(first["msg"])
    if first["type"] in ("missing", "too_short"):
        raise InvalidInput(f"{path} is missing")
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    raise InvalidInput(f"{path or 'the body'} is {reprlib.repr(first['input'])}: {reason}")
