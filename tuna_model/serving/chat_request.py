"""The body of a chat completion request, checked. `tuna serve` answers a wrong one with the field that is
wrong."""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from tuna_model.inference.conversations import Message
from tuna_model.serving.chat_messages import STRICT, ChatMessage, RequestLimits, without_null
from tuna_model.serving.refusals import Refused

MAX_TOKENS = 1024
"""Tokens of an answer, at most."""
MAX_PARTS = 4096
"""Messages and parts of messages, at most, over the whole conversation."""
MAX_CHOICES = 8
"""Answers to one request, at most."""
MAX_STOPS = 4
"""Stop texts of a request, at most; OpenAI's number."""
MAX_STOP_CHARACTERS = 256
"""Characters of a stop text, at most: each token is compared with it."""
MIN_TEMPERATURE = 1e-5
"""Smallest temperature above 0: logits that are divided by a smaller one overflow."""

NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that are not offered, each with the values that ask for nothing."""
WITHOUT_EFFECT = (
    "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    "user",
)  # fmt: skip
"""Fields of OpenAI's that are about its books and caches, and not about the answer."""


def _stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(BaseModel):
    """How a stream is written."""

    model_config = STRICT

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False

    @model_validator(mode="after")
    def _without_obfuscation(self) -> Self:
        if self.include_obfuscation:
            raise ValueError("include_obfuscation is not offered: leave it out")
        return self


class ChatRequest(BaseModel):
    """The body of a chat completion, without what asks for nothing."""

    model_config = STRICT

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1, le=MAX_TOKENS)
    max_tokens: StrictInt | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: StrictFloat | None = Field(None, ge=0, le=2)
    top_p: StrictFloat | None = Field(None, ge=0, le=1)
    n: StrictInt = Field(1, ge=1, le=MAX_CHOICES)
    seed: StrictInt | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]],
        BeforeValidator(_stops),
        Field(max_length=MAX_STOPS),
    ] = []
    stream: StrictBool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.temperature and self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature is {self.temperature}: take 0 for the likeliest answer, "
                f"or at least {MIN_TEMPERATURE}"
            )
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens is the old name of max_completion_tokens: give one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream: true only")
        return self

    @property
    def images(self) -> list[Any]:
        """Pictures of all messages, in their order."""
        return [picture for message in self.messages for picture in message.pictures]

    @property
    def conversation(self) -> list[Message]:
        """The messages as a pipeline takes them."""
        return [message.for_pipeline() for message in self.messages]

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def options(self) -> dict[str, Any]:
        """Options of `Pipeline.answer_prompts` and `stream_choices`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_completion_tokens or self.max_tokens or 64}
        if self.temperature:
            top_p = 1.0 if self.top_p is None else self.top_p
            options |= {"do_sample": True, "temperature": self.temperature, "top_p": top_p}
            options |= {} if self.seed is None else {"seed": self.seed}
        options |= {"stop_texts": tuple(self.stop)} if self.stop else {}
        return options | ({"choices": self.n} if self.n > 1 else {})

    @property
    def shares_batch(self) -> bool:
        """Whether it may be answered together with requests of equal `options`.

        With a seed it may not: random numbers depend on the batch.
        """
        return not (self.stream or self.n > 1 or "seed" in self.options)


def read_request(body: bytes, limits: RequestLimits | None = None) -> ChatRequest:
    """Check a chat completion's body. Raises `Refused` with the field that is wrong."""
    limits = limits or RequestLimits()
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(f"the body is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise Refused(f"the body is {_shown(values)}: it must be an object")
    values = _offered(without_null(values))
    _check_size(values.get("messages"), limits)
    try:
        request = ChatRequest.model_validate(values, context={"limits": limits})
    except ValidationError as error:
        raise _refused(error) from error
    if limits.model and request.model not in (None, limits.model):
        raise Refused(
            f"The model `{request.model}` does not exist: this server has `{limits.model}`",
            param="model", code="model_not_found", status=404,
        )  # fmt: skip
    return request


def _offered(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out fields that ask for nothing; refuse those that ask for what is not offered."""
    for name, neutral in NOT_OFFERED.items():
        if name in values and not any(_equal(values[name], value) for value in neutral):
            raise Refused(
                f"{name} is {_shown(values[name])}: {name} is not offered by this server, leave it out",
                param=name, code="unsupported_parameter",
            )  # fmt: skip
    return {name: value for name, value in values.items() if name not in {*NOT_OFFERED, *WITHOUT_EFFECT}}


def _equal(value: Any, neutral: Any) -> bool:
    # False == 0, and is no number
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _check_size(messages: Any, limits: RequestLimits) -> None:
    """Refuse a conversation that is too large, before anything of it is decoded."""
    if not isinstance(messages, list):
        return
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    texts = [content for content in contents if isinstance(content, str)]
    texts += [text for part in parts if isinstance(part, dict) and isinstance(text := part.get("text"), str)]
    pictures = sum(isinstance(part, dict) and part.get("type") == "image_url" for part in parts)
    for what, count, most in (
        ("messages and parts", len(messages) + len(parts), MAX_PARTS),
        ("pictures", pictures, limits.pictures),
        ("characters", sum(map(len, texts)), limits.characters),
    ):
        if count > most:
            raise Refused(
                f"messages hold {count} {what}, and this model reads {most} at most: send less",
                param="messages",
            )


def _refused(error: ValidationError) -> Refused:
    """The first fault that pydantic found, as a person reads it."""
    first = error.errors(include_url=False)[0]
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"]).lstrip(".")
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    if first["type"] == "missing":
        return Refused(f"{path} is missing", param=path, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        message = f"{path} is not offered by this server, leave it out"
        return Refused(message, param=path, code="unknown_parameter")
    if first["type"] == "too_short":
        return Refused(f"{path} is missing or empty", param=path)
    if not path:
        return Refused(reason)
    return Refused(f"{path} is {_shown(first['input'])}: {reason}", param=path)


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # more digits than Python writes
        return f"a {type(value).__name__} that is too large"
