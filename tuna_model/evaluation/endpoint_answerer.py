"""A model that somebody serves as the `Answerer` of benchmarks: any endpoint of OpenAI's chat completions.

Asked once bare and once through `tuna proxy`, it shows what a store is worth to that model.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from tagstore.encoding.images import decode
from tuna_model.evaluation.chat_endpoint import ChatEndpoint, Completion
from tuna_model.evaluation.questions import Question, TaskAnswer

TAGS_HEADER = "x-tuna-tags"
"""Header in which `tuna proxy` names the tags it gave, as a JSON list; `tuna serve` has a field."""
DEGRADED_HEADER = "x-tuna-degraded"
"""Header in which `tuna proxy` says why it gave none."""
_COMMON_FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
"""Formats that every engine decodes, with their media types; other pictures are sent as PNG."""


class EndpointAnswerer:
    """Asks an endpoint, several questions at once. Greedy (temperature 0)."""

    def __init__(self, endpoint: ChatEndpoint, *, pictures: bool = True) -> None:
        """
        Args:
            pictures: whether the questions' images are sent. Without them a proxy cannot look anything up.
        """
        self.endpoint, self.pictures = endpoint, pictures

    def answer(self, questions: Sequence[Question], *, max_new_tokens: int) -> list[TaskAnswer]:
        """See `Answerer`. Raises `InvalidInput`, `Unavailable` as the endpoint does."""
        with ThreadPoolExecutor(max_workers=max(len(questions), 1)) as pool:
            return list(pool.map(lambda question: self._ask(question, max_new_tokens), questions))

    def describe(self) -> Mapping[str, Any]:
        """See `Answerer`."""
        return {
            "model": self.endpoint.model,
            "endpoint": self.endpoint.url,
            "pictures": "sent" if self.pictures else "left out",
            "generation": {"temperature": 0},
        }

    def _ask(self, question: Question, length: int) -> TaskAnswer:
        content: list[dict[str, Any]] = []
        if self.pictures:
            content.append({"type": "image_url", "image_url": {"url": _data_url(question.image.read())}})
        content.append({"type": "text", "text": question.text})
        turn = content if self.pictures else question.text
        completion = self.endpoint.complete(turn, temperature=0, max_tokens=length)
        degraded = bool(completion.fields.get("degraded")) or DEGRADED_HEADER in completion.headers
        return TaskAnswer(completion.text, _tags(completion), degraded)


def _data_url(data: bytes) -> str:
    """A picture as data: URL; formats that an engine may not know become PNG. Raises `BadImage`."""
    picture = decode(data)
    with Image.open(io.BytesIO(data)) as raw:
        kind = _COMMON_FORMATS.get(raw.format or "")
    if kind is None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        data, kind = buffer.getvalue(), "image/png"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _tags(completion: Completion) -> tuple[str, ...]:
    """The tags that the model was given, as a server or a proxy says; none if it says nothing."""
    tags = completion.fields.get("tags")
    if tags is None:
        try:
            tags = json.loads(completion.headers.get(TAGS_HEADER, "[]"))
        except ValueError:
            return ()
    if not isinstance(tags, list):
        return ()
    return tuple(str(tag.get("text", "") if isinstance(tag, Mapping) else tag) for tag in tags)
