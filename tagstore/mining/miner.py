"""The protocol of miners, their identity in a version's record, and the pairs that no miner can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tagstore.mining.vocabulary import Rules
from tagstore.plain_text import is_missing
from tagstore.types import Pair, Rejected, Tag


@runtime_checkable
class Miner(Protocol):
    """Turns pairs into tags. `name`, `version` and `settings` identify it in every version of a store."""

    name: str
    version: str
    """Changes whenever the output may change."""
    settings: Mapping[str, Any]
    """JSON values, defaults included."""

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """One tuple of tags a pair, in order, read lazily with a bounded look-ahead."""
        ...


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures of a batch of pairs, as an encoder took them."""

    pixels: NDArray[np.uint8]
    """`[N, H, W, 3]`, at the size of the encoder's tower."""
    encoder: str = ""
    """The encoder's name: `Fingerprint.model`."""
    pooled: NDArray[np.float32] | None = None
    """What the encoder's tower pooled, `[N, C]`, if it can be had: `Encoder.encode_pooled`."""


@runtime_checkable
class PictureMiner(Miner, Protocol):
    """A miner that reads pictures too; a pair needs no caption for it."""

    reads_pictures: bool

    def mine_pictures(self, pairs: Sequence[Pair], pictures: Pictures) -> Iterator[tuple[Tag, ...]]:
        """One tuple of tags a pair, in order."""
        ...


def reads_pictures(miner: Miner) -> bool:
    """Whether a miner reads pictures, so that pairs need no caption."""
    return bool(getattr(miner, "reads_pictures", False))


def mine_seen(miner: Miner, pairs: Sequence[Pair], pictures: Pictures) -> Iterator[tuple[Tag, ...]]:
    """Mine pairs whose pictures are at hand, by any miner."""
    return miner.mine_pictures(pairs, pictures) if isinstance(miner, PictureMiner) else miner.mine(pairs)


def unread_captions(miner: Miner) -> Counter[str]:
    """Count the captions so far in languages that the miner does not read, by language; of all, under "".

    Empty for miners that do not say which languages they read (`languages`, `captions_by_language`).
    """
    counts: Counter[str] = getattr(miner, "captions_by_language", None) or Counter()
    languages: frozenset[str] = getattr(miner, "languages", frozenset())
    unread: Counter[str] = Counter()
    unread.update({code: n for code, n in counts.items() if code not in languages | {"zxx"}})
    unread[""] = counts.total()
    return unread


def identity(miner: Miner, rules: Rules) -> dict[str, Any]:
    """What a version records of its miner: equal identities give the same tags for the same captions."""
    return {
        "name": miner.name,
        "version": miner.version,
        "settings": dict(miner.settings),
        "vocabulary": rules.digest,
    }


def refuse(pair: Pair) -> Rejected | None:
    """Reject a pair without captions, with one that is no text, or without any letter or digit.

    What an export writes for a missing caption ("nan", "N/A") is none.
    """
    for number, caption in enumerate(pair.captions):
        if not isinstance(caption, str):
            return Rejected(pair.key, f"caption {number} is {type(caption).__name__}, not text", pair.origin)
    if not pair.captions:
        return Rejected(pair.key, "no caption", pair.origin)
    if all(map(is_missing, pair.captions)):
        return Rejected(pair.key, f"no caption: '{pair.captions[0]}' stands for a missing one", pair.origin)
    if not any(character.isalnum() for caption in pair.captions for character in caption):
        return Rejected(pair.key, "no caption has a letter or a digit", pair.origin)
    return None
