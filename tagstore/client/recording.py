"""Ask once for every sample of a data set and keep the answers as a map.

    samples ──batches, several at a time──▶ source ──batch by batch──▶ MAP.part ──in order, renamed──▶ MAP

A recording that was cut off is resumed: what is in the .part with the same image is not asked for again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from tagstore.client.mapfile import (
    FORMAT,
    SCHEMA,
    Map,
    Row,
    checksum,
    meta_seal,
    recorded_options,
    seal,
    tag_fields,
)
from tagstore.client.source import Source
from tagstore.errors import AlreadyExists, InvalidInput
from tagstore.types import Pair, Rejected, Retrieval

Progress = Callable[[str, int], None]
_Sample = tuple[int, Pair | Rejected, bytes]
"""Position in the data set, what was read, sha256 of its image."""
_SAMPLE_ERRORS = ("image 0 of the request: ", "too much for the server")
"""Beginnings of the errors that one sample causes; others concern the whole recording."""
_TAGS_PER_REQUEST = 1000
_RECENT_BATCHES = 256
"""Batches whose keys are remembered, more than are ever in flight: the .part does not hold those yet."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The result of a recording."""

    path: str
    store: str
    version: int
    samples: int
    """Samples with an answer in the map."""
    refused: int
    """Samples that could not be used; the map says why."""
    asked: int
    """Samples that this run asked for; the others were recorded before it was cut off."""
    tags: int
    """Distinct tags over all answers."""
    seconds: float
    bytes: int
    checksum: str


def record(
    source: Source,
    samples: Iterable[Pair | Rejected],
    out: str | Path,
    *,
    workers: int = 4,
    batch: int = 16,
    progress: Progress = lambda stage, done: None,
) -> Recorded:
    """Record the answers of a source to all samples with the options that it was connected with.

    Args:
        source: will be pinned, so that all answers are of one version.
        samples: with unique keys, always in the same order.
        out: path of the map; `OUT.part` until it is complete.
        workers: requests at a time.
        batch: samples a request.
        progress: called with the stage and the number of samples just done.

    Raises:
        AlreadyExists: there is a map at `out`.
        InvalidInput: a key that comes twice with different images, or a .part of another store, version or
            other options.
        Unavailable: the source is gone; run it again to go on.
    """
    if source.options.on_failure != "raise":
        raise InvalidInput("a map must not hold answers that failed: record with on_failure=raise")
    if not 1 <= workers <= _RECENT_BATCHES // 4:
        raise InvalidInput(f"{workers} workers: use 1 to {_RECENT_BATCHES // 4}")
    out = Path(out)
    if out.exists():
        raise AlreadyExists(f"{out} is there: delete it, or record to another file")
    start = time.perf_counter()
    part = Path(f"{out}.part")
    with closing(_open(part)) as db:
        _begin(db, part, source)
        asked_for = _record_answers(db, source, samples, workers, batch, progress)
        tags = _add_tags(db, source, progress)
        total = _write_meta(db, source)
        _publish(db, part, out)
    answered, refused = total
    recorded_map = Map(out)
    value = Recorded(
        str(out),
        recorded_map.meta["store"],
        int(recorded_map.meta["version"]),
        answered,
        refused,
        asked_for,
        tags,
        time.perf_counter() - start,
        out.stat().st_size,
        recorded_map.meta["checksum"],
    )
    recorded_map.close()
    return value


def _open(part: Path) -> sqlite3.Connection:
    db = sqlite3.connect(part)
    db.execute("PRAGMA synchronous=NORMAL")
    return db


def _begin(db: sqlite3.Connection, part: Path, source: Source) -> None:
    """Pin the version, and refuse a .part that was begun with other options."""
    options = json.dumps(recorded_options(source.options), sort_keys=True)
    if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        meta = dict(db.execute("SELECT name, value FROM meta"))
        source.pin(int(meta["version"]))
        for name, value in (("store", source.info().store), ("options", options)):
            if meta[name] != value:
                raise InvalidInput(
                    f"{part} was begun with {name} {meta[name]}, this is {value}: "
                    "delete it, or record to another file"
                )
        return
    pin = source.pin()
    with db:
        db.executescript(SCHEMA)
        db.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            [("store", pin.store), ("version", str(pin.version)), ("options", options)],
        )


def _record_answers(
    db: sqlite3.Connection,
    source: Source,
    samples: Iterable[Pair | Rejected],
    workers: int,
    batch: int,
    progress: Progress,
) -> int:
    """Ask for unrecorded samples and keep the answers in their order; return how many were asked for."""
    pending: deque[Future[list[Row]]] = deque()
    asked_for = 0

    def keep_oldest() -> None:
        rows = pending.popleft().result()
        with db:
            values = [(r.position, r.key, r.sha256, r.answer, r.refused, r.seal) for r in rows]
            db.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?)", values)
        progress("recorded", len(rows))

    with ThreadPoolExecutor(workers, thread_name_prefix="record") as pool:
        try:
            for unrecorded in _unrecorded_batches(db, samples, batch, progress):
                asked_for += len(unrecorded)
                pending.append(pool.submit(_answer_batch, source, unrecorded))
                while len(pending) >= 2 * workers:
                    keep_oldest()
            while pending:
                keep_oldest()
        finally:
            for future in pending:
                future.cancel()
    return asked_for


