"""Stores on this machine, asked in process: the engine without the wire. Needs `tagstore[server]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tagstore.client.backend import Backend
from tagstore.client.forks import PerProcess
from tagstore.client.queries import QueryBatch
from tagstore.errors import MissingExtra
from tagstore.types import Retrieval, StoreInfo, TagInfo

if TYPE_CHECKING:
    from tagstore.retrieval.catalog import Catalog

_TAGS_PER_PAGE = 1000


class LocalBackend(Backend):
    """Answers of a directory. Each process opens it: neither LMDB nor an encoder's threads survive a fork."""

    def __init__(self, root: str, store: str) -> None:
        self._root, self._store = root, store
        self._catalog: PerProcess[Catalog] = PerProcess(self._open)

    def _open(self) -> Catalog:
        try:
            from tagstore.retrieval.catalog import Catalog
        except ModuleNotFoundError as error:
            raise MissingExtra(
                f"file:// needs {error.name}: pip install 'tagstore[server]', or use grpc://"
            ) from error
        return Catalog(self._root)

    def retrieve(self, batch: QueryBatch) -> list[Retrieval]:
        catalog = self._catalog.get()
        return catalog.retrieve(
            catalog.engine(self._store, batch.version),
            images=batch.images,
            vectors=batch.vectors,
            texts=batch.captions,
            fingerprint=batch.fingerprint,
            search=batch.search,
            identities=batch.identities,
        )

    def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        engine = self._catalog.get().engine(self._store, version)
        return engine.tags(tag_ids, embeddings=embeddings), engine.version.number

    def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        engine = self._catalog.get().engine(self._store, version)
        tags = engine.tags(first=first, limit=_TAGS_PER_PAGE, embeddings=embeddings)
        following = tags[-1].tag_id + 1 if len(tags) == _TAGS_PER_PAGE else 0
        return tags, following, engine.version.number

    def info(self, version: int) -> StoreInfo:
        return self._catalog.get().engine(self._store, version).info()

    def close(self) -> None:
        self._catalog.take()
