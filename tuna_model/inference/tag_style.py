"""How tags are chosen and written for a model that was not trained on them: in prompts, and by the proxy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from tagstore.errors import InvalidInput
from tagstore.types import Retrieval
from tuna_model.inference.prompt import STYLES, chosen_tags, tag_lines
from tuna_model.processing.tags import ImageTags, TagLayout

MAX_TAGS = 100
"""Tags of a picture that may be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TagStyle:
    """How tags are chosen and written. A value that makes no sense is an `InvalidInput`."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    style: Literal["candidates", "list", "weights", "words"] = "list"
    """See `tag_prompt`. `candidates` says that the answer is among the tags: for stores of names."""
    place: Literal["user", "system"] = "user"
    """Before the words of the turn that holds the picture, or in the system's turn."""
    template: str = ""
    """Instead of the style's own words; holds {tags}, which the tags replace, separated by commas."""
    signal: Literal["relevance", "similarity", "vote_share"] = "relevance"
    """Which tags are the best. The relevance of a grounded store, else similarity, is a good choice."""
    max_tags: int = 10
    threshold: float = 0.0
    """Tags with less than this share of the best tag's weight are left out."""
    temperature: float = 0.1
    """Of the weights: softmax(signal / temperature), divided by the best one."""
    ban: tuple[str, ...] = ()
    """Tags that are never given, whatever their case."""
    text_only: bool = False
    """Leave the pictures out of what is asked: for a model that has no eyes."""

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise InvalidInput(f"style '{self.style}' is not one of {', '.join(STYLES)}")
        if self.place not in ("user", "system"):
            raise InvalidInput(f"place '{self.place}' is neither user nor system")
        if self.signal not in ("relevance", "similarity", "vote_share"):
            raise InvalidInput(f"signal '{self.signal}' is not one of relevance, similarity, vote_share")
        if self.template and "{tags}" not in self.template:
            raise InvalidInput("a template holds {tags}")
        if not 1 <= self.max_tags <= MAX_TAGS:
            raise InvalidInput(f"max_tags is {self.max_tags}: it must lie between 1 and {MAX_TAGS}")
        if not 0 <= self.threshold <= 1:
            raise InvalidInput(f"threshold is {self.threshold}: it must lie between 0 and 1")
        if not self.temperature > 0:
            raise InvalidInput(f"temperature is {self.temperature}: it must be positive")

    def choose(self, answer: Retrieval) -> ImageTags:
        """The tags of a picture that a model is given, best first."""
        # the store computed the relevance, so embeddings are not needed
        tags = ImageTags.of(answer, np.zeros((len(answer), 0), np.float32))
        banned = {text.casefold() for text in self.ban}
        tags = tags.take([i for i, text in enumerate(tags.texts) if text.casefold() not in banned])
        layout = TagLayout(signal=self.signal, cap=self.max_tags)
        return chosen_tags(tags, layout, temperature=self.temperature, threshold=self.threshold)

    def line(self, tags: ImageTags) -> str:
        """The words that give a model the tags of one picture; empty without tags."""
        if not len(tags):
            return ""
        if self.template:
            return self.template.replace("{tags}", ", ".join(tags.texts))
        return tag_lines(tags, style=self.style, signal=self.signal, temperature=self.temperature)

    def lines(self, tags: list[ImageTags]) -> list[str]:
        """The line of each picture, numbered if there are several; empty for one without tags."""
        numbered = len(tags) > 1
        lines = [self.line(of_picture) for of_picture in tags]
        return [f"Picture {i}: {line}" if numbered and line else line for i, line in enumerate(lines, 1)]
