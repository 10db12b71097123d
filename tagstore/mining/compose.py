"""Miners made of miners."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import tee
from typing import Any

from tagstore.mining.miner import Miner
from tagstore.types import Pair, Tag


class NoMiner:
    """Mines nothing: for stores whose neighbours are wanted without tags."""

    name = "none"
    version = "1"

    def __init__(self) -> None:
        self.settings: Mapping[str, Any] = {}

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """An empty tuple a pair."""
        return (() for _ in pairs)


class Composed:
    """Several miners over the same pairs; a pair's tags are those of the parts, in the order of the parts."""

    def __init__(self, parts: Sequence[Miner]) -> None:
        self.parts = tuple(parts)
        self.name = "+".join(part.name for part in parts)
        self.version = "+".join(part.version for part in parts)
        self.settings: Mapping[str, Any] = {part.name: dict(part.settings) for part in parts}

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """Each part's look-ahead is bounded, so what `tee` holds back for the others is bounded too."""
        streams = tee(pairs, len(self.parts))
        mined = [part.mine(stream) for part, stream in zip(self.parts, streams, strict=True)]
        for tags in zip(*mined, strict=True):
            yield tuple(tag for some in tags for tag in some)
