"""Answers with the tags behind them, and conversations that are ready for the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tagstore.types import Neighbour, Retrieval
from tuna_model.processing.tags import ImageTags


@dataclass(frozen=True, slots=True)
class WeighedTag:
    """A tag in the prompt, with its weight and signals."""

    text: str
    weight: float
    relevance: float
    similarity: float
    vote_share: float
    """Share of the neighbours that carry it."""
    image: int = 0
    """Number of its picture in the conversation."""

    @property
    def votes(self) -> float:
        """Deprecated name of `vote_share`."""
        return self.vote_share

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; "votes" is the deprecated name of "vote_share"."""
        return asdict(self) | {"votes": self.vote_share}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says, and the tags that it was given."""

    text: str
    tags: tuple[WeighedTag, ...]
    neighbours: tuple[Neighbour, ...]
    """Of all pictures, in their order."""
    store: str
    """Name of the store that answered; empty if none did."""
    version: int
    degraded: bool
    """Whether the store did not answer in time, so that the model answered without tags."""
    finished: bool = True
    """False if `max_new_tokens` cut it off."""
    tokens: int = 0
    """Of the answer, with its end."""
    prompt_tokens: int = 0
    """Of the conversation, with its pictures and tags."""


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """Conversations ready for `generate`."""

    inputs: dict[str, Any]
    tags: tuple[tuple[WeighedTag, ...], ...]
    """Of each conversation."""
    retrievals: tuple[tuple[Retrieval | None, ...], ...]
    """Of each conversation and each of its pictures; None where no store was asked or none answered."""
    degraded: tuple[bool, ...]
    """Of each conversation: whether the store did not answer for one of its pictures."""
    against: dict[str, Any] | None = None
    """Inputs of the same conversations without tags, for contrastive decoding; None for none."""


def weighed_tags(tags: ImageTags, weights: Iterator[float], image: int) -> list[WeighedTag]:
    """Pair the tags of one picture with the next weights."""
    signals = np.stack([tags.relevance, tags.similarity, tags.vote_share], axis=1).tolist()
    return [
        WeighedTag(text, next(weights), relevance, similarity, vote_share, image)
        for text, (relevance, similarity, vote_share) in zip(tags.texts, signals, strict=True)
    ]
