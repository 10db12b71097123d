"""The miner that mines nothing, and several miners as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, tee
from typing import Any

from tagstore.mining.miner import Miner, Pictures, mine_seen, reads_pictures
from tagstore.types import Pair, Tag


class NoMiner:
    """Mines nothing, for stores that are searched for neighbours only."""

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

    @property
    def languages(self) -> frozenset[str]:
        """The languages that some part reads."""
        return frozenset().union(*(getattr(part, "languages", ()) for part in self.parts))

    @property
    def captions_by_language(self) -> Counter[str]:
        """Captions that the parts counted, each once: a language has the largest count of a part."""
        counts: Counter[str] = Counter()
        for part in self.parts:
            counts |= getattr(part, "captions_by_language", Counter())
        return counts

    @property
    def reads_pictures(self) -> bool:
        """Whether some part reads pictures."""
        return any(map(reads_pictures, self.parts))

    def mine_pictures(self, pairs: Sequence[Pair], pictures: Pictures) -> Iterator[tuple[Tag, ...]]:
        """As `mine`, with the pictures of the pairs for the parts that read them."""
        mined = [mine_seen(part, pairs, pictures) for part in self.parts]
        for tags in zip(*mined, strict=True):
            yield tuple(chain.from_iterable(tags))

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        """The look-ahead of each part is bounded, and so is what `tee` holds for the others."""
        streams = tee(pairs, len(self.parts))
        mined = [part.mine(stream) for part, stream in zip(self.parts, streams, strict=True)]
        for tags in zip(*mined, strict=True):
            yield tuple(chain.from_iterable(tags))
