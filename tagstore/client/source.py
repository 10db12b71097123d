"""The blocking tag source, and what it shares with the asyncio one.

The shared part is written as generators: each yields calls of the backend, as a method's name and arguments,
and is sent the answers. So batches, caches, degraded answers and counts are written once; a source only runs
the calls in its own way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self, Unpack

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from tagstore.client.answer_cache import AnswerCache
from tagstore.client.forks import ForkSafe
from tagstore.client.options import Options, SearchOptions
from tagstore.client.queries import Image, QueryBatch, query_batches
from tagstore.client.stats import Counters, Stats
from tagstore.client.tag_source import Pin
from tagstore.client.urls import Location
from tagstore.errors import Damaged, InvalidInput, TagstoreError, Unavailable
from tagstore.types import Fingerprint, Identity, Retrieval, StoreInfo, TagInfo

log = logging.getLogger(__name__)

BackendCalls = Generator[tuple[str, tuple[Any, ...]], Any, Any]
_TAGS_PER_REQUEST = 1000
_WARN_INTERVAL = 60.0
"""Seconds between two warnings about degraded answers."""


class BaseSource(ForkSafe):
    """What a source does, whether it blocks or is awaited."""

    def __init__(
        self,
        url: str,
        location: Location,
        options: Options,
        counters: Counters,
        backend: Any,
        reopen: Callable[[str, Location, Options, str], BaseSource],
    ) -> None:
        """
        Args:
            reopen: opens this source in another process; gets URL, location, options, path of the counters.
        """
        super().__init__()
        self.url, self.location, self.options = url, location, options
        self.counters, self.backend, self._reopen = counters, backend, reopen
        self._version = location.version
        """The version to ask for; 0 for the current one."""
        self._newest = 0
        """The newest version that has answered."""
        self._embedded: LRUCache[tuple[int, int], TagInfo] = LRUCache(options.embedding_cache)
        """Tags with their embeddings, by version and id."""
        place = f"{location.scheme}://{location.place}/{location.store}"
        self._cache = AnswerCache(options.cache, options.cache_bytes, place) if options.cache else None
        self._last_error = ""
        self._next_warning = 0.0
        self._held_warnings = 0

    def stats(self) -> Stats:
        """Sum up what all processes that share this source have done."""
        return Stats(**self.counters.read(), addresses=self.backend.health(), last_error=self._last_error)

    def __repr__(self) -> str:
        version = f" at version {self._version}" if self._version else ""
        return f"<{type(self).__name__} {self.url}{version}>"

    def __reduce__(self) -> tuple[Any, ...]:
        location = self.location._replace(version=self._version)
        return self._reopen, (self.url, location, self.options, self.counters.path)

    def _retrieve_calls(
        self,
        images: Sequence[Image],
        vectors: NDArray[np.floating] | None,
        captions: Sequence[str],
        fingerprint: Fingerprint | str,
        keys: Sequence[str],
        identities: Sequence[Identity],
        call_options: SearchOptions,
    ) -> BackendCalls:
        options = self.options.merged(call_options, of_call=True) if call_options else self.options
        answers: list[Retrieval] = []
        version = self._version
        for batch in query_batches(images, vectors, captions, fingerprint, keys, identities, options):
            if version:
                batch = replace(batch, version=version)
            retrievals: list[Retrieval] = yield from self._answer_calls(batch)
            # later requests ask for the version that answered the first
            version = version or next((r.version for r in retrievals), 0)
            answers += retrievals
        return answers

    def _answer_calls(self, batch: QueryBatch) -> BackendCalls:
        """Answer a batch; without tags, where no server does and that is allowed."""
        try:
            answers: list[Retrieval]
            if self._cache is None:
                answers = yield "retrieve", (batch,)
            else:
                answers = yield from self._cached_calls(self._cache, batch)
            if batch.options.preload and any(answers):
                tag_ids = list({t.tag_id for a in answers for t in a})
                yield from self._tags_calls(tag_ids, True, answers[0].version)
        except TagstoreError as error:
            if batch.options.on_failure == "raise" or not _is_outage(error):
                raise
            self.counters.add(queries=len(batch), degraded=len(batch))
            self._last_error = str(error)
            self._warn(error)
            return [Retrieval(self.location.store, 0, "", (), (), degraded=True)] * len(batch)
        excluded = [a.excluded for a in answers]
        self.counters.add(queries=len(batch), excluded=sum(excluded), guarded=sum(map(bool, excluded)))
        if answers:
            self._newest = max(self._newest, answers[0].version)
        return answers

    def _cached_calls(self, cache: AnswerCache, batch: QueryBatch) -> BackendCalls:
        if not batch.version:
            raise InvalidInput(
                "a cache of answers needs to know the version: "
                f"call pin(), or write {self.url.partition('?')[0]}@VERSION"
            )
        keys = [cache.key(batch, row) for row in range(len(batch))]
        answers = cache.get(keys, batch.version)
        missing = [row for row, answer in enumerate(answers) if answer is None]
        self.counters.add(cache_hits=len(batch) - len(missing), cache_misses=len(missing))
        if missing:
            retrievals: list[Retrieval] = yield "retrieve", (batch.select(missing),)
            cache.put([keys[row] for row in missing], retrievals)
            for row, retrieval in zip(missing, retrievals, strict=True):
                answers[row] = retrieval
        return answers

    def _tags_calls(self, tag_ids: Sequence[int], embeddings: bool, version: int) -> BackendCalls:
        tags = self._remembered(tag_ids, version or self._newest) if embeddings else {}
        missing = list(dict.fromkeys(i for i in tag_ids if i not in tags))
        if embeddings:
            self.counters.add(embedding_hits=len(tag_ids) - len(missing), embedding_misses=len(missing))
        for start in range(0, len(missing), _TAGS_PER_REQUEST):
            page, version = yield "tags", (missing[start : start + _TAGS_PER_REQUEST], version, embeddings)
            tags |= {tag.tag_id: tag for tag in page}
            if embeddings:
                self._remember(page, version)
        return [tags[i] for i in tag_ids]

    def _remembered(self, tag_ids: Sequence[int], version: int) -> dict[int, TagInfo]:
        with self.lock:
            return {i: self._embedded[version, i] for i in tag_ids if (version, i) in self._embedded}

    def _remember(self, tags: Sequence[TagInfo], version: int) -> None:
        with self.lock:
            self._newest = max(self._newest, version)
            for tag in tags:
                if tag.embedding is not None:
                    tag.embedding.flags.writeable = False  # every caller gets the same array
                    if self._embedded.maxsize:
                        self._embedded[version, tag.tag_id] = tag

    def _embedding_calls(self, answer: Retrieval) -> BackendCalls:
        tags: list[TagInfo] = yield from self._tags_calls([t.tag_id for t in answer], True, answer.version)
        rows = [tag.embedding for tag in tags if tag.embedding is not None]
        if len(rows) < len(tags):
            raise InvalidInput(
                f"the tags of store '{answer.store}' have no text embeddings: "
                "it was made without; embed its tags"
            )
        return np.stack(rows) if rows else np.zeros((0, 0), np.float32)

    def _pin_calls(self, version: int) -> BackendCalls:
        info: StoreInfo = yield "info", (version or self._version,)
        self._version = info.version
        return Pin(info.store, info.version, info.fingerprint)

    def _close_cache(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def _warn(self, error: TagstoreError) -> None:
        """Log a degraded answer, at most once in `_WARN_INTERVAL`."""
        with self.lock:
            now = time.monotonic()
            if now < self._next_warning:
                self._held_warnings += 1
                return
            held, self._held_warnings, self._next_warning = self._held_warnings, 0, now + _WARN_INTERVAL
        log.warning(
            "%s gives no tags: %s%s", self.url, error, f" (and {held} times before this)" if held else ""
        )


class Source(BaseSource):
    """A tag source that blocks. See `TagSource`."""

    def retrieve(
        self,
        images: Sequence[Image] = (),
        *,
        vectors: NDArray[np.floating] | None = None,
        captions: Sequence[str] = (),
        fingerprint: Fingerprint | str = "",
        keys: Sequence[str] = (),
        identities: Sequence[Identity] = (),
        **options: Unpack[SearchOptions],
    ) -> list[Retrieval]:
        answers: list[Retrieval] = self._run(
            self._retrieve_calls(images, vectors, captions, fingerprint, keys, identities, options)
        )
        return answers

    def tags(self, tag_ids: Sequence[int], *, embeddings: bool = False) -> list[TagInfo]:
        tags: list[TagInfo] = self._run(self._tags_calls(tag_ids, embeddings, self._version))
        return tags

    def embeddings(self, answer: Retrieval) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = self._run(self._embedding_calls(answer))
        return rows

    def vocabulary(self, *, embeddings: bool = False) -> Iterator[TagInfo]:
        first, version = 0, self._version
        while True:
            tags, first, version = self.backend.page(first, version, embeddings)
            yield from tags
            if not first:
                return

    def info(self) -> StoreInfo:
        info: StoreInfo = self.backend.info(self._version)
        return info

    def pin(self, version: int = 0) -> Pin:
        pin: Pin = self._run(self._pin_calls(version))
        return pin

    def close(self) -> None:
        self.backend.close()
        self._close_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, calls: BackendCalls) -> Any:
        try:
            method, arguments = next(calls)
            while True:
                try:
                    result = getattr(self.backend, method)(*arguments)
                except TagstoreError as error:
                    method, arguments = calls.throw(error)
                else:
                    method, arguments = calls.send(result)
        except StopIteration as end:
            return end.value


def _is_outage(error: TagstoreError) -> bool:
    """Say whether the server failed. A caller's mistake is raised in any mode: it would fail again."""
    return isinstance(error, Unavailable | Damaged) or type(error) is TagstoreError
