"""Recorded maps: a store's answers to the samples and options that were recorded, and to no others."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

from tagstore.client.backend import Backend
from tagstore.client.forks import PerProcess
from tagstore.client.mapfile import Map, Row, recorded_options
from tagstore.client.queries import QueryBatch
from tagstore.errors import FingerprintMismatch, InvalidInput, NotFound
from tagstore.types import Retrieval, StoreInfo, TagInfo


class ReplayBackend(Backend):
    """Answers of a map. Each thread of each process opens its own connection."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._threads: PerProcess[threading.local] = PerProcess(threading.local)

    def retrieve(self, batch: QueryBatch) -> list[Retrieval]:
        if batch.captions:
            raise InvalidInput(
                f"map {self._path} holds answers to the images of a data set, none to captions: ask the store"
            )
        map_ = self._map()
        self._check(map_, batch)
        keys = [i.key for i in batch.identities] or [""] * len(batch)
        digests = [_image_digest(batch, row) for row in range(len(batch))]
        queries = list(zip(keys, digests, strict=True))
        keyed = map_.by_key([key for key in keys if key])
        hashed = map_.by_sha256([digest for key, digest in queries if digest and not key])
        rows = [
            self._sample_of_key(keyed.get(key), key, digest)
            if key
            else self._sample_of_image(hashed.get(digest, []), digest, number)
            for number, (key, digest) in enumerate(queries)
        ]
        return [map_.answer(row) for row in rows]

    def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        map_ = self._map()
        tags = {tag.tag_id: tag for tag in map_.tags(tag_ids, embeddings=embeddings)} if tag_ids else {}
        missing = [i for i in tag_ids if i not in tags]
        if missing:
            raise NotFound(f"no tag {missing[0]} in map {self._path}: it holds those of its answers")
        return [tags[i] for i in tag_ids], int(map_.meta["version"])

    def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        map_ = self._map()
        return list(map_.tags(embeddings=embeddings)), 0, int(map_.meta["version"])

    def info(self, version: int) -> StoreInfo:
        map_ = self._map()
        self._check_version(map_, version)
        return map_.info

    def close(self) -> None:
        self._threads.take()

    def _map(self) -> Map:
        local = self._threads.get()
        if not hasattr(local, "map"):
            local.map = Map(self._path)
        map_: Map = local.map
        return map_

    def _check(self, map_: Map, batch: QueryBatch) -> None:
        options, recorded = recorded_options(batch.options), map_.options
        for name, value in options.items():
            # maps that were recorded before an option came were recorded without it
            before = recorded.get(name, False)
            if value != before:
                raise InvalidInput(
                    f"map {self._path} was recorded with {name}={before!r}, "
                    f"and {value!r} is asked for: leave it out, or record another"
                )
        self._check_version(map_, batch.version)
        if batch.fingerprint and batch.fingerprint != map_.meta["fingerprint"]:
            raise FingerprintMismatch.between(map_.meta["store"], map_.info.fingerprint, batch.fingerprint)
        if batch.vectors is not None and not batch.fingerprint:
            raise InvalidInput("a query by vector must say which encoder computed it: pass its fingerprint")

    def _check_version(self, map_: Map, version: int) -> None:
        if version not in (0, int(map_.meta["version"])):
            raise NotFound(f"map {self._path} holds answers of version {map_.meta['version']}, not {version}")

    def _sample_of_key(self, row: Row | None, key: str, digest: bytes) -> Row:
        if row is None:
            raise NotFound(f"no sample '{key}' in map {self._path}: record the data set that it belongs to")
        if digest and row.sha256 and row.sha256 != digest:
            raise NotFound(
                f"sample '{key}' of map {self._path} was recorded with another image: record it again"
            )
        return self._answered(row)

    def _sample_of_image(self, rows: list[Row], digest: bytes, number: int) -> Row:
        if not digest:
            raise InvalidInput(
                f"query {number} has no key, and map {self._path} knows samples by key or by image: "
                "pass keys="
            )
        if not rows:
            raise NotFound(
                f"the image of query {number} (sha256 {digest.hex()[:16]}...) "
                f"is in no sample of map {self._path}: record it"
            )
        if len({row.answer for row in rows}) > 1:
            keys = ", ".join(row.key for row in rows[:3])
            raise InvalidInput(
                f"the image of query {number} is in samples {keys} with different answers: pass keys="
            )
        return self._answered(rows[0])

    def _answered(self, row: Row) -> Row:
        if row.refused is not None:
            raise InvalidInput(
                f"sample '{row.key}' was refused when map {self._path} was recorded: {row.refused}"
            )
        return row


def _image_digest(batch: QueryBatch, row: int) -> bytes:
    """Return the sha256 of a query's image, or nothing if it is not known."""
    known = batch.identities[row].sha256 if batch.identities else b""
    if known or batch.vectors is not None:
        return known
    return hashlib.sha256(batch.images[row]).digest()
