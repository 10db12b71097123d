"""A map: the answers to all samples of a data set, in one file that needs no server.

It is an SQLite database: Python's standard library reads it, and finds one row of millions without reading
the others. docs/client.md describes its tables.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from google.protobuf.message import DecodeError

from tagstore.client.options import Options
from tagstore.errors import BadAnswer, Damaged, NotFound
from tagstore.types import KINDS, Exclude, Fingerprint, Kind, Retrieval, Search, StoreInfo, TagInfo

FORMAT = 1
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE samples (
  position INTEGER PRIMARY KEY,
  key TEXT NOT NULL UNIQUE,
  sha256 BLOB NOT NULL,
  answer BLOB,
  refused TEXT,
  seal BLOB NOT NULL
);
CREATE INDEX by_sha256 ON samples (sha256);
CREATE TABLE tags (
  tag_id INTEGER PRIMARY KEY,
  text TEXT NOT NULL,
  kind TEXT NOT NULL,
  count INTEGER NOT NULL,
  embedding BLOB,
  seal BLOB NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One sample of a map."""

    position: int
    """In the data set, from 0."""
    key: str
    sha256: bytes
    """Of the encoded image."""
    answer: bytes | None
    """A `tagstore.v1.Retrieval`, or None for a sample that was refused."""
    refused: str | None
    """Why it was refused, or None."""

    @property
    def seal(self) -> bytes:
        return seal(self.position, self.key, self.sha256, self.answer, self.refused)


def seal(*fields: Any) -> bytes:
    """sha256 over length and bytes of each field (text in UTF-8, numbers in decimal; None has length -1)."""
    digest = hashlib.sha256()
    for field in fields:
        data = field if isinstance(field, bytes | None) else str(field).encode()
        digest.update(b"-1 " if data is None else f"{len(data)} ".encode() + data)
    return digest.digest()


def tag_fields(tag: TagInfo) -> tuple[Any, ...]:
    """A tag as a row without its seal; the embedding is float16, little endian, as in stores."""
    embedding = None if tag.embedding is None else tag.embedding.astype("<f2").tobytes()
    return tag.tag_id, tag.text, tag.kind, tag.count, embedding


_NAMES_ON_DISK = {
    "with_neighbours": "neighbours",
    "with_texts": "texts",
    "hash_distance": "perceptual_hash",
}
"""Names of options in a map, where they differ from the names in Python; maps written before still open."""


def _on_disk(value: Search | Exclude) -> dict[str, Any]:
    return {_NAMES_ON_DISK.get(name, name): value for name, value in asdict(value).items()}


def _in_python(values: dict[str, Any]) -> dict[str, Any]:
    names = {stored: name for name, stored in _NAMES_ON_DISK.items()}
    return {names.get(name, name): value for name, value in values.items()}


def recorded_options(options: Options) -> dict[str, Any]:
    """The options that decide an answer, besides the query and the version, as JSON values."""
    search = {**_on_disk(options.search), "where": dict(sorted(options.search.where.items()))}
    del search["exclude"]
    exclude = options.exclude
    return {
        **search,
        "exclude": json.loads(json.dumps(_on_disk(exclude))) if isinstance(exclude, Exclude) else exclude,
        "exclude_distance": options.exclude_distance,
        "exclude_keys": list(options.exclude_keys),
    }


def connect_options(values: dict[str, Any]) -> dict[str, Any]:
    """`recorded_options` as options that `connect` takes."""
    exclude = values["exclude"]
    if isinstance(exclude, dict):
        exclude = Exclude(
            **{
                **_in_python(exclude),
                "keys": tuple(exclude["keys"]),
                "entry_ids": tuple(exclude["entry_ids"]),
            }
        )
    return {**_in_python(values), "exclude": exclude}


