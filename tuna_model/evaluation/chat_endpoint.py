"""An endpoint that speaks OpenAI's chat completions, asked for one answer at a time: a judge, or a model."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from tagstore.errors import InvalidInput, MissingExtra, Unavailable

if TYPE_CHECKING:
    import httpx

ATTEMPTS = 3
"""Times that a request is sent: an endpoint that is busy (429) or has a fault (5xx) is asked again."""
RETRY_WAIT = 1.0
"""Seconds before the second attempt, where the endpoint names none; doubled before the third."""
LONGEST_WAIT = 60.0
"""Seconds before another attempt at most, whatever the endpoint names."""
_QUOTED = 300
"""Characters of an endpoint's error that are quoted."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of an endpoint."""

    text: str
    fields: Mapping[str, Any]
    """The whole answer, with what a server adds to the API's own fields."""
    headers: Mapping[str, str]
    """Of the HTTP answer; names in any case."""


@dataclass(slots=True)
class ChatEndpoint:
    """A model at `URL/chat/completions`. May be used by several threads."""

    url: str
    """Up to and including /v1."""
    model: str
    key: str = field(default="", repr=False)
    """Sent as a bearer token; taken from OPENAI_API_KEY if empty."""
    timeout: float = 120.0
    """Seconds for an answer."""
    _client: httpx.Client | None = field(default=None, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise InvalidInput(f"'{self.url}' is no address of an endpoint: http://HOST:PORT/v1")

    def complete(self, content: str | list[dict[str, Any]], **settings: Any) -> Completion:
        """Send one user's turn and return the answer.

        Args:
            content: the turn: text, or parts as the API has them.
            settings: further fields of the request, such as `temperature`.

        Raises:
            InvalidInput: the endpoint refuses the request (4xx), with what it says.
            Unavailable: it does not answer, has a fault, or its answer is no chat completion.
        """
        import httpx

        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **settings}
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = self._http().post(f"{self.url}/chat/completions", json=body)
            except httpx.HTTPError as error:
                raise Unavailable(f"{self.url} did not answer: {error or type(error).__name__}") from error
            if (answer.status_code != 429 and answer.status_code < 500) or attempt == ATTEMPTS:
                break
            time.sleep(_wait(answer.headers.get("retry-after"), attempt))
        if answer.status_code == 429 or answer.status_code >= 500:
            raise Unavailable(f"{self.url} answered {answer.status_code}: {answer.text[:_QUOTED]}")
        if answer.status_code >= 400:
            raise InvalidInput(f"{self.url} refused: {answer.status_code}, {answer.text[:_QUOTED]}")
        try:
            fields = answer.json()
            text = fields["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Unavailable(f"the answer of {self.url} is no chat completion: {error!r}") from error
        if not isinstance(text, str | None):
            raise Unavailable(f"the answer of {self.url} is no text but {type(text).__name__}")
        return Completion(text or "", fields, answer.headers)

    def served(self) -> list[str]:
        """Names of the models that the endpoint offers. Raises `Unavailable`, `InvalidInput`."""
        import httpx

        try:
            answer = self._http().get(f"{self.url}/models")
            answer.raise_for_status()
            return [str(model["id"]) for model in answer.json()["data"]]
        except httpx.HTTPStatusError as error:
            raise InvalidInput(f"{self.url}/models answered {error.response.status_code}") from error
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.url} did not answer: {error or type(error).__name__}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"{self.url}/models is no list of models: {error!r}") from error

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _http(self) -> httpx.Client:
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise MissingExtra("endpoints are asked with httpx: pip install 'tagstore[eval]'") from error
        with self._lock:
            if self._client is None:
                key = self.key or os.environ.get("OPENAI_API_KEY", "")
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                self._client = httpx.Client(headers=headers, timeout=self.timeout)
            return self._client


def _wait(named: str | None, attempt: int) -> float:
    """Seconds before another attempt: what the endpoint named, or twice as long each time."""
    try:
        return min(max(float(named or ""), 0.0), LONGEST_WAIT)
    except ValueError:  # none, or a date
        return RETRY_WAIT * 2.0 ** (attempt - 1)
