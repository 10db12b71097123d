"""Miners that the ingests of a server share: each holds a language model of a hundred megabytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from threading import Lock

from tagstore.mining import Miner, Pictures, load_miner, mine_seen, reads_pictures
from tagstore.types import Pair, Tag

KEPT = 2
"""Miners that are kept for the next ingest."""


class SharedMiner:
    """A miner for several threads, which mines one batch at a time."""

    def __init__(self, miner: Miner) -> None:
        self._miner, self._lock = miner, Lock()
        self.name, self.version, self.settings = miner.name, miner.version, miner.settings

    @property
    def languages(self) -> frozenset[str]:
        languages: frozenset[str] = getattr(self._miner, "languages", frozenset())
        return languages

    @property
    def captions_by_language(self) -> Counter[str]:
        counts: Counter[str] = getattr(self._miner, "captions_by_language", None) or Counter()
        return counts

    @property
    def reads_pictures(self) -> bool:
        return reads_pictures(self._miner)

    def mine_pictures(self, pairs: Sequence[Pair], pictures: Pictures) -> Iterator[tuple[Tag, ...]]:
        with self._lock:
            return iter(list(mine_seen(self._miner, pairs, pictures)))

    def mine(self, pairs: Iterable[Pair]) -> Iterator[tuple[Tag, ...]]:
        with self._lock:
            return iter(list(self._miner.mine(pairs)))


class SharedMiners:
    """Miners by their specs. Safe for threads."""

    def __init__(self) -> None:
        self._miners: dict[str, SharedMiner] = {}
        self._lock = Lock()

    def get(self, spec: str) -> Miner:
        """Return the miner of a spec, the last used of which stay loaded. Raises `InvalidInput`."""
        with self._lock:
            miner = self._miners.pop(spec, None) or SharedMiner(load_miner(spec))
            self._miners[spec] = miner
            if len(self._miners) > KEPT:
                del self._miners[next(iter(self._miners))]
            return miner