def _unrecorded_batches(
    db: sqlite3.Connection, samples: Iterable[Pair | Rejected], batch: int, progress: Progress
) -> Iterator[list[_Sample]]:
    """Batches of the samples whose keys the map lacks."""
    unrecorded: list[_Sample] = []
    recent: deque[dict[str, bytes]] = deque(maxlen=_RECENT_BATCHES)
    for position, item in enumerate(samples):
        digest = hashlib.sha256(item.image).digest() if isinstance(item, Pair) else b""
        stored = db.execute("SELECT sha256 FROM samples WHERE key = ?", (item.key,)).fetchone()
        known = stored[0] if stored else next((b[item.key] for b in recent if item.key in b), None)
        if known is None:
            known = next((d for _, other, d in unrecorded if other.key == item.key), None)
        if known is None:
            unrecorded.append((position, item, digest))
        elif known != digest and digest and known:
            raise InvalidInput(
                f"key '{item.key}' ({item.origin}) comes twice, with different images: "
                "name a field that is unique"
            )
        else:
            progress("recorded", 1)
        if len(unrecorded) == batch:
            recent.append({other.key: d for _, other, d in unrecorded})
            yield unrecorded
            unrecorded = []
    if unrecorded:
        yield unrecorded


def _answer_batch(source: Source, unrecorded: Sequence[_Sample]) -> list[Row]:
    """The rows of a batch. If the batch is refused, ask one by one to find the sample that causes it."""
    usable = [(position, item, digest) for position, item, digest in unrecorded if isinstance(item, Pair)]
    rows = [
        Row(position, item.key, b"", None, item.reason)
        for position, item, _ in unrecorded
        if isinstance(item, Rejected)
    ]
    try:
        answers = source.retrieve(
            [item.image for _, item, _ in usable], keys=[item.key for _, item, _ in usable]
        )
        rows += [
            Row(position, item.key, digest, _serialised(a), None)
            for (position, item, digest), a in zip(usable, answers, strict=True)
        ]
    except InvalidInput as error:
        if len(usable) > 1:
            return rows + [row for sample in usable for row in _answer_batch(source, [sample])]
        if not str(error).startswith(_SAMPLE_ERRORS):
            raise
        [(position, item, digest)] = usable
        rows.append(Row(position, item.key, digest, None, str(error).removeprefix(_SAMPLE_ERRORS[0])))
    return rows


def _serialised(answer: Retrieval) -> bytes:
    from tagstore.wire import convert

    data: bytes = convert.retrieval_to_proto(answer).SerializeToString(deterministic=True)
    return data


def _add_tags(db: sqlite3.Connection, source: Source, progress: Progress) -> int:
    """Keep the tags of all answers with their embeddings; return how many there are."""
    from tagstore_proto.v1 import tagstore_pb2 as pb

    answers = db.execute("SELECT answer FROM samples WHERE answer NOT NULL")
    wanted = {tag.tag_id for (data,) in answers for tag in pb.Retrieval.FromString(data).tags}
    missing = sorted(wanted - {i for (i,) in db.execute("SELECT tag_id FROM tags")})
    for start in range(0, len(missing), _TAGS_PER_REQUEST):
        rows = [
            tag_fields(tag)
            for tag in source.tags(missing[start : start + _TAGS_PER_REQUEST], embeddings=True)
        ]
        with db:
            db.executemany("INSERT INTO tags VALUES (?, ?, ?, ?, ?, ?)", [(*row, seal(*row)) for row in rows])
        progress("tags", len(rows))
    return len(wanted)


def _write_meta(db: sqlite3.Connection, source: Source) -> tuple[int, int]:
    """Write the meta table with checksums; return how many samples were answered and refused."""
    answered, refused = db.execute("SELECT count(answer), count(refused) FROM samples").fetchone()
    info = source.info()
    meta = {
        "format": str(FORMAT),
        "store": info.store,
        "version": str(info.version),
        "fingerprint": info.fingerprint.digest,
        "info": json.dumps(asdict(info), sort_keys=True),
        "options": json.dumps(recorded_options(source.options), sort_keys=True),
        "samples": str(answered),
        "refused": str(refused),
        "checksum": checksum(db),
    }
    meta["seal"] = meta_seal(meta)
    with db:
        db.execute("DELETE FROM meta")
        db.executemany("INSERT INTO meta VALUES (?, ?)", sorted(meta.items()))
    return answered, refused


def _publish(db: sqlite3.Connection, part: Path, out: Path) -> None:
    """Write the map in order and without slack; make it durable before it gets its name."""
    complete = Path(f"{out}.whole")
    complete.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", (str(complete),))
    for path in (complete, complete.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    complete.replace(out)
    part.unlink()
