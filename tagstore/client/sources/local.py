"""Stores on this machine, in process: the engine without the wire. Needs `tagstore[server]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tagstore.client.forks import Opened
from tagstore.client.queries import Ask
from tagstore.errors import MissingExtra
from tagstore.types import Retrieval, StoreInfo, TagInfo

if TYPE_CHECKING:
    from tagstore.retrieval.catalog import Catalog

_PAGE = 1000


class LocalBackend:
    """Answers of a directory. Each process opens its own: neither LMDB nor an encoder's threads survive a fork."""

    def __init__(self, root: str, store: str) -> None:
        self._root, self._store = root, store
        self._catalog: Opened[Catalog] = Opened(self._open)

    def _open(self) -> Catalog:
        try:
            from tagstore.retrieval.catalog import Catalog
        except ModuleNotFoundError as error:
            raise MissingExtra(
                f"file:// needs {error.name}: pip install 'tagstore[server]', or use grpc://"
            ) from error
        return Catalog(self._root)

    def retrieve(self, ask: Ask) -> list[Retrieval]:
        catalog = self._catalog.get()
        return catalog.retrieve(
            catalog.engine(self._store, ask.version),
            images=ask.images,
            vectors=ask.vectors,
            texts=ask.captions,
            fingerprint=ask.fingerprint,
            search=ask.search,
            identities=ask.identities,
        )

    def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        engine = self._catalog.get().engine(self._store, version)
        return engine.tags(tag_ids, embeddings=embeddings), engine.version.number

    def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        engine = self._catalog.get().engine(self._store, version)
        tags = engine.tags(first=first, limit=_PAGE, embeddings=embeddings)
        return tags, tags[-1].tag_id + 1 if len(tags) == _PAGE else 0, engine.version.number

    def info(self, version: int) -> StoreInfo:
        return self._catalog.get().engine(self._store, version).info()

    def health(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        self._catalog.take()