class Map:
    """A finished map, opened to read, for one process and thread.

    Raises `NotFound` if there is none, `Damaged` if what stands there is not one or contradicts its
    checksums.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            part = Path(f"{path}.part")
            hint = (
                f"{part} is an unfinished one: run `tagstore record` again"
                if part.exists()
                else "`tagstore record` makes one"
            )
            raise NotFound(f"no map at {path}: {hint}")
        try:
            # immutable: no lock and no journal, so it works on a read-only disk and for any number of readers
            self._db = sqlite3.connect(
                f"{self.path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
            )
            self.meta: dict[str, str] = dict(self._db.execute("SELECT name, value FROM meta"))
        except sqlite3.Error as error:
            raise Damaged(f"{path} is no map ({error}): record it again") from error
        if self.meta.get("format") != str(FORMAT):
            raise Damaged(f"{path} is of format {self.meta.get('format')}: this reads {FORMAT}")
        expected = self.meta.get("seal", "")
        if expected != meta_seal(self.meta):
            raise Damaged(f"{path}: its meta does not fit its checksum: record it again")
        with self._foreign("its meta"):
            int(self.meta["version"])
            values = json.loads(self.meta["info"])
            fingerprint = Fingerprint(**values["fingerprint"])
            self.info = StoreInfo(**{**values, "fingerprint": fingerprint})
            self.options: dict[str, Any] = json.loads(self.meta["options"])
            connect_options(self.options)

    def by_key(self, keys: Sequence[str]) -> dict[str, Row]:
        return {row.key: row for row in self._rows("key", keys)}

    def by_sha256(self, digests: Sequence[bytes]) -> dict[bytes, list[Row]]:
        rows: dict[bytes, list[Row]] = {}
        for row in self._rows("sha256", digests):
            rows.setdefault(row.sha256, []).append(row)
        return rows

    def tags(self, tag_ids: Iterable[int] | None = None, *, embeddings: bool = False) -> Iterator[TagInfo]:
        """The tags with these ids, in no order; without ids all tags, in order of their ids."""
        if tag_ids is None:
            rows = self._run("SELECT * FROM tags ORDER BY tag_id")
        else:
            rows = self._run(f"SELECT * FROM tags WHERE tag_id IN ({','.join(map(str, map(int, tag_ids)))})")
        for tag_id, text, kind, count, embedding, sealed in rows:
            if sealed != seal(tag_id, text, kind, count, embedding):
                raise Damaged(f"{self.path}: tag {tag_id} does not fit its checksum: record it again")
            vector = None
            if embeddings and embedding is not None:
                with self._foreign(f"the embedding of tag {tag_id}"):
                    vector = np.frombuffer(embedding, "<f2").astype(np.float32)
                    if not np.isfinite(vector).all():
                        raise BadAnswer("it holds a number that is not finite")
            # a later version may know more kinds
            yield TagInfo(tag_id, text, cast(Kind, kind) if kind in KINDS else "custom", count, vector)

    def answer(self, row: Row) -> Retrieval:
        """The recorded answer of a sample that was not refused."""
        from tagstore.wire import convert
        from tagstore_proto.v1 import tagstore_pb2 as pb

        response = pb.RetrieveResponse(
            store=self.meta["store"], version=int(self.meta["version"]), fingerprint=self.meta["fingerprint"]
        )
        with self._foreign(f"the answer to sample '{row.key}'"):
            response.retrievals.append(pb.Retrieval.FromString(row.answer or b""))
            return convert.retrievals_from_proto(response)[0]

    def verify(self) -> None:
        """Read the whole map and compare it with its checksums. Raises `Damaged`."""
        try:
            if checksum(self._db) != self.meta["checksum"]:
                raise Damaged(f"{self.path} does not fit its checksum: record it again")
            for table, columns in (
                ("samples", "position, key, sha256, answer, refused"),
                ("tags", "tag_id, text, kind, count, embedding"),
            ):
                for *fields, sealed in self._db.execute(f"SELECT {columns}, seal FROM {table}"):
                    if seal(*fields) != sealed:
                        raise Damaged(
                            f"{self.path}: {table} {fields[0]} does not fit its checksum: record it again"
                        )
        except sqlite3.Error as error:
            raise Damaged(f"{self.path} cannot be read: {error}. Record it again") from error

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _foreign(self, what: str) -> Iterator[None]:
        """Raise `Damaged` for what a map holds under good checksums, and cannot be true."""
        try:
            yield
        except (BadAnswer, DecodeError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise Damaged(f"{self.path}: {what} cannot be read: {error}. Record it again") from error

    def _rows(self, column: str, values: Sequence[Any]) -> Iterator[Row]:
        for start in range(0, len(values), 500):
            batch = values[start : start + 500]
            query = (
                "SELECT position, key, sha256, answer, refused, seal FROM samples "
                f"WHERE {column} IN ({','.join('?' * len(batch))}) ORDER BY position"
            )
            for *fields, sealed in self._run(query, batch):
                row = Row(*fields)
                if row.seal != sealed:
                    raise Damaged(
                        f"{self.path}: sample '{row.key}' does not fit its checksum: record it again"
                    )
                yield row

    def _run(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise Damaged(f"{self.path} cannot be read: {error}. Record it again") from error


def checksum(db: sqlite3.Connection) -> str:
    """sha256 (hex) over the seals of all samples in order of position and of all tags in order of id."""
    digest = hashlib.sha256()
    for query in ("SELECT seal FROM samples ORDER BY position", "SELECT seal FROM tags ORDER BY tag_id"):
        for (sealed,) in db.execute(query):
            digest.update(sealed)
    return digest.hexdigest()


def meta_seal(meta: dict[str, str]) -> str:
    """The seal of a map's meta: over all names and values except its own, in order of name."""
    return seal(*(field for name in sorted(meta) if name != "seal" for field in (name, meta[name]))).hex()
