"""What needn't be asked twice: embeddings of tags in the memory of a process, answers on the disk of a node."""

from __future__ import annotations

import hashlib
import logging
import random
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from tagstore.client.forks import Lock, Opened
from tagstore.client.queries import Ask
from tagstore.errors import MissingExtra, WriteFailed
from tagstore.types import Retrieval, TagInfo

log = logging.getLogger(__name__)

_SEAL = 8


class EmbeddingCache:
    """Tags with their text embeddings, of one version, the least recently used dropped first. Safe for threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = Lock()
        self._version = 0
        self._tags: OrderedDict[int, TagInfo] = OrderedDict()

    def get(self, tag_ids: Iterable[int], version: int) -> dict[int, TagInfo]:
        """Those of the tags that are known of a version, or of the newest one that was seen for 0."""
        with self._lock:
            if version not in (0, self._version):
                return {}
            found = {i: self._tags[i] for i in tag_ids if i in self._tags}
            for i in found:
                self._tags.move_to_end(i)
            return found

    def put(self, tags: Iterable[TagInfo], version: int) -> None:
        with self._lock:
            self._see(version)
            if version != self._version:
                return
            for tag in tags:
                if tag.embedding is not None:
                    tag.embedding.flags.writeable = False  # shared by all who ask
                    self._tags[tag.tag_id] = tag
                    self._tags.move_to_end(tag.tag_id)
            while len(self._tags) > self._limit:
                self._tags.popitem(last=False)

    def see(self, version: int) -> None:
        """A version has answered: what is known of older ones is forgotten, since counts and embeddings may differ."""
        with self._lock:
            self._see(version)

    def _see(self, version: int) -> None:
        if version > self._version:
            self._version = version
            self._tags.clear()


class AnswerCache:
    """Answers to queries on a node's disk, shared by its processes. Losing it costs time only, so nothing waits for the disk.

    LMDB: sha256 over store, version, fingerprint, options, identity and the image, vector or caption -> 8 bytes of sha256 over key and
    value, and a `RetrieveResponse` of one retrieval. A damaged entry is a miss. When it is full a tenth is dropped, at random.

    Raises `MissingExtra` without lmdb.
    """

    def __init__(self, directory: str, size: int, place: str) -> None:
        try:
            import lmdb  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingExtra(
                "a cache of answers needs lmdb: pip install lmdb, or leave cache= out"
            ) from error
        self._directory, self._size, self._place = directory, size, place
        self._env: Opened[Any] = Opened(self._open)

    def key(self, ask: Ask, row: int) -> bytes:
        """What decides the answer to one query of a request."""
        query = ask.query(row) + (b"" if ask.vectors is None else ask.vectors.dtype.str.encode())
        search = astuple(ask.search)
        guarded = ask.search.exclude.key or ask.search.exclude.sha256 or ask.search.exclude.hash_distance >= 0
        own = astuple(ask.identities[row]) if guarded and ask.identities else ()
        parts = repr((self._place, ask.version, ask.fingerprint, _plain(search), own, ask.kind)).encode()
        return hashlib.sha256(hashlib.sha256(parts).digest() + hashlib.sha256(query).digest()).digest()

    def get(self, keys: Sequence[bytes]) -> list[Retrieval | None]:
        """Of each key its answer, or None."""
        from tagstore.wire import convert
        from tagstore_proto.v1 import tagstore_pb2 as pb

        with self._env.get().begin(buffers=False) as txn:
            values = [txn.get(key) for key in keys]
        return [
            convert.retrievals_from_proto(pb.RetrieveResponse.FromString(value[_SEAL:]))[0]
            if value is not None and value[:_SEAL] == _seal(key, value[_SEAL:])
            else None
            for key, value in zip(keys, values, strict=True)
        ]

    def put(self, keys: Sequence[bytes], answers: Sequence[Retrieval]) -> None:
        from tagstore.wire import convert
        from tagstore_proto.v1 import tagstore_pb2 as pb

        rows = []
        for key, a in zip(keys, answers, strict=True):
            response = pb.RetrieveResponse(
                store=a.store,
                version=a.version,
                fingerprint=a.fingerprint,
                retrievals=[convert.retrieval_to_proto(a)],
            )
            value = response.SerializeToString()
            rows.append((key, _seal(key, value) + value))
        self._write(rows)

    def close(self) -> None:
        if (env := self._env.take()) is not None:
            env.close()

    def _open(self) -> Any:
        import lmdb

        Path(self._directory).mkdir(parents=True, exist_ok=True)
        try:
            # sync=False: after a crash of the machine the file may be bad, which the seals notice.
            # LMDB copies what it changes: dropping answers from a full file needs as much room again
            return lmdb.open(
                self._directory, map_size=2 * self._size, max_readers=2048, sync=False, metasync=False
            )
        except lmdb.Error as error:
            raise WriteFailed(
                f"the cache at {self._directory} cannot be opened ({error}): delete it, it holds nothing of its own"
            ) from error

    def _write(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        import lmdb

        env = self._env.get()
        try:
            with env.begin(write=True) as txn:
                stat = txn.stat()
                if (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]) * stat[
                    "psize"
                ] > self._size:
                    self._drop_some(txn.cursor(), 1 + stat["entries"] // 10)
                for key, value in rows:
                    txn.put(key, value)
        except lmdb.MapFullError:
            log.info(
                "the cache at %s is full of what others still read: %d answers were not kept",
                self._directory,
                len(rows),
            )

    @staticmethod
    def _drop_some(cursor: Any, count: int) -> None:
        """Answers from a random place on: keys are hashes, so that is as good as random ones, and touches fewer pages."""
        if not cursor.set_range(random.randbytes(32)):
            cursor.first()
        for _ in range(count):
            if not cursor.delete():
                return


def _plain(value: Any) -> Any:
    """Mappings in a fixed order."""
    if isinstance(value, dict):
        return sorted(value.items())
    return tuple(_plain(v) for v in value) if isinstance(value, tuple | list) else value


def _seal(key: bytes, value: bytes) -> bytes:
    return hashlib.sha256(key + value).digest()[:_SEAL]
