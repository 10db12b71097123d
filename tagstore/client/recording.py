"""Ask once for every sample of a data set and keep the answers as a map.

    samples ──batches, several at a time──▶ source ──▶ MAP.part, committed batch by batch ──all there──▶ MAP, written in order, renamed

What was cut off goes on where it stopped: samples that are in the .part with the same image are not asked for again.
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

from tagstore.client.mapfile import FORMAT, SCHEMA, Map, Row, asked, checksum, meta_seal, seal, tag_fields
from tagstore.client.source import Source
from tagstore.errors import AlreadyExists, InvalidInput
from tagstore.types import Pair, Rejected, Retrieval

Progress = Callable[[str, int], None]
_Sample = tuple[int, Pair | Rejected, bytes]
"""Position in the data set, what was read, sha256 of its image."""
_SAMPLE_TO_BLAME = ("image 0 of the request: ", "too much for the server")
_TAGS_AT_ONCE = 1000
_REMEMBERED = 256
"""Batches that may be on their way: more than are."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a recording came to."""

    path: str
    store: str
    version: int
    samples: int
    """Answered ones in the map."""
    refused: int
    """Those that could not be used; the map says why."""
    asked: int
    """Asked for by this run; the others were there from one that was cut off."""
    tags: int
    """Different tags over all answers."""
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
        source: is pinned, so that all answers are of one version.
        samples: with unique keys, always in the same order.
        out: where the map is written; `OUT.part` beside it until it is whole.
        workers: requests at a time.
        batch: samples a request.
        progress: told the stage and how many more samples are done.

    Raises:
        AlreadyExists: there is a map at `out`.
        InvalidInput: a key that comes twice with different images, or a .part of another store, version or other options.
        Unavailable: the source is gone; run it again to go on.
    """
    if source.options.on_failure != "raise":
        raise InvalidInput("a map must not hold answers that failed: record with on_failure=raise")
    if not 1 <= workers <= _REMEMBERED // 4:
        raise InvalidInput(f"{workers} workers: use 1 to {_REMEMBERED // 4}")
    out = Path(out)
    if out.exists():
        raise AlreadyExists(f"{out} is there: delete it, or record to another file")
    start = time.perf_counter()
    part = Path(f"{out}.part")
    with closing(_open(part)) as db:
        _begin(db, part, source)
        asked_for = _answer(db, source, samples, workers, batch, progress)
        tags = _add_tags(db, source, progress)
        total = _finish(db, source)
        _publish(db, part, out)
    answered, refused = total
    map_ = Map(out)
    value = Recorded(
        str(out),
        map_.meta["store"],
        int(map_.meta["version"]),
        answered,
        refused,
        asked_for,
        tags,
        time.perf_counter() - start,
        out.stat().st_size,
        map_.meta["checksum"],
    )
    map_.close()
    return value


def _open(part: Path) -> sqlite3.Connection:
    db = sqlite3.connect(part)
    db.execute("PRAGMA synchronous=NORMAL")
    return db


def _begin(db: sqlite3.Connection, part: Path, source: Source) -> None:
    """Fix the version, and see that what is there was begun with the same options."""
    options = json.dumps(asked(source.options), sort_keys=True)
    if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        meta = dict(db.execute("SELECT name, value FROM meta"))
        source.pin(int(meta["version"]))
        for name, value in (("store", source.info().store), ("options", options)):
            if meta[name] != value:
                raise InvalidInput(
                    f"{part} was begun with {name} {meta[name]}, this is {value}: delete it, or record to another file"
                )
        return
    pin = source.pin()
    with db:
        db.executescript(SCHEMA)
        db.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            [("store", pin.store), ("version", str(pin.version)), ("options", options)],
        )


def _answer(
    db: sqlite3.Connection,
    source: Source,
    samples: Iterable[Pair | Rejected],
    workers: int,
    batch: int,
    progress: Progress,
) -> int:
    """Ask for what isn't there yet; the answers are kept in the order of the samples. Returns how many were asked for."""
    pending: deque[Future[list[Row]]] = deque()
    asked_for = 0

    def keep() -> None:
        rows = pending.popleft().result()
        with db:
            values = [(r.position, r.key, r.sha256, r.answer, r.refused, r.seal) for r in rows]
            db.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?, ?)", values)
        progress("recorded", len(rows))

    with ThreadPoolExecutor(workers, thread_name_prefix="record") as pool:
        try:
            for some in _missing(db, samples, batch, progress):
                asked_for += len(some)
                pending.append(pool.submit(_ask, source, some))
                while len(pending) >= 2 * workers:
                    keep()
            while pending:
                keep()
        finally:
            for future in pending:
                future.cancel()
    return asked_for


