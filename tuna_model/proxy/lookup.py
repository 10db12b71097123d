"""Pictures to the store's answers: at once, within a deadline, each picture only once for a while."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from cachetools import TTLCache

from tagstore.client import aio
from tagstore.errors import InvalidInput, TimedOut
from tagstore.types import Retrieval

Key = tuple[str, bytes]
"""Name of a store, sha256 of a picture."""


class Lookup:
    """Asks stores about pictures. To be used in one event loop."""

    def __init__(
        self,
        stores: Mapping[str, str],
        *,
        neighbours: int,
        deadline: float,
        cache_entries: int,
        cache_seconds: float,
    ) -> None:
        """
        Args:
            stores: name -> URL; the first is the one that is asked by default.
            neighbours, deadline, cache_entries, cache_seconds: see `ProxySettings`.

        Raises:
            InvalidInput: a URL means nothing.
        """
        self.default = next(iter(stores))
        self._sources = {name: aio.connect(url, timeout=deadline) for name, url in stores.items()}
        self._neighbours, self._deadline = neighbours, deadline
        self._cache: TTLCache[Key, Retrieval] = TTLCache(cache_entries, cache_seconds)
        self._asked: dict[Key, asyncio.Task[Retrieval]] = {}
        """Pictures that a store is being asked about: requests for the same one wait for the same answer."""
        self.hits = 0

    async def __call__(self, pictures: Sequence[bytes], store: str = "") -> list[Retrieval]:
        """The store's answer for each picture.

        Raises:
            InvalidInput: there is no such store, or one of the pictures cannot be read.
            TimedOut: the deadline has passed.
            TagstoreError: what else the store says.
        """
        name = store or self.default
        if name not in self._sources:
            raise InvalidInput(f"there is no store '{name[:100]}' here: there are {', '.join(self._sources)}")
        try:
            async with asyncio.timeout(self._deadline):
                return await asyncio.gather(*(self._answer(name, picture) for picture in pictures))
        except TimeoutError:
            raise TimedOut(f"store '{name}' did not answer within {self._deadline:g} s") from None

    async def close(self) -> None:
        for task in self._asked.values():
            task.cancel()
        for source in self._sources.values():
            await source.close()

    async def _answer(self, name: str, picture: bytes) -> Retrieval:
        key = name, hashlib.sha256(picture).digest()
        if (known := self._cache.get(key)) is not None:
            self.hits += 1
            return known
        task = self._asked.get(key)
        if task is None:
            task = self._asked[key] = asyncio.create_task(self._ask(key, picture))
            task.add_done_callback(lambda done: self._settled(key, done))
        # another request may wait for the same answer when this one gives up
        return await asyncio.shield(task)

    async def _ask(self, key: Key, picture: bytes) -> Retrieval:
        [answer] = await self._sources[key[0]].retrieve([picture], k=self._neighbours)
        return answer

    def _settled(self, key: Key, done: asyncio.Task[Any]) -> None:
        del self._asked[key]
        if not done.cancelled() and done.exception() is None and not done.result().degraded:
            self._cache[key] = done.result()
