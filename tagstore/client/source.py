"""The blocking face of a tag source, and the flows that it shares with the asyncio one.

A flow is a generator: it yields what to ask of a backend (`retrieve`, `tags`, `page`, `info` with arguments) and is sent the answer, so
that batches, caches, the leak guard, degraded answers and counting are written once, and each face only drives.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from tagstore.client.answer_cache import AnswerCache, EmbeddingCache
from tagstore.client.forks import Lock
from tagstore.client.options import Options, SearchOptions
from tagstore.client.queries import Ask, Image, asks
from tagstore.client.stats import Counters, Stats
from tagstore.client.urls import Location
from tagstore.errors import Damaged, InvalidInput, TagstoreError, Unavailable
from tagstore.types import Fingerprint, Identity, Retrieval, StoreInfo, TagInfo

log = logging.getLogger(__name__)

Flow = Generator[tuple[str, tuple[Any, ...]], Any, Any]
_TAGS_AT_ONCE = 1000
_LOG_EVERY = 60.0


class Backend(Protocol):
    """What answers: a server, a directory, a map. Opened at first use in each process."""

    def retrieve(self, ask: Ask) -> list[Retrieval]: ...

    def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        """The tags, and the version that they are of."""
        ...

    def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        """Some tags from an id on, the id to go on with (0 at the end), the version."""
        ...

    def info(self, version: int) -> StoreInfo: ...

    def health(self) -> dict[str, str]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Pin:
    """Which version of which store answers: what a checkpoint has to remember."""

    store: str
    version: int
    fingerprint: Fingerprint

    def __str__(self) -> str:
        return f"{self.store}@{self.version}"


def require(answers: Iterable[Retrieval], store: str = "", version: int = 0) -> None:
    """Refuse answers of another store or version than the ones that a checkpoint names; empty and 0 allow any.

    Answers without tags and those of random:// pass. Raises `InvalidInput`.
    """
    for answer in answers:
        if not answer.tags or answer.store == "random":  # random tags are a control experiment
            continue
        if (store and answer.store != store) or (version and answer.version != version):
            wanted = f"{store or answer.store}@{version}" if version else store
            raise InvalidInput(
                f"{wanted} is required, and {answer.store}@{answer.version} answered: end the URL with /{wanted}"
            )


class Flows:
    """What a source does, whichever way it waits."""

    def __init__(
        self, url: str, location: Location, options: Options, counters: Counters, backend: Any
    ) -> None:
        self.url, self.location, self.options, self.counters, self.backend = (
            url,
            location,
            options,
            counters,
            backend,
        )
        self._version = location.version
        self._embeddings = EmbeddingCache(options.embedding_cache)
        place = f"{location.scheme}://{location.place}/{location.store}"
        self._cache = AnswerCache(options.cache, options.cache_bytes, place) if options.cache else None
        self._log = _Seldom()
        self._last_error = ""

    def stats(self) -> Stats:
        """What was done so far, by all processes that share this source."""
        return Stats(**self.counters.read(), addresses=self.backend.health(), last_error=self._last_error)

    def __repr__(self) -> str:
        version = f" at version {self._version}" if self._version else ""
        return f"<{type(self).__name__} {self.url}{version}>"

    def __getstate__(self) -> dict[str, Any]:
        """The configuration: what a worker needs to connect for itself."""
        return {
            "url": self.url,
            "location": self.location._replace(version=self._version),
            "options": self.options,
            "counters": self.counters.path,
        }

    def _retrieving(
        self,
        images: Sequence[Image],
        vectors: NDArray[np.floating] | None,
        captions: Sequence[str],
        fingerprint: Fingerprint | str,
        keys: Sequence[str],
        identities: Sequence[Identity],
        given: SearchOptions,
    ) -> Flow:
        options = self.options.merged(given, call=True)
        answers: list[Retrieval] = []
        version = self._version
        for ask in asks(images, vectors, captions, fingerprint, keys, identities, options):
            some: list[Retrieval] = yield from self._answering(replace(ask, version=version))
            # later requests come from the version that answered the first
            version = version or next((a.version for a in some), 0)
            answers += some
        return answers

    def _answering(self, ask: Ask) -> Flow:
        try:
            answers: list[Retrieval] = yield from self._cached(ask)
            if ask.options.preload and any(answers):
                version = answers[0].version
                yield from self._tags(list({t.tag_id for a in answers for t in a}), True, version)
        except TagstoreError as error:
            if ask.options.on_failure == "raise" or not _is_failure(error):
                raise
            self.counters.add(queries=len(ask), degraded=len(ask))
            self._last_error = str(error)
            self._log.warning("%s gives no tags: %s", self.url, error)
            return [Retrieval(self.location.store, 0, "", (), (), degraded=True)] * len(ask)
        excluded = [a.excluded for a in answers]
        self.counters.add(queries=len(ask), excluded=sum(excluded), guarded=sum(map(bool, excluded)))
        if answers:
            self._embeddings.see(answers[0].version)
        return answers

    def _cached(self, ask: Ask) -> Flow:
        if self._cache is None:
            return (yield "retrieve", (ask,))
        if not ask.version:
            raise InvalidInput(
                f"a cache of answers needs to know the version: call pin(), or write {self.url.partition('?')[0]}@VERSION"
            )
        keys = [self._cache.key(ask, row) for row in range(len(ask))]
        answers = self._cache.get(keys)
        missing = [row for row, answer in enumerate(answers) if answer is None]
        self.counters.add(cache_hits=len(ask) - len(missing), cache_misses=len(missing))
        if missing:
            fresh: list[Retrieval] = yield (
                "retrieve",
                (ask.only(missing) if len(missing) < len(ask) else ask,),
            )
            self._cache.put([keys[row] for row in missing], fresh)
            for row, answer in zip(missing, fresh, strict=True):
                answers[row] = answer
        return answers

    def _tags(self, tag_ids: Sequence[int], embeddings: bool, version: int) -> Flow:
        known = self._embeddings.get(tag_ids, version) if embeddings else {}
        missing = list(dict.fromkeys(i for i in tag_ids if i not in known))
        if embeddings:
            self.counters.add(embedding_hits=len(tag_ids) - len(missing), embedding_misses=len(missing))
        for start in range(0, len(missing), _TAGS_AT_ONCE):
            found, version = yield "tags", (missing[start : start + _TAGS_AT_ONCE], version, embeddings)
            known |= {tag.tag_id: tag for tag in found}
            if embeddings:
                self._embeddings.put(found, version)
        return [known[i] for i in tag_ids]

    def _embeddings_of(self, answer: Retrieval) -> Flow:
        tags: list[TagInfo] = yield from self._tags([t.tag_id for t in answer.tags], True, answer.version)
        rows = [tag.embedding for tag in tags if tag.embedding is not None]
        if len(rows) < len(tags):
            raise InvalidInput(
                f"the tags of store '{answer.store}' have no text embeddings: it was made without; embed its tags"
            )
        return np.stack(rows) if rows else np.zeros((0, 0), np.float32)

    def _close_cache(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def _pinning(self, version: int) -> Flow:
        info: StoreInfo = yield "info", (version or self._version,)
        self._version = info.version
        return Pin(info.store, info.version, info.fingerprint)


class Source(Flows):
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
            self._retrieving(images, vectors, captions, fingerprint, keys, identities, options)
        )
        return answers

    def tags(self, tag_ids: Sequence[int], *, embeddings: bool = False) -> list[TagInfo]:
        found: list[TagInfo] = self._run(self._tags(tag_ids, embeddings, self._version))
        return found

    def embeddings(self, answer: Retrieval) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = self._run(self._embeddings_of(answer))
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
        pin: Pin = self._run(self._pinning(version))
        return pin

    def close(self) -> None:
        self.backend.close()
        self._close_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        from tagstore.client.connecting import reconnect

        self.__dict__.update(reconnect(**state).__dict__)

    def _run(self, flow: Flow) -> Any:
        try:
            name, arguments = next(flow)
            while True:
                try:
                    result = getattr(self.backend, name)(*arguments)
                except TagstoreError as error:
                    name, arguments = flow.throw(error)
                else:
                    name, arguments = flow.send(result)
        except StopIteration as end:
            return end.value


def _is_failure(error: TagstoreError) -> bool:
    """Whether it is the server's doing; what the caller did wrong is raised in any mode, for it would be wrong the next time as well."""
    return isinstance(error, Unavailable | Damaged) or type(error) is TagstoreError


class _Seldom:
    """A log that speaks once a minute, and then says how often it would have."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._next = 0.0
        self._held = 0

    def warning(self, message: str, *arguments: object) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                self._held += 1
                return
            held, self._held, self._next = self._held, 0, now + _LOG_EVERY
        log.warning(message + (f" (and {held} times before this)" if held else ""), *arguments)
