"""Keep answers on a node's disk, so that its processes need not ask for them twice."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from tagstore.client.forks import PerProcess
from tagstore.client.queries import QueryBatch
from tagstore.errors import BadAnswer, MissingExtra, WriteFailed
from tagstore.types import Retrieval

log = logging.getLogger(__name__)

_SEAL_BYTES = 8


class AnswerCache:
    """Answers in LMDB, shared by the processes of a machine. Losing it costs time only, so nothing waits for
    the disk.

    A key is the sha256 over store, version, fingerprint, options, identity and the image, vector or caption.
    A value is 8 bytes of sha256 over key and message, then the message: a `RetrieveResponse` of one
    retrieval. A damaged value is a miss. When the cache is full, a tenth of the answers is dropped at random.
    """

    def __init__(self, directory: str, size: int, place: str) -> None:
        """
        Args:
            size: bytes that the answers may take.
            place: the store's URL without options and version.

        Raises:
            MissingExtra: lmdb is not installed.
        """
        try:
            import lmdb  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingExtra(
                "a cache of answers needs lmdb: pip install lmdb, or leave cache= out"
            ) from error
        self._directory, self._size, self._place = directory, size, place
        self._env: PerProcess[Any] = PerProcess(self._open)

    def key(self, batch: QueryBatch, row: int) -> bytes:
        """Return a digest of all that decides the answer to one query."""
        query = batch.query_bytes(row)
        if batch.vectors is not None:
            query += batch.vectors.dtype.str.encode()
        exclude = batch.search.exclude
        guarded = exclude.key or exclude.sha256 or exclude.hash_distance >= 0
        identity = astuple(batch.identities[row]) if guarded and batch.identities else ()
        search = _in_fixed_order(astuple(batch.search))
        context = repr((self._place, batch.version, batch.fingerprint, search, identity, batch.kind)).encode()
        return hashlib.sha256(hashlib.sha256(context).digest() + hashlib.sha256(query).digest()).digest()

    def get(self, keys: Sequence[bytes], version: int) -> list[Retrieval | None]:
        """Return the answer of each key, which must be of this version, or None."""
        with self._env.get().begin(buffers=False) as txn:
            values = [txn.get(key) for key in keys]
        return [
            _read(value[_SEAL_BYTES:], version)
            if value is not None and value[:_SEAL_BYTES] == _seal(key, value[_SEAL_BYTES:])
            else None
            for key, value in zip(keys, values, strict=True)
        ]

    def put(self, keys: Sequence[bytes], answers: Sequence[Retrieval]) -> None:
        """Keep the answer of each key."""
        import lmdb

        from tagstore.wire import convert
        from tagstore_proto.v1 import tagstore_pb2 as pb

        rows = []
        for key, answer in zip(keys, answers, strict=True):
            message = pb.RetrieveResponse(
                store=answer.store,
                version=answer.version,
                fingerprint=answer.fingerprint,
                retrievals=[convert.retrieval_to_proto(answer)],
            ).SerializeToString()
            rows.append((key, _seal(key, message) + message))
        try:
            with self._env.get().begin(write=True) as txn:
                stat = txn.stat()
                pages = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
                if pages * stat["psize"] > self._size:
                    _drop(txn.cursor(), 1 + stat["entries"] // 10)
                for key, value in rows:
                    txn.put(key, value)
        except lmdb.MapFullError:
            log.info(
                "the cache at %s is full of what other processes still read: %d answers were not kept",
                self._directory,
                len(rows),
            )

    def close(self) -> None:
        if (env := self._env.take()) is not None:
            env.close()

    def _open(self) -> Any:
        import lmdb

        Path(self._directory).mkdir(parents=True, exist_ok=True)
        try:
            # sync=False: the machine may crash and leave a bad file, which the seals notice.
            # LMDB copies what it changes: dropping answers from a full file needs as much room again
            return lmdb.open(
                self._directory, map_size=2 * self._size, max_readers=2048, sync=False, metasync=False
            )
        except lmdb.Error as error:
            raise WriteFailed(
                f"the cache at {self._directory} cannot be opened ({error}): delete it, no answer is lost"
            ) from error


def _read(message: bytes, version: int) -> Retrieval | None:
    """Read a kept answer; None for one that cannot be an answer, whoever wrote it."""
    from google.protobuf.message import DecodeError

    from tagstore.wire import convert
    from tagstore_proto.v1 import tagstore_pb2 as pb

    try:
        [answer] = convert.retrievals_from_proto(pb.RetrieveResponse.FromString(message))
    except (BadAnswer, DecodeError, ValueError):
        return None
    return answer if answer.version == version else None


def _drop(cursor: Any, count: int) -> None:
    """Drop answers from a random key on. Keys are hashes, so these are random answers on few pages."""
    if not cursor.set_range(random.randbytes(32)):
        cursor.first()
    for _ in range(count):
        if not cursor.delete():
            return


def _in_fixed_order(value: Any) -> Any:
    """Replace mappings by sorted lists."""
    if isinstance(value, dict):
        return sorted(value.items())
    return tuple(map(_in_fixed_order, value)) if isinstance(value, tuple | list) else value


def _seal(key: bytes, message: bytes) -> bytes:
    return hashlib.sha256(key + message).digest()[:_SEAL_BYTES]
