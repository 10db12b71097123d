"""Answers of a map: the same as when it was recorded, for the samples and the options that it was recorded with, and no others."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

from tagstore.client.forks import Opened
from tagstore.client.mapfile import Map, Row, recorded_options
from tagstore.client.queries import Ask
from tagstore.errors import FingerprintMismatch, InvalidInput, NotFound
from tagstore.types import Identity, Retrieval, StoreInfo, TagInfo


class ReplayBackend:
    """Answers of a map. Each thread of each process opens its own connection."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._threads: Opened[threading.local] = Opened(threading.local)

    def retrieve(self, ask: Ask) -> list[Retrieval]:
        if ask.captions:
            raise InvalidInput(
                f"map {self._path} holds answers to the images of a data set, none to captions: ask the store"
            )
        map_ = self._map()
        self._check(map_, ask)
        keys = [i.key for i in ask.identities] or [""] * len(ask)
        digests = [self._digest(ask, row) for row in range(len(ask))]
        keyed = map_.by_key([key for key in keys if key])
        hashed = map_.by_sha256(
            [digest for key, digest in zip(keys, digests, strict=True) if not key and digest]
        )
        rows = [
            self._keyed(keyed.get(key), key, digest)
            if key
            else self._hashed(hashed.get(digest, []), digest, number)
            for number, (key, digest) in enumerate(zip(keys, digests, strict=True))
        ]
        return [map_.answer(row) for row in rows]

    def tags(self, tag_ids: Sequence[int], version: int, embeddings: bool) -> tuple[list[TagInfo], int]:
        map_ = self._map()
        known = {tag.tag_id: tag for tag in map_.tags(tag_ids, embeddings=embeddings)} if tag_ids else {}
        missing = [i for i in tag_ids if i not in known]
        if missing:
            raise NotFound(f"no tag {missing[0]} in map {self._path}: it holds those of its answers")
        return [known[i] for i in tag_ids], int(map_.meta["version"])

    def page(self, first: int, version: int, embeddings: bool) -> tuple[list[TagInfo], int, int]:
        map_ = self._map()
        return list(map_.tags(embeddings=embeddings)), 0, int(map_.meta["version"])

    def info(self, version: int) -> StoreInfo:
        map_ = self._map()
        self._check_version(map_, version)
        return map_.info

    def health(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        self._threads.take()

    def _map(self) -> Map:
        local = self._threads.get()
        if not hasattr(local, "map"):
            local.map = Map(self._path)
        map_: Map = local.map
        return map_

    def _check(self, map_: Map, ask: Ask) -> None:
        wanted, recorded = recorded_options(ask.options), map_.options
        different = [name for name in wanted if wanted[name] != recorded[name]]
        if different:
            name = different[0]
            raise InvalidInput(
                f"map {self._path} was recorded with {name}={recorded[name]!r}, and {wanted[name]!r} is asked for: "
                "leave it out, or record another"
            )
        self._check_version(map_, ask.version)
        if ask.fingerprint and ask.fingerprint != map_.meta["fingerprint"]:
            raise FingerprintMismatch.between(map_.meta["store"], map_.info.fingerprint, ask.fingerprint)
        if ask.vectors is not None and not ask.fingerprint:
            raise InvalidInput("a query by vector must say which encoder made it: pass its fingerprint")

    def _check_version(self, map_: Map, version: int) -> None:
        if version not in (0, int(map_.meta["version"])):
            raise NotFound(f"map {self._path} holds answers of version {map_.meta['version']}, not {version}")

    @staticmethod
    def _digest(ask: Ask, row: int) -> bytes:
        own = ask.identities[row] if ask.identities else Identity()
        if own.sha256:
            return own.sha256
        return b"" if ask.vectors is not None else hashlib.sha256(ask.images[row]).digest()

    def _keyed(self, row: Row | None, key: str, digest: bytes) -> Row:
        if row is None:
            raise NotFound(f"no sample '{key}' in map {self._path}: record the data set that it belongs to")
        if digest and row.sha256 and row.sha256 != digest:
            raise NotFound(
                f"sample '{key}' of map {self._path} was recorded with another image: record it again"
            )
        return self._answered(row)

    def _hashed(self, rows: list[Row], digest: bytes, number: int) -> Row:
        if not digest:
            raise InvalidInput(
                f"query {number} has no key, and map {self._path} knows samples by key or by image: pass keys="
            )
        if not rows:
            raise NotFound(
                f"the image of query {number} (sha256 {digest.hex()[:16]}...) is in no sample of map {self._path}: record it"
            )
        if len({row.answer for row in rows}) > 1:
            listed = ", ".join(row.key for row in rows[:3])
            raise InvalidInput(
                f"the image of query {number} is in samples {listed} with different answers: pass keys="
            )
        return self._answered(rows[0])

    def _answered(self, row: Row) -> Row:
        if row.refused is not None:
            raise InvalidInput(
                f"sample '{row.key}' was refused when map {self._path} was recorded: {row.refused}"
            )
        return row