def _missing(
    db: sqlite3.Connection, samples: Iterable[Pair | Rejected], batch: int, progress: Progress
) -> Iterator[list[_Sample]]:
    """Batches of what the map lacks, by key."""
    some: list[_Sample] = []
    on_their_way: deque[dict[str, bytes]] = deque(maxlen=_REMEMBERED)
    for position, item in enumerate(samples):
        digest = hashlib.sha256(item.image).digest() if isinstance(item, Pair) else b""
        there = db.execute("SELECT sha256 FROM samples WHERE key = ?", (item.key,)).fetchone()
        known = there[0] if there else next((b[item.key] for b in on_their_way if item.key in b), None)
        if known is None:
            known = next((d for _, other, d in some if other.key == item.key), None)
        if known is None:
            some.append((position, item, digest))
        elif known != digest and digest and known:
            raise InvalidInput(
                f"key '{item.key}' ({item.origin}) comes twice, with different images: name a field that is unique"
            )
        else:
            progress("recorded", 1)
        if len(some) == batch:
            on_their_way.append({other.key: d for _, other, d in some})
            yield some
            some = []
    if some:
        yield some


def _ask(source: Source, some: Sequence[_Sample]) -> list[Row]:
    """The rows of a batch. If it is refused, one by one: then the one that is to blame is known."""
    good = [(position, item, digest) for position, item, digest in some if isinstance(item, Pair)]
    rows = [
        Row(position, item.key, b"", None, item.reason)
        for position, item, _ in some
        if isinstance(item, Rejected)
    ]
    try:
        answers = source.retrieve([item.image for _, item, _ in good], keys=[item.key for _, item, _ in good])
        rows += [
            Row(position, item.key, digest, _bytes(a), None)
            for (position, item, digest), a in zip(good, answers, strict=True)
        ]
    except InvalidInput as error:
        if len(good) > 1:
            return rows + [row for one in good for row in _ask(source, [one])]
        if not str(error).startswith(_SAMPLE_TO_BLAME):
            raise
        [(position, item, digest)] = good
        rows.append(Row(position, item.key, digest, None, str(error).removeprefix(_SAMPLE_TO_BLAME[0])))
    return rows


def _bytes(answer: Retrieval) -> bytes:
    from tagstore.wire import convert

    data: bytes = convert.retrieval_to_proto(answer).SerializeToString(deterministic=True)
    return data


def _add_tags(db: sqlite3.Connection, source: Source, progress: Progress) -> int:
    """Keep the tags of all answers, with their embeddings, so that a model needs nothing else."""
    from tagstore_proto.v1 import tagstore_pb2 as pb

    answers = db.execute("SELECT answer FROM samples WHERE answer NOT NULL")
    wanted = {tag.tag_id for (data,) in answers for tag in pb.Retrieval.FromString(data).tags}
    missing = sorted(wanted - {i for (i,) in db.execute("SELECT tag_id FROM tags")})
    for start in range(0, len(missing), _TAGS_AT_ONCE):
        rows = [
            tag_fields(tag) for tag in source.tags(missing[start : start + _TAGS_AT_ONCE], embeddings=True)
        ]
        with db:
            db.executemany("INSERT INTO tags VALUES (?, ?, ?, ?, ?, ?)", [(*row, seal(*row)) for row in rows])
        progress("tags", len(rows))
    return len(wanted)


def _finish(db: sqlite3.Connection, source: Source) -> tuple[int, int]:
    """Write what the map says of itself, with its checksums. Returns how many samples were answered and refused."""
    answered, refused = db.execute("SELECT count(answer), count(refused) FROM samples").fetchone()
    info = source.info()
    meta = {
        "format": str(FORMAT),
        "store": info.store,
        "version": str(info.version),
        "fingerprint": info.fingerprint.digest,
        "info": json.dumps(asdict(info), sort_keys=True),
        "options": json.dumps(asked(source.options), sort_keys=True),
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
    """The map, written in order without slack, durable before it has its name."""
    whole = Path(f"{out}.whole")
    whole.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", (str(whole),))
    for path in (whole, whole.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    whole.replace(out)
    part.unlink()
